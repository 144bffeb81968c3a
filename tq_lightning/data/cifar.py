"""CIFAR-10 and CIFAR-100 in memory: from images in folders or tars, or torchvision's files."""

from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from tq_lightning.data.image_folder import class_names, open_images
from tq_lightning.data.images import UnreadableImage, escape_undecodable
from tq_lightning.data.split_folders import find_split, missing
from tq_lightning.data.splits import Source, Split
from tq_lightning.errors import UserError


def read_cifar10(source: Source, split: str) -> Split | None:
    """Read CIFAR-10, see `read_cifar`."""
    return read_cifar(source, split, 10)


def read_cifar100(source: Source, split: str) -> Split | None:
    """Read CIFAR-100, see `read_cifar`."""
    return read_cifar(source, split, 100)


def read_cifar(source: Source, split: str, classes: int) -> Split | None:
    """Read CIFAR from <split>.tar or <split>/ under root, or torchvision's files, or download it.

    Raises:
        UserError: the number of classes is wrong, the classes of two splits differ, or a split is
            missing.
    """
    root = source.root
    if (path := find_split(root, split)) is not None:
        names, labels, pixels = decode_all(path, 32)
        if len(names) != classes:
            raise UserError(
                f"{path} has images of {len(names)} classes ({', '.join(names[:3])}, ...), "
                f"cifar{classes} has {classes}; unpack it again, or pass data.name=imagefolder"
            )
        _check_same_classes(path, names, root)
        return Split(names, labels, pixels)
    if split == "val":
        return None
    other = find_split(root, "test" if split == "train" else "train")
    if other is not None:  # the splits must come from the same source
        raise UserError(f"found {other}, but {missing(root, split)}")
    return Split(*torchvision_cifar(root, classes, split == "train", source.download))


def _check_same_classes(path: Path, names: list[str], root: Path) -> None:
    """Compare class names with those of the training split: class indices follow their order."""
    train = find_split(root, "train")
    if train is None or train == path:
        return
    expected = class_names(train)
    if names != expected:
        differing = next(
            (a, b) for a, b in zip_longest(names, expected, fillvalue="none") if a != b
        )
        raise UserError(
            f"{path} and {train} have different classes ({differing[0]} and {differing[1]}); "
            "use the same names for the class folders"
        )


def decode_all(path: Path, size: int) -> tuple[list[str], Tensor, Tensor]:
    """Decode every image of a folder or tar into memory.

    Args:
        path: folder or .tar, see `open_images`.
        size: expected width and height of the images.

    Returns:
        Class names by index, labels (N,) int64, and pixels (N, 3, size, size) uint8.

    Raises:
        UserError: see `open_images`; an image is damaged or has another size.
    """
    import numpy as np

    classes, labels, files = open_images(path)
    pixels = np.empty((len(files), size, size, 3), np.uint8)
    for n in range(len(files)):
        try:
            image, _ = files[n]
        except UnreadableImage as error:
            raise UserError(f"{path}: {error}; copy or unpack the data set again") from error
        if image.size != (size, size):
            raise UserError(
                escape_undecodable(
                    f"{path}: {files.names[n]} is {image.width}x{image.height}, expected "
                    f"{size}x{size}; use data.name=imagefolder"
                )
            )
        pixels[n] = np.asarray(image)
    return classes, labels, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def torchvision_cifar(
    root: Path, classes: int, train: bool, download: bool
) -> tuple[list[str], Tensor, Tensor]:
    """Read CIFAR-10 or CIFAR-100 from torchvision's files, downloading them if allowed.

    Args:
        root: folder that contains torchvision's folder, or receives it.
        classes: 10 or 100.
        train: True for the training split, False for the test split.
        download: download the files if they are not found.

    Returns:
        See `decode_all`.

    Raises:
        UserError: the files are not found, or the download failed.
    """
    import torchvision

    factory = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[classes]
    name, at = f"cifar{classes}", root.absolute()
    looked = (
        f"looked in {at} for train.tar and test.tar, train/ and test/, and torchvision's "
        f"{factory.base_folder}/"
    )
    try:
        data = factory(str(root), train=train, download=False)
    except RuntimeError as absent:
        if not download:
            raise UserError(
                f"no {name}: {looked}; pass data.root, or data.download=true to fetch it"
            ) from absent
        print(f"no {name} yet ({looked}): downloading {factory.url}", flush=True)
        try:
            data = factory(str(root), train=train, download=True)
        except Exception as error:  # urllib, ssl, socket, tar or disk errors
            with suppress(OSError):  # only an empty folder, which torchvision has made
                root.rmdir()
            raise UserError(
                f"no {name}, and the download failed ({error}): {looked}; pass data.root"
            ) from error
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return list(data.classes), torch.tensor(data.targets), pixels
