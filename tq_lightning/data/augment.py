"""Augmentation: of whole batches on the device from numbers drawn in advance, and timm's of single images."""

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
    """Seed Python's, numpy's and torch's global generators, and put their states back on any exit.

    timm's transforms, random erasing and mixup draw from the global generators; this makes their draws a function of
    `seed` alone and leaves no trace. `device`: a CUDA device whose generator is used too.
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
    """Seed the three generators of the CPU, and that of `device` if it is a CUDA one.

    (`torch.manual_seed` would seed every CUDA device, whether its state was kept or not.)
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Pad every image with `pad` black pixels, cut one window of the old size per image, and mirror where asked.

    Args:
        images: (B, C, H, W), any dtype.
        top, left: (B,) int64, corner of the window in 0..2*pad.
        flip: (B,) bool, mirror left-right.

    Returns:
        (B, C, H, W), same dtype: one gather for all images, crop and mirror together.
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
    """Draws the random numbers of a training batch on the CPU, and applies them to the batch where it is.

    Args:
        seed: run seed; batch b of epoch e draws from (seed, e, b) for the global batch, however many processes share it.
        pad: black border of the random crop in pixels, 0 for none.
        hflip: chance to mirror.
        reprob, remode: timm's RandomErasing: its chance, and const | rand | pixel.
        mixup: timm's Mixup, or None.
    """

    def __init__(
        self, seed: int, pad: int, hflip: float, reprob: float, remode: str, mixup: Any
    ) -> None:
        self.seed, self.pad, self.hflip = seed, pad, hflip
        self.reprob, self.remode, self.mixup = reprob, remode, mixup

    def draw(self, epoch: int, batch: int, size: int, mine: Tensor) -> dict[str, Any]:
        """The numbers for places `mine` of the global batch: small tensors, and integers for seeds (they stay on the CPU)."""
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
        """Crop and mirror; before normalisation, so that the border is black."""
        return (
            crop_flip(images, draw["top"], draw["left"], draw["flip"], self.pad)
            if "top" in draw
            else images
        )

    def finish(self, images: Tensor, labels: Tensor, draw: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Random erasing and mixup, after normalisation as in timm; under mixup labels become (B, classes) floats."""
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
    """timm's evaluation transform of one PIL image, up to a uint8 (3, size, size) tensor."""
    from timm.data import create_transform

    return create_transform(size, crop_pct=crop_pct, interpolation=interpolation, normalize=False)


def train_transform(
    size: int, scale: float, hflip: float, interpolation: str, **colours: Any
) -> Callable[[Any], Tensor]:
    """timm's training transform of one PIL image, up to a uint8 (3, size, size) tensor (erasing is left to the batch).

    `colours`: color_jitter, auto_augment and mean (what auto-augment fills with), as timm's `create_transform` takes them.
    """
    from timm.data import create_transform

    crop: dict[str, Any] = {"scale": (scale, 1.0), "hflip": hflip, "interpolation": interpolation}
    return create_transform(size, is_training=True, normalize=False, **crop, **colours)


def colour_transform(size: int, **colours: Any) -> Callable[[Any], Tensor]:
    """The part of `train_transform` that neither crops nor mirrors, for small images, which are cropped as a batch."""
    from timm.data import create_transform

    _, ops, last = create_transform(
        size, is_training=True, normalize=False, separate=True, **colours
    )
    return lambda image: last(ops(image))
