"""The data sets by name: one row each. To add one, write a reader and add a row."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tq_lightning.data import images
from tq_lightning.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Split:
    """One split: `labels` (N,) int64, `classes` in index order, and the pictures: `pixels` (N, 3, H, W) uint8, or `read(n) -> (PIL, class)`."""

    labels: Tensor
    classes: list[str]
    pixels: Tensor | None = None
    read: Callable[[int], tuple[Any, int]] | None = None


@dataclass
class Source:
    """What a reader may use of the configuration."""

    root: Path
    download: bool
    num_classes: int | None
    image_size: int
    samples: int | None


def read_digits(source: Source, split: str) -> Split | None:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, repeated to 3 channels; a fixed fifth of them, even over the classes, is the test split."""
    from sklearn.datasets import load_digits

    from tq_lightning.data.order import stratified

    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()
    pixels = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    test = torch.zeros(labels.numel(), dtype=torch.bool)
    test[stratified(labels, 360)] = True
    part = {"train": ~test, "test": test}.get(split)
    return None if part is None else Split(labels[part], [str(d) for d in range(10)], pixels[part].contiguous())


def read_synthetic(source: Source, split: str) -> Split:
    """Made-up pictures that can be learned: each class is a smooth random pattern, a sample is its class' pattern, shifted, dimmed, with noise.

    At most 32x32 are stored; larger sizes are scaled up on the device, so that a set at 224 costs no more than one at 32.
    """
    import torch.nn.functional as F

    from tq_lightning.data.order import generator

    classes, side = source.num_classes or 10, min(32, source.image_size)
    number = {"train": 1, "val": 2, "test": 3}[split]
    count = source.samples or 2048
    count = count if split == "train" else max(16, count // 4)
    pattern = F.interpolate(torch.rand(classes, 3, 4, 4, generator=generator(classes, 6)), (side, side), mode="bilinear")
    draw = generator(number, 7)
    labels = torch.arange(count)[torch.randperm(count, generator=draw)] % classes
    shift = torch.randint(-(side // 8), side // 8 + 1, (count, 2), generator=draw)
    grid = torch.arange(side)
    rows, columns = (grid + shift[:, :1]) % side, (grid + shift[:, 1:]) % side
    moved = pattern[labels[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    gain = 0.6 + 0.4 * torch.rand(count, 1, 1, 1, generator=draw)
    noisy = moved * gain + 0.15 * torch.randn(moved.shape, generator=draw)
    return Split(labels, [f"class{c}" for c in range(classes)], (noisy.clamp(0, 1) * 255).round().to(torch.uint8).contiguous())


def read_cifar(source: Source, split: str, classes: int) -> Split | None:
    """CIFAR-10 or -100: `<split>.tar` or `<split>/` in ImageFolder layout under root, else torchvision's own files, else a download."""
    found = images.find_split(source.root, split)
    if found is not None:
        names, labels, pixels = images.decode_all(found, (32, 32))
        if len(names) != classes:
            raise UserError(f"{found} has images of {len(names)} classes ({', '.join(names[:3])}, ...), cifar{classes} has {classes}; unpack it again")
        return Split(labels, names, pixels)
    if split == "val":
        return None
    other = images.find_split(source.root, "test" if split == "train" else "train")
    if other is not None:
        raise UserError(f"no {split} split: {other} is there, but neither {source.root / split}.tar nor {source.root / split}/")
    names, labels, pixels = images.torchvision_cifar(source.root, classes, split == "train", source.download)
    return Split(labels, names, pixels)


def read_cifar10(source: Source, split: str) -> Split | None:
    return read_cifar(source, split, 10)


def read_cifar100(source: Source, split: str) -> Split | None:
    return read_cifar(source, split, 100)


def read_imagefolder(source: Source, split: str) -> Split | None:
    """Any images in class folders, as files or in tars; the classes are those of the training split, in timm's natural order."""
    return _read_folder(source, split, images.class_index(source.root))


def read_imagenet(source: Source, split: str) -> Split | None:
    """ImageNet-1k: class folders named by WordNet id, mapped to the usual 1,000 indices even where only some of them are there."""
    from timm.data.imagenet_info import ImageNetInfo

    return _read_folder(source, split, {name: i for i, name in enumerate(ImageNetInfo("imagenet-1k").label_names())})


def _read_folder(source: Source, split: str, index: dict[str, int]) -> Split | None:
    path = images.find_split(source.root, split) or (source.root if split == "train" and images.is_flat(source.root) else None)
    if path is None:
        if split == "train" or not source.root.exists():
            raise UserError(images.missing(source.root, split))
        return None
    dataset, labels = images.open_folder(path, index)
    return Split(labels, sorted(index, key=index.__getitem__), read=dataset.__getitem__)


# read(source, split) -> Split, or None where the set has no such split; classes: None = found in the files; size: edge in pixels, None = as asked;
# pad: black border of the random crop in pixels; hflip: chance to mirror; jitter: timm's colour jitter
DATASETS: dict[str, dict[str, Any]] = {
    "digits": {"read": read_digits, "classes": 10, "size": 8, "mean": (0.305,) * 3, "std": (0.376,) * 3, "pad": 1, "hflip": 0.0, "jitter": 0.0},
    "cifar10": {
        "read": read_cifar10, "classes": 10, "size": 32, "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616),
        "pad": 4, "hflip": 0.5, "jitter": 0.0,
    },
    "cifar100": {
        "read": read_cifar100, "classes": 100, "size": 32, "mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762),
        "pad": 4, "hflip": 0.5, "jitter": 0.0,
    },
    "imagenet": {"read": read_imagenet, "classes": 1000, "size": None, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "pad": 0, "hflip": 0.5, "jitter": 0.4},
    "imagefolder": {"read": read_imagefolder, "classes": None, "size": None, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "pad": 0, "hflip": 0.5, "jitter": 0.4},
    "synthetic": {"read": read_synthetic, "classes": None, "size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3, "pad": 4, "hflip": 0.5, "jitter": 0.0},
}  # fmt: skip
