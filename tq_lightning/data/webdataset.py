"""WebDataset shards on disk: `data.name: wds`, tars of KEY.jpg with KEY.cls or KEY.json.

The shards are indexed once, and images are then read by index, as from a folder. Shuffling, exact
resume, several processes and held-out samples work as for every other data set.
"""

import hashlib
import io
import json
import re
import sys
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tq_lightning.data.image_folder import SPLITS
from tq_lightning.data.images import (
    SUFFIXES,
    LeftOut,
    UnreadableImage,
    escape_undecodable,
    is_hidden,
    read_image,
)
from tq_lightning.data.splits import Source, Split
from tq_lightning.data.tar import BoundedFile, check_not_compressed
from tq_lightning.errors import UserError, message_of
from tq_lightning.files import atomic_write

VERSION = 1  # version of the cached index
JSON_LABELS = ("label", "cls")  # keys of the class index in KEY.json
MAX_LABEL = 2**20  # larger numbers are not class indices and would create too many classes


class ShardIndex(NamedTuple):
    """Location and label of every image.

    Attributes:
        shards: (images,) int64, index of the shard.
        offsets: (images,) int64, first byte in the shard.
        sizes: (images,) int64, bytes.
        labels: (images,) int64, class indices.
        keys: (images,) str, KEY.ext.
    """

    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    keys: np.ndarray


def read_wds(source: Source, split: str) -> Split | None:
    """Open the shards of a split: ROOT/SPLIT/*.tar, or tars of ROOT with the split in their name.

    Tars of ROOT without the name of any split are the training split. Class names are read from
    ROOT/classes.txt, one per line; without this file, they are class indices.

    Raises:
        UserError: there are no shards, a shard is damaged, or no image has a label.
    """
    if not source.root.is_dir():
        raise UserError(f"no data at {source.root.absolute()}: data.root must contain .tar shards")
    shards = find_shards(source.root, split)
    if not shards:
        if split == "train":
            raise UserError(f"no .tar shards in {source.root.absolute()}; pass another data.root")
        return None
    if source.index is None and split != "train":
        read_wds(source, "train")  # the training split defines the classes
    index = cached_index(shards)
    return Split(
        _classes(source, index, split), torch.from_numpy(index.labels), read=Shards(shards, index)
    )


def find_shards(root: Path, split: str) -> list[Path]:
    """List the shards of a split, sorted by name; hidden files are not shards.

    Raises:
        UserError: the name of a shard of `root` contains two splits, or the split is in several
            places, of which one may be outdated.
    """
    folders = [folder for name in SPLITS[split] if _list_tars(folder := root / name)]
    tars = _list_tars(root)
    names = {split: set(names) for split, names in SPLITS.items()}
    words = {tar: set(re.split(r"[^a-z]+", tar.stem.lower())) for tar in tars}
    for tar in tars:
        found = [name for name in names if words[tar] & names[name]]
        if len(found) > 1:
            raise UserError(
                escape_undecodable(
                    f"shard {tar}: its name contains the splits {' and '.join(found)}; move the "
                    f"shards to {root / found[0]}/ and {root / found[1]}/"
                )
            )
    named = [tar for tar in tars if words[tar] & names[split]]
    places = [*(f"{folder.name}/" for folder in folders), *(tar.name for tar in named[:1])]
    if len(places) > 1:
        raise UserError(
            escape_undecodable(
                f"{root} has {split} shards in several places ({', '.join(places)}); move all but "
                "one elsewhere"
            )
        )
    if folders:
        return _list_tars(folders[0])
    if not named and split == "train":
        every = set().union(*names.values())
        return [tar for tar in tars if not words[tar] & every]
    return named


def _list_tars(folder: Path) -> list[Path]:
    return sorted(tar for tar in folder.glob("*.tar") if not is_hidden((tar.name,)))


def _read_names(file: Path) -> list[str]:
    """Read class names, one per line; an empty list without the file.

    Raises:
        UserError: the file is not UTF-8, or two classes have the same name.
    """
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} can't be read ({message_of(error, 100)}); save it as UTF-8"
        ) from None
    names = [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
    for number, name in enumerate(names):
        if not name:
            raise UserError(f"{file}: line {number + 1} is empty; pass the name of class {number}")
        if names.index(name) != number:
            raise UserError(
                f"{file}: the classes {names.index(name)} and {number} have the same name, "
                f"{name[:60]!r}; pass different names"
            )
    return names


def _classes(source: Source, index: ShardIndex, split: str) -> list[str]:
    known = _read_names(source.root / "classes.txt")
    if source.index is None:
        count = max(int(index.labels.max()) + 1, source.num_classes or 0, len(known))
        source.index = {(known[n] if n < len(known) else str(n)): n for n in range(count)}
    if int(index.labels.max()) >= len(source.index):
        raise UserError(
            f"the {split} shards in {source.root} have the class index {index.labels.max()}, but "
            f"there are {len(source.index)} classes; pass data.num_classes"
        )
    return sorted(source.index, key=source.index.__getitem__)


class Shards:
    """Images of shards by index."""

    def __init__(self, shards: list[Path], index: ShardIndex) -> None:
        self.shards, self.index = shards, index

    def __call__(self, number: int) -> tuple[Any, int]:
        """Read (PIL image in RGB, class index).

        Raises:
            UnreadableImage: the image can't be decoded. The message names it and its shard.
        """
        index = self.index
        shard = self.shards[index.shards[number]]
        try:
            # opened for each image, because worker processes would share the position of a file
            with open(shard, "rb") as file:
                file.seek(int(index.offsets[number]))
                content = io.BytesIO(file.read(int(index.sizes[number])))
            return read_image(content), int(index.labels[number])
        except (UnreadableImage, OSError) as error:
            raise UnreadableImage(
                escape_undecodable(f"{index.keys[number]} in {shard.name} {error}")
            ) from error


def cached_index(shards: list[Path]) -> ShardIndex:
    """Read the cached index of shards, or create it and store it next to them.

    The index is created again if the size or modification time of a shard changes, and by every
    run if the folder is read-only.
    """
    for shard in shards:
        if not shard.is_file():  # opening a FIFO would wait forever
            raise UserError(
                escape_undecodable(f"shard {shard} is not a regular file; move it elsewhere")
            )
    stats = [(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
    identity = json.dumps([VERSION, stats])
    digest = hashlib.sha256("\n".join(s.name for s in shards).encode()).hexdigest()[:12]
    path = shards[0].parent / f".tq_lightning-{digest}.npz"
    damaged = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)
    with suppress(*damaged), np.load(path, allow_pickle=False) as file:
        if str(file["identity"]) == identity:
            return ShardIndex(*(file[name] for name in ShardIndex._fields))
    index = index_shards(shards)
    with (
        suppress(OSError, UserError),
        atomic_write(path) as temporary,
        open(temporary, "wb") as out,
    ):
        np.savez(out, identity=np.array(identity), **index._asdict())  # type: ignore[arg-type]
    return index


def index_shards(shards: list[Path]) -> ShardIndex:
    """List the images of shards with their labels. One line counts skipped members.

    Raises:
        UserError: a shard is damaged, or no image has a label.
    """
    left_out = LeftOut()
    rows: list[tuple[int, int, int, int, str]] = []
    for number, shard in enumerate(shards):
        rows += [(number, *row) for row in _index_shard(shard, left_out)]
    if not rows:
        reason = f" ({left_out})" if left_out.counts else ""
        raise UserError(
            f"no image in {shards[0].parent} has a label{reason}; pass shards with KEY.jpg "
            f"and KEY.cls, or KEY.json with one of the keys {', '.join(JSON_LABELS)}"
        )
    if left_out.counts:
        _print(f"{shards[0].parent}: {len(rows)} images in {len(shards)} shards; {left_out}")
    *numbers, keys = zip(*rows, strict=True)
    number_of, offset, size, label = (np.array(n, np.int64) for n in numbers)
    return ShardIndex(number_of, offset, size, label, np.array(keys))


@rank_zero_only
def _print(line: str) -> None:
    print(escape_undecodable(line), file=sys.stderr, flush=True)


def _index_shard(shard: Path, left_out: LeftOut) -> list[tuple[int, int, int, str]]:
    """List (offset, size, label, name) of the labeled images of a shard, in file order."""
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    broken: set[str] = set()
    total = shard.stat().st_size
    check_not_compressed(shard)
    try:
        with (
            open(shard, "rb") as raw,
            tarfile.open(fileobj=BoundedFile(raw, total), mode="r:") as tar,  # type: ignore[call-overload]
        ):
            for info in tar:
                folder, _, base = info.name.rpartition("/")
                key, _, extension = base.partition(".")
                key, extension = f"{folder}/{key}", extension.lower()
                if info.offset_data + info.size > total:
                    raise tarfile.ReadError(f"{info.name[:60]!r} extends beyond its end")
                if not info.isreg():
                    continue
                if f".{extension}" in SUFFIXES:
                    images[key] = (info.offset_data, info.size, info.name)
                elif extension in ("cls", "json"):
                    label = _label(tar.extractfile(info).read(1 << 20), extension)  # type: ignore[union-attr]
                    if label is None:
                        broken.add(key)
                    elif key not in labels or extension == "cls":
                        labels[key] = label
    except (OSError, EOFError, ValueError, OverflowError, tarfile.TarError) as error:
        reason = message_of(error, 100)
        raise UserError(
            escape_undecodable(f"shard {shard} can't be read to its end ({reason}); copy it again")
        ) from error
    rows = []
    for key, (offset, size, name) in images.items():
        if key in labels:
            rows.append((offset, size, labels[key], name))
        else:
            why = "with a label that can't be read" if key in broken else "without a label"
            left_out.add(why, PurePosixPath(shard.name, name))
    for key in labels.keys() - images.keys():
        left_out.add("labels without an image", PurePosixPath(shard.name, key.lstrip("/")))
    return rows


def _label(content: bytes, extension: str) -> int | None:
    try:
        if extension == "cls":
            value: Any = int(content)  # as the webdataset package decodes it
        else:
            found = json.loads(content)
            value = next(found[key] for key in JSON_LABELS if key in found)
        if isinstance(value, bool) or not 0 <= int(value) < MAX_LABEL:
            return None
        return int(value) if float(value) == int(value) else None
    except (ValueError, TypeError, OverflowError, StopIteration, RecursionError):
        return None
