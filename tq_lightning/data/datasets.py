"""The data sets by name: one row each. To add one, write a reader and add its row."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tq_lightning.data import image_folder as images
from tq_lightning.data.sampling import generator, stratified
from tq_lightning.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Split:
    """One split of a set: small images as one tensor, files as a function.

    Attributes:
        classes: names in index order.
        labels: (N,) int64.
        pixels: (N, 3, H, W) uint8, or None.
        read: n -> (PIL image, class number), or None.
    """

    classes: list[str]
    labels: Tensor
    pixels: Tensor | None = None
    read: Callable[[int], tuple[Any, int]] | None = None

    def picture(self, n: int) -> tuple[Any, int]:
        """(PIL image, class number) of a set in memory, for timm's transforms of single images."""
        from PIL import Image

        assert self.pixels is not None
        return Image.fromarray(self.pixels[n].permute(1, 2, 0).numpy()), int(self.labels[n])


@dataclass
class Source:
    """What a reader may use of the configuration; `index` remembers the classes of the first split of files read."""

    root: Path
    download: bool
    num_classes: int | None
    image_size: int
    samples: int | None
    index: dict[str, int] | None = None


def read_digits(source: Source, split: str) -> Split | None:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, as 3 equal channels; a fixed fifth, even over the classes, is test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()
    pixels = (
        torch.from_numpy(bunch.images * (255 / 16))
        .round()
        .to(torch.uint8)[:, None]
        .expand(-1, 3, -1, -1)
    )
    test = torch.zeros(labels.numel(), dtype=torch.bool)
    test[stratified(labels, 360)] = True
    part = {"train": ~test, "test": test}.get(split)
    return (
        None
        if part is None
        else Split([str(d) for d in range(10)], labels[part], pixels[part].contiguous())
    )


def read_synthetic(source: Source, split: str) -> Split:
    """Made-up pictures that can be learned: a smooth pattern per class, shifted and dimmed per sample, with noise.

    At most 32x32 is stored and scaled up on the device, so that a set at 224 costs no more than one at 32. Validation
    and test have a quarter of the training samples each.
    """
    classes, side = source.num_classes or 10, min(32, source.image_size)
    count = source.samples or 2048
    count = count if split == "train" else max(16, count // 4)
    draw = generator(7, {"train": 1, "val": 2, "test": 3}[split])
    pattern = F.interpolate(
        torch.rand(classes, 3, 4, 4, generator=generator(6, classes)), (side, side), mode="bilinear"
    )
    labels = torch.arange(count)[torch.randperm(count, generator=draw)] % classes
    shift = torch.randint(-(side // 8), side // 8 + 1, (count, 2), generator=draw)
    rows, columns = ((torch.arange(side) + shift[:, axis, None]) % side for axis in (0, 1))
    moved = pattern[labels[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
    gain = 0.6 + 0.4 * torch.rand(count, 1, 1, 1, generator=draw)
    noisy = moved * gain + 0.15 * torch.randn(moved.shape, generator=draw)
    pixels = (noisy.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    return Split([f"class{c}" for c in range(classes)], labels, pixels)


def read_cifar10(source: Source, split: str) -> Split | None:
    """As `read_cifar`, 10 classes."""
    return read_cifar(source, split, 10)


def read_cifar100(source: Source, split: str) -> Split | None:
    """As `read_cifar`, 100 classes."""
    return read_cifar(source, split, 100)


def read_cifar(source: Source, split: str, classes: int) -> Split | None:
    """<split>.tar or <split>/ of images under root, else torchvision's own files there, else a download."""
    root = source.root
    if (path := images.find_split(root, split)) is not None:
        names, labels, pixels = images.decode_all(path, 32)
        if len(names) != classes:
            raise UserError(
                f"{path} has images of {len(names)} classes ({', '.join(names[:3])}, ...), cifar{classes} has {classes}; "
                "unpack it again, or pass data.name=imagefolder"
            )
        return Split(names, labels, pixels)
    if split == "val":
        return None
    other = images.find_split(root, "test" if split == "train" else "train")
    if other is not None:  # a set given as images: half of it must not come from elsewhere
        raise UserError(f"{other} is there, but {images.missing(root, split)}")
    return Split(*images.torchvision_cifar(root, classes, split == "train", source.download))


def read_imagefolder(source: Source, split: str) -> Split | None:
    """Class folders or tars of any images; the classes are those of the training split, in natural order."""
    if source.index is None and split != "train":
        read_imagefolder(source, "train")
    return _read_files(source, split)


def read_imagenet(source: Source, split: str) -> Split | None:
    """ImageNet-1k: folders named by WordNet id, mapped to the usual 1,000 indices even where few of them are there."""
    from timm.data.imagenet_info import ImageNetInfo

    source.index = {
        name: number for number, name in enumerate(ImageNetInfo("imagenet-1k").label_names())
    }
    return _read_files(source, split)


def _read_files(source: Source, split: str) -> Split | None:
    root = source.root
    path = images.find_split(root, split)
    if path is None and split == "train" and images.is_flat(root):
        path = root
    if path is None:
        if not images.is_flat(root) and not any(images.find_split(root, s) for s in images.SPLITS):
            raise UserError(images.missing(root, split))
        return None
    dataset, source.index, labels = images.open_folder(path, source.index)
    return Split(
        sorted(source.index, key=source.index.__getitem__), labels, read=dataset.__getitem__
    )


# read: (source, split) -> Split, or None where the set has no such split
# classes: None = as found or asked for; size: edge in pixels, None = image files, scaled to what is asked for
# pad: black border of the random crop in pixels; hflip: chance to mirror; jitter: timm's colour jitter
_FILES: dict[str, Any] = {
    "size": None,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "pad": 0,
    "hflip": 0.5,
    "jitter": 0.4,
}
_SMALL: dict[str, Any] = {"size": 32, "pad": 4, "hflip": 0.5, "jitter": 0.0}
DATASETS: dict[str, dict[str, Any]] = {
    "digits": {
        "read": read_digits, "classes": 10, "size": 8, "mean": (0.305,) * 3, "std": (0.376,) * 3,
        "pad": 1, "hflip": 0.0, "jitter": 0.0,
    },
    "cifar10": {
        "read": read_cifar10, "classes": 10, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616), **_SMALL,
    },
    "cifar100": {
        "read": read_cifar100, "classes": 100, "mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762), **_SMALL,
    },
    "imagenet": {"read": read_imagenet, "classes": 1000, **_FILES},
    "imagefolder": {"read": read_imagefolder, "classes": None, **_FILES},
    "synthetic": {"read": read_synthetic, "classes": None, "mean": (0.5,) * 3, "std": (0.25,) * 3, **_SMALL},
}  # fmt: skip
