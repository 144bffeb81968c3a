"""Index of WebDataset shards: shard, position, size and label of every image.

The shards are indexed once, and the index is stored next to them.
"""

import hashlib
import json
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from tq_lightning.data.images import SUFFIXES, LeftOut, escape_undecodable, reason_to_skip, report
from tq_lightning.data.tar import BoundedFile, check_end, check_not_compressed
from tq_lightning.errors import UserError, message_of
from tq_lightning.files import atomic_write

VERSION = 2  # version of the cached index
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
        report(f"{shards[0].parent}: {len(rows)} images in {len(shards)} shards; {left_out}")
    *numbers, keys = zip(*rows, strict=True)
    number_of, offset, size, label = (np.array(n, np.int64) for n in numbers)
    return ShardIndex(number_of, offset, size, label, np.array(keys))


def _index_shard(shard: Path, left_out: LeftOut) -> list[tuple[int, int, int, str]]:
    """List (offset, size, label, name) of the labeled images of a shard, in file order.

    As in an unpacked tar, the last member of a name counts. KEY.cls precedes KEY.json.
    """
    images: dict[str, tuple[int, int, str]] = {}
    found: dict[str, dict[str, int]] = {"json": {}, "cls": {}}
    broken: set[str] = set()
    total = shard.stat().st_size
    check_not_compressed(shard)
    try:
        with (
            open(shard, "rb") as raw,
            tarfile.open(fileobj=(file := BoundedFile(raw, total)), mode="r:") as tar,  # type: ignore[call-overload]
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
                    if key in images:
                        replaced = PurePosixPath(shard.name, images[key][2])
                        left_out.add("replaced by a later image of the same key", replaced)
                    images[key] = (info.offset_data, info.size, info.name)
                elif extension in found:
                    label = _label(tar.extractfile(info).read(1 << 20), extension)  # type: ignore[union-attr]
                    found[extension].pop(key, None)
                    if label is None:
                        broken.add(key)
                    else:
                        found[extension][key] = label
                elif reason_to_skip(PurePosixPath(base)) is None:
                    left_out.add("with several extensions", PurePosixPath(shard.name, info.name))
            check_end(file, tar.offset, total)
    except (OSError, EOFError, ValueError, OverflowError, tarfile.TarError) as error:
        reason = message_of(error, 100)
        raise UserError(
            escape_undecodable(f"shard {shard} can't be read to its end ({reason}); copy it again")
        ) from error
    rows, labels = [], found["json"] | found["cls"]
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
            value: Any = content.decode("ascii")
        else:
            found = json.loads(content)
            value = next(found[key] for key in JSON_LABELS if key in found)
        if isinstance(value, bool) or "_" in str(value):  # int() reads 1_0 as 10
            return None
        if not 0 <= int(value) < MAX_LABEL:
            return None
        return int(value) if float(value) == int(value) else None
    except (ValueError, TypeError, OverflowError, StopIteration, RecursionError):
        return None
