"""Data sets by name. To add one, write a reader and add a row to `DATASETS`."""

from typing import Any

import torch
import torch.nn.functional as F

from tq_lightning.data.cifar import read_cifar10, read_cifar100
from tq_lightning.data.hfds import read_hfds
from tq_lightning.data.image_folder import open_images
from tq_lightning.data.sampling import generator, stratified
from tq_lightning.data.split_folders import SPLITS, find_split, is_flat, missing
from tq_lightning.data.splits import Source, Split
from tq_lightning.data.webdataset import read_wds
from tq_lightning.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_digits(source: Source, split: str) -> Split | None:
    """Read scikit-learn's 1,797 handwritten digits, 8x8 gray, as 3 equal channels.

    A fixed fifth, balanced over the classes, is the test split.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()
    gray = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)
    pixels = gray[:, None].expand(-1, 3, -1, -1)
    test = torch.zeros(labels.numel(), dtype=torch.bool)
    test[stratified(labels, 360)] = True
    part = {"train": ~test, "test": test}.get(split)
    if part is None:
        return None
    return Split([str(d) for d in range(10)], labels[part], pixels[part].contiguous())


def read_synthetic(source: Source, split: str) -> Split:
    """Generate learnable images: a smooth pattern per class, shifted, dimmed, with noise.

    Images are stored at 32x32 or less and scaled up on the device, so a data set at 224 pixels
    takes no more memory than one at 32. The validation and test splits each have a quarter of the
    number of training samples.
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
    moved = pattern[labels[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    moved = moved.permute(0, 3, 1, 2)
    gain = 0.6 + 0.4 * torch.rand(count, 1, 1, 1, generator=draw)
    noisy = moved * gain + 0.15 * torch.randn(moved.shape, generator=draw)
    pixels = (noisy.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    return Split([f"class{c}" for c in range(classes)], labels, pixels)


def read_imagefolder(source: Source, split: str) -> Split | None:
    """Read class folders or tars of images. The training split defines the classes."""
    if source.index is None and split != "train":
        read_imagefolder(source, "train")
    return _read_files(source, split)


def read_imagenet(source: Source, split: str) -> Split | None:
    """Read ImageNet-1k from folders named by WordNet id, with the standard 1,000 class indices.

    The indices do not change if only some of the classes are present.
    """
    from timm.data.imagenet_info import ImageNetInfo

    names = ImageNetInfo("imagenet-1k").label_names()
    source.index = {name: number for number, name in enumerate(names)}
    return _read_files(source, split)


def _read_files(source: Source, split: str) -> Split | None:
    if split not in source.files:
        source.files[split] = _index_files(source, split)
    return source.files[split]


def _index_files(source: Source, split: str) -> Split | None:
    root = source.root
    flat = is_flat(root)
    path = find_split(root, split)
    if path is None and split == "train" and flat:
        path = root
    if path is None:
        if not flat and not any(find_split(root, s) for s in SPLITS):
            raise UserError(missing(root, split))
        return None
    classes, labels, files = open_images(path, source.index)
    source.index = {name: number for number, name in enumerate(classes)}
    return Split(classes, labels, read=files.__getitem__)


# One row per data set:
#   read: (source, split) -> Split, or None if the data set does not have the split
#   classes: number of classes, None if it depends on the files or the configuration
#   size: height and width in pixels; None for image files, which are resized to data.image_size
#   mean, std: per channel, of images in 0..1
#   pad: black border of the random crop in pixels
#   hflip: probability of mirroring
#   jitter: timm's color jitter
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
        "read": read_digits,
        "classes": 10,
        "size": 8,
        "mean": (0.305,) * 3,
        "std": (0.376,) * 3,
        "pad": 1,
        "hflip": 0.0,
        "jitter": 0.0,
    },
    "cifar10": {
        "read": read_cifar10,
        "classes": 10,
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        **_SMALL,
    },
    "cifar100": {
        "read": read_cifar100,
        "classes": 100,
        "mean": (0.5071, 0.4865, 0.4409),
        "std": (0.2673, 0.2564, 0.2762),
        **_SMALL,
    },
    "imagenet": {"read": read_imagenet, "classes": 1000, **_FILES},
    "imagefolder": {"read": read_imagefolder, "classes": None, **_FILES},
    "hfds": {"read": read_hfds, "classes": None, **_FILES},
    "wds": {"read": read_wds, "classes": None, **_FILES},
    "synthetic": {
        "read": read_synthetic,
        "classes": None,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        **_SMALL,
    },
}
