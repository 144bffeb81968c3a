"""Images in class folders, or in a tar of class folders."""

import io
import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from tq_lightning.data.images import (
    SUFFIXES,
    UNREAD,
    LeftOut,
    UnreadableImage,
    escape_undecodable,
    is_hidden,
    list_images,
    read_image,
    report,
)
from tq_lightning.data.split_folders import SPLIT_NAMES
from tq_lightning.data.tar import Member, list_tar
from tq_lightning.errors import UserError


class ImageFiles:
    """Images of a folder or tar by index.

    Args:
        root: the folder or tar.
        names: path of each image in it.
        labels: class index of each image.
        members: byte range of each image in a tar; None for a folder.
    """

    def __init__(
        self, root: Path, names: list[str], labels: list[int], members: list[Member] | None
    ) -> None:
        self.root, self.names, self.labels, self.members = root, names, labels, members

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        """Read (PIL image in RGB, class index).

        Raises:
            UnreadableImage: the image can't be decoded. The message names it.
        """
        try:
            return read_image(self._open(number)), self.labels[number]
        except (UnreadableImage, OSError) as error:
            raise UnreadableImage(escape_undecodable(f"{self.names[number]} {error}")) from error

    def _open(self, number: int) -> Path | io.BytesIO:
        if self.members is None:
            return self.root / self.names[number]
        offset, size = self.members[number]
        # opened for each image, because worker processes would share the position of an open file
        with open(self.root, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


def open_images(
    path: Path, index: dict[str, int] | None = None
) -> tuple[list[str], Tensor, ImageFiles]:
    """Index the images of a folder or tar by class, without decoding them.

    The class of an image is the name of its parent folder. Other files are skipped, and one line on
    standard error counts them.

    Args:
        path: folder or .tar with <class>/<image> inside, at any depth.
        index: class index by name. None numbers the classes in natural order.

    Returns:
        Class names by index, labels (N,) int64, and the images in natural order of their paths.

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
    lost = sorted(left_out.folders.get(UNREAD, set()) - set(names))
    if lost:
        raise _error(
            f"{path} has {len(lost)} class folders of {UNREAD} ({left_out.examples[UNREAD]}): "
            "convert them to PNG or JPEG"
        )
    if index is None:
        if len(names) == 1:
            raise _error(
                f"{path} has a single class ({names[0]}): put the images of each class in a "
                "separate folder"
            )
        index = {name: number for number, name in enumerate(names)}
    unknown = [name for name in names if name not in index]
    if unknown:
        raise _error(
            f"{path} has {len(unknown)} class folders that are not among the {len(index)} "
            f"expected classes ({', '.join(unknown[:3])}): unpack it again; for other classes, "
            "pass data.name=imagefolder and a data.root with a training split of them"
        )
    if left_out.counts:
        report(f"{path}: {len(paths)} images of {len(names)} classes; {left_out}")
    _report_merged(path, paths)
    labels = [index[p.parent.name] for p in paths]
    places = None if members is None else [members[p] for p in paths]
    files = ImageFiles(path, [str(p) for p in paths], labels, places)
    return sorted(index, key=index.__getitem__), torch.tensor(labels), files


def _report_merged(path: Path, paths: list[PurePosixPath]) -> None:
    """Print a line if images of several folders form one class, because its name is the last part.

    This is right for part1/cat and part2/cat, and wrong for cat/2023 and dog/2023.
    """
    folders: dict[str, set[str]] = {}
    for folder in {image.parent for image in paths}:
        folders.setdefault(folder.name, set()).add(str(folder))
    merged = [name for name in folders if len(folders[name]) > 1]
    if merged:
        example = " and ".join(sorted(folders[merged[0]], key=_natural_key)[:2])
        report(
            f"{path}: {len(merged)} classes have images in several folders, e.g. {merged[0]} in "
            f"{example}: the innermost folder is the class"
        )


def class_names(path: Path) -> list[str]:
    """Return the names of the class folders with images in a folder or tar, in natural order."""
    return _class_names(_scan(path)[0])


def _class_names(paths: list[PurePosixPath]) -> list[str]:
    return sorted({path.parent.name for path in paths}, key=_natural_key)


def _scan(
    path: Path,
) -> tuple[list[PurePosixPath], dict[PurePosixPath, Member] | None, LeftOut]:
    """List the images in class folders in natural order, their places in a tar, skipped files."""
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
    return UserError(escape_undecodable(message))


def _natural_key(text: str) -> tuple[list[Any], str]:
    """Return a sort key that compares digits as numbers: "img2" before "img10".

    The text itself orders names that are equal otherwise, such as Cat and cat, or a1 and a01.
    """
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text


def _check_empty_folders(path: Path) -> None:
    folders = [f for f in sorted(path.iterdir()) if f.is_dir() and not is_hidden((f.name,))]
    empty = [f.name for f in folders if all(is_hidden((entry.name,)) for entry in f.iterdir())]
    if empty:
        raise _error(
            f"{path} has {len(empty)} empty class folders ({', '.join(empty[:3])}): unpack it again"
        )


def _in_class_folders(
    root: Path, paths: list[PurePosixPath], left_out: LeftOut
) -> list[PurePosixPath]:
    """Return the images in class folders. Images next to the class folders are skipped."""
    depth = 0
    tops = {p.parts[0] for p in paths if len(p.parts) > 1}
    if len(tops) == 1:
        top = tops.pop()
        # a single folder that contains all class folders
        if any(len(p.parts) > 2 for p in paths) or top in SPLIT_NAMES | {root.stem}:
            depth = 1
    kept = []
    for p in paths:
        if len(p.parts) > depth + 1:
            kept.append(p)
        else:
            left_out.add("not in a class folder", p)
    return kept
