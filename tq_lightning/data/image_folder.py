"""Data sets of image files: class folders, tars of class folders, and torchvision's CIFAR files."""

import io
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from tq_lightning.data.images import (
    SUFFIXES,
    LeftOut,
    UnreadableImage,
    is_hidden,
    list_images,
    printable,
    read_image,
)
from tq_lightning.data.tar import Member, list_tar
from tq_lightning.errors import UserError

# file and folder names of each split
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
_SPLIT_NAMES = {name for names in SPLITS.values() for name in names}


class ImageFiles:
    """Images of a folder or tar by number.

    Args:
        root: the folder or tar.
        names: path of each image in it.
        labels: class number of each image.
        members: place of each image in a tar, None for a folder.
    """

    def __init__(
        self, root: Path, names: list[str], labels: list[int], members: list[Member] | None
    ) -> None:
        self.root, self.names, self.labels, self.members = root, names, labels, members

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        """Read (PIL image in RGB, class number).

        Raises:
            UnreadableImage: the image can't be decoded. The message names it.
        """
        try:
            return read_image(self._open(number)), self.labels[number]
        except (UnreadableImage, OSError) as error:
            raise UnreadableImage(printable(f"{self.names[number]} {error}")) from error

    def _open(self, number: int) -> Path | io.BytesIO:
        if self.members is None:
            return self.root / self.names[number]
        offset, size = self.members[number]
        # opened for each image: worker processes that share one open file would move each
        # other's position in it
        with open(self.root, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


def find_split(root: Path, split: str) -> Path | None:
    """Find the .tar or folder of a split under `root`."""
    for name in SPLITS[split]:
        for path in (root / f"{name}.tar", root / name):
            if path.exists():
                return path
    return None


def is_flat(root: Path) -> bool:
    """Check if `root` is a set without splits: it holds class folders, or is a tar of them."""
    if root.is_file():
        return root.suffix == ".tar"
    return (
        root.is_dir()
        and not any(find_split(root, split) for split in SPLITS)
        and any(path.is_dir() for path in root.iterdir())
    )


def missing(root: Path, *splits: str) -> str:
    """Error message for splits that were not found under `root`."""
    at = root.absolute()
    if not root.exists():
        return (
            f"no data at {at}: data.root must hold train/ or train.tar with one folder of images "
            "per class"
        )
    looked = ", ".join(f"{name}/, {name}.tar" for split in splits for name in SPLITS[split])
    return (
        f"no {splits[0]} split in {at}: looked for {looked}; unpack the data set there, or pass "
        "another data.root"
    )


def open_images(
    path: Path, index: dict[str, int] | None = None
) -> tuple[list[str], Tensor, ImageFiles]:
    """Index the images of a folder or tar by class, without decoding them.

    The class of an image is the name of the folder that it is in. Files that are not images of a
    class are left out, and one line on standard error counts them.

    Args:
        path: folder or .tar with <class>/<image> inside, at any depth.
        index: class number by name. None numbers the classes that are found, in natural order.

    Returns:
        Class names by number, labels (N,) int64, and the images in natural order of their paths.

    Raises:
        UserError: no images or a single class, a damaged tar, an empty class folder, or a class
            that is not in `index`.
    """
    paths, members, left_out = _scan(path)
    names = _class_names(paths)
    if not paths:
        reason = f" ({left_out})" if left_out.counts else ""
        raise _error(
            f"no images in {path}{reason}: looked for <class>/<name> with {', '.join(SUFFIXES)}; "
            "unpack the data set there, or pass data.root"
        )
    if index is None:
        if len(names) == 1:
            raise _error(
                f"{path} has a single class ({names[0]}): put the images of each class in a "
                "folder of their own"
            )
        index = {name: number for number, name in enumerate(names)}
    unknown = [name for name in names if name not in index]
    if unknown:
        raise _error(
            f"{path} has {len(unknown)} class folders that are not among the {len(index)} "
            f"expected classes ({', '.join(unknown[:3])}): unpack it again, or pass "
            "data.name=imagefolder for a set with its own classes"
        )
    if left_out.counts:
        _report(f"{path}: {len(paths)} images of {len(names)} classes; {left_out}")
    labels = [index[p.parent.name] for p in paths]
    places = None if members is None else [members[p] for p in paths]
    files = ImageFiles(path, [str(p) for p in paths], labels, places)
    return sorted(index, key=index.__getitem__), torch.tensor(labels), files


def class_names(path: Path) -> list[str]:
    """Names of the class folders in a folder or tar that have images, in natural order."""
    return _class_names(_scan(path)[0])


def _class_names(paths: list[PurePosixPath]) -> list[str]:
    return sorted({path.parent.name for path in paths}, key=_natural_key)


def _scan(
    path: Path,
) -> tuple[list[PurePosixPath], dict[PurePosixPath, Member] | None, LeftOut]:
    """Images in class folders in natural order, their places in a tar, and what is left out."""
    members: dict[PurePosixPath, Member] | None = None
    if path.is_file():
        members, left_out = list_tar(path)
        paths = list(members)
    elif path.is_dir():
        _check_empty_folders(path)
        paths, left_out = list_images(path)
    else:
        raise _error(f"{path} is neither a folder nor a regular file; pass another data.root")
    kept = _in_class_folders(path, paths, left_out)
    return sorted(kept, key=lambda p: _natural_key(str(p))), members, left_out


def _error(message: str) -> UserError:
    return UserError(printable(message))


@rank_zero_only
def _report(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def _natural_key(text: str) -> list[Any]:
    """Sort key that compares digits as numbers: "img2" before "img10"."""
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _check_empty_folders(path: Path) -> None:
    folders = [f for f in sorted(path.iterdir()) if f.is_dir() and not is_hidden((f.name,))]
    empty = [f.name for f in folders if not any(f.iterdir())]
    if empty:
        raise _error(
            f"{path} has {len(empty)} empty class folders ({', '.join(empty[:3])}): unpack it again"
        )


def _in_class_folders(
    root: Path, paths: list[PurePosixPath], left_out: LeftOut
) -> list[PurePosixPath]:
    """The images that are in a class folder. Those beside the class folders are left out."""
    depth = 0
    tops = {p.parts[0] for p in paths if len(p.parts) > 1}
    if len(tops) == 1:
        top = tops.pop()
        # a single folder that holds all the class folders
        if any(len(p.parts) > 2 for p in paths) or top in _SPLIT_NAMES | {root.stem}:
            depth = 1
    kept = []
    for p in paths:
        if len(p.parts) > depth + 1:
            kept.append(p)
        else:
            left_out.add("not in a class folder", str(p))
    return kept


def decode_all(path: Path, size: int) -> tuple[list[str], Tensor, Tensor]:
    """Decode every image of a folder or tar into memory.

    Args:
        path: folder or .tar, see `open_images`.
        size: expected width and height of the images.

    Returns:
        Class names by number, labels (N,) int64, and pixels (N, 3, size, size) uint8.

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
            raise _error(
                f"{path}: {files.names[n]} is {image.width}x{image.height}, expected "
                f"{size}x{size}; use data.name=imagefolder"
            )
        pixels[n] = np.asarray(image)
    return classes, labels, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def torchvision_cifar(
    root: Path, classes: int, train: bool, download: bool
) -> tuple[list[str], Tensor, Tensor]:
    """Read CIFAR-10 or CIFAR-100 from torchvision's files, downloading them if allowed.

    Args:
        root: folder that holds, or gets, torchvision's folder.
        classes: 10 or 100.
        train: the training split, else the test split.
        download: fetch the files if they are not found.

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
            raise UserError(
                f"no {name}, and the download failed ({error}): {looked}; pass data.root"
            ) from error
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return list(data.classes), torch.tensor(data.targets), pixels
