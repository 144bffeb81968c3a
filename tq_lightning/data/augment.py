"""Augmentation: of batches on the device, with random numbers drawn in advance, and by timm."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tq_lightning.data.sampling import derive_seed, generator


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and PyTorch, and restore their states on exit.

    timm's transforms, random erasing and mixup draw from the global generators. Inside of this
    context, their draws depend only on `seed`.

    Args:
        seed: seed of all generators.
        device: a CUDA device whose generator is seeded too.
    """
    cuda = device if device is not None and device.type == "cuda" else None
    python, numeric, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(cuda) if cuda is not None else None
    try:
        reseed(seed, device)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numeric)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, cuda)  # type: ignore[arg-type]


def reseed(seed: int, device: torch.device | None = None) -> None:
    """Seed the three CPU generators, and the generator of `device` if it is a CUDA device.

    `torch.manual_seed` would also seed the other CUDA devices, whose states were not saved.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Pad images with black, crop a window of the original size from each, and mirror some.

    Args:
        images: (B, C, H, W), any dtype.
        top: (B,) int64, first row of the window, 0..2*pad.
        left: (B,) int64, first column of the window, 0..2*pad.
        flip: (B,) bool, True to mirror left-right.
        pad: width of the border in pixels.

    Returns:
        (B, C, H, W), same dtype, computed by one gather.
    """
    b, c, h, w = images.shape
    padded = F.pad(images, (pad, pad, pad, pad)) if pad else images
    rows = top[:, None] + torch.arange(h, device=images.device)
    x = torch.arange(w, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], w - 1 - x, x)
    index = rows[:, :, None] * (w + 2 * pad) + columns[:, None, :]
    return (
        padded.reshape(b, c, -1).gather(2, index.view(b, 1, -1).expand(b, c, -1)).view(b, c, h, w)
    )


class BatchAugment:
    """Augmentation of training batches, with random numbers drawn on the CPU in advance.

    Batch b of epoch e draws from (seed, e, b) for the global batch, regardless of the number of
    processes.

    Args:
        seed: run seed.
        pad: black border of the random crop in pixels, 0 for no crop.
        hflip: probability of mirroring.
        reprob: probability of timm's RandomErasing.
        remode: fill of timm's RandomErasing, const, rand or pixel.
        mixup: timm's Mixup, or None.
    """

    def __init__(
        self, seed: int, pad: int, hflip: float, reprob: float, remode: str, mixup: Any
    ) -> None:
        self.seed, self.pad, self.hflip = seed, pad, hflip
        self.reprob, self.remode, self.mixup = reprob, remode, mixup

    def draw(self, epoch: int, batch: int, size: int, mine: Tensor) -> dict[str, Any]:
        """Draw the random numbers for this process's share of a batch.

        Args:
            epoch: index of the epoch.
            batch: index of the batch in it.
            size: size of the global batch.
            mine: positions of this process in the global batch.

        Returns:
            Small tensors, and seeds as integers, which stay on the CPU.
        """
        source = generator(self.seed, epoch, batch, 3)
        out: dict[str, Any] = {}
        if self.pad or self.hflip:
            window = torch.randint(0, 2 * self.pad + 1, (2, size), generator=source)[:, mine]
            out |= {"top": window[0], "left": window[1]}
            out["flip"] = (torch.rand(size, generator=source) < self.hflip)[mine]
        if self.reprob:
            out["erase"] = torch.randint(0, 2**31, (size,), generator=source)[mine].tolist()
        if self.mixup is not None:
            out["mix"] = derive_seed(self.seed, epoch, batch, 4)
        return out

    def geometry(self, images: Tensor, draw: dict[str, Any]) -> Tensor:
        """Crop and mirror. Called before normalization, so the border is black."""
        if "top" not in draw:
            return images
        return crop_flip(images, draw["top"], draw["left"], draw["flip"], self.pad)

    def finish(self, images: Tensor, labels: Tensor, draw: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Apply random erasing and mixup. Called after normalization, as in timm.

        Returns:
            Images, and labels, which mixup turns into float (B, classes).
        """
        if "erase" in draw:
            from timm.data.random_erasing import RandomErasing

            erase = RandomErasing(self.reprob, mode=self.remode, device=images.device)  # type: ignore[arg-type]
            with seeded(0, images.device):
                for image, seed in zip(images, draw["erase"], strict=True):
                    reseed(seed, images.device)
                    erase(image)
        if "mix" in draw:
            with seeded(draw["mix"]):
                images, labels = self.mixup(images, labels)
        return images, labels


def eval_transform(size: int, crop_pct: float, interpolation: str) -> Callable[[Any], Tensor]:
    """Create timm's evaluation transform: PIL image -> uint8 (3, size, size)."""
    from timm.data import create_transform

    return create_transform(size, crop_pct=crop_pct, interpolation=interpolation, normalize=False)


def train_transform(
    size: int, scale: float, hflip: float, interpolation: str, **color: Any
) -> Callable[[Any], Tensor]:
    """Create timm's training transform without random erasing: PIL image -> uint8 (3, size, size).

    Args:
        size: height and width in pixels.
        scale: smallest fraction of the image's area that a random crop covers.
        hflip: probability of mirroring.
        interpolation: random, bilinear or bicubic.
        **color: color_jitter, auto_augment and mean (the fill of auto-augment), as for timm's
            `create_transform`.
    """
    from timm.data import create_transform

    crop: dict[str, Any] = {"scale": (scale, 1.0), "hflip": hflip, "interpolation": interpolation}
    made = create_transform(size, is_training=True, normalize=False, **crop, **color)
    return _with_posterize(made)


def _with_posterize(made: Any) -> Any:
    """Replace timm's posterize by `posterize` in a composed transform."""
    from timm.data import auto_augment

    for part in made.transforms:
        policies = [getattr(part, "ops", ()), *getattr(part, "policy", ())]
        for operation in (one for policy in policies for one in policy):
            if getattr(operation, "aug_fn", None) is auto_augment.posterize:
                operation.aug_fn = posterize
    return made


def posterize(image: Any, bits_to_keep: int, **options: Any) -> Any:
    """Keep the upper bits of each pixel, as timm does.

    The strongest level of timm's policies keeps 0 bits, which Pillow 13 refuses. Earlier versions
    return a black image.
    """
    from PIL import Image
    from timm.data import auto_augment

    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **options)


class ColorTransform:
    """`train_transform` without crops and mirroring.

    Small images are cropped and mirrored as a batch instead.

    Args:
        size: height and width in pixels.
        **color: see `train_transform`.
    """

    def __init__(self, size: int, **color: Any) -> None:
        from timm.data import create_transform

        _, self.operations, self.to_tensor = create_transform(
            size, is_training=True, normalize=False, separate=True, **color
        )
        _with_posterize(self.operations)

    def __call__(self, image: Any) -> Tensor:
        """Transform a PIL image to uint8 (3, H, W)."""
        return self.to_tensor(self.operations(image))
