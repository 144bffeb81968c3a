"""The container of a packed file: safetensors, written atomically, read by byte range, checked before it is believed.

A file is 8 bytes (length of the header, little endian), the header (JSON), the data. Tensors lie in the order in which
safetensors itself writes them: by type, wide ones first, then by name. What stands before the first "/" of a name is the
tensor's section; a section is one run of bytes with one SHA-256. The header holds a SHA-256 of itself, taken with zeros
in its own place. docs/format.md is the specification.
"""

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write

FORMAT = "tq_packed"
VERSION = 1
# safetensors' own order of the types that a packed file uses, and NumPy's name of each
DTYPES = {"I64": "<i8", "F64": "<f8", "F32": "<f4", "U8": "|u1"}
MAX_HEADER = 64 << 20  # bytes; a header is kilobytes, this only stops an absurd one
_NO_SUM = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its type, its shape, and its bytes [begin, end) counted from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def section_of(name: str) -> str:
    """The section a tensor belongs to: "float" of "float/conv1.weight", "plane0" of "plane0"."""
    return name.split("/", 1)[0]


def write_container(
    path: str | Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, Any]
) -> int:
    """Writes a whole file or nothing: to a temporary file beside `path`, synced, then renamed over it.

    Args:
        path: the file; its folder must exist.
        tensors: name -> array of int64, float64, float32 or uint8.
        header: what a reader must know, JSON values; checksums and version are added here.

    Returns:
        Bytes written.

    Raises:
        UserError: no such folder, or the file cannot be written.
    """
    kinds = {np.dtype(code): kind for kind, code in DTYPES.items()}
    rank = list(DTYPES)
    order = sorted(tensors, key=lambda name: (rank.index(kinds[tensors[name].dtype]), name))
    index: dict[str, Any] = {}
    sums: dict[str, Any] = {}
    at = 0
    for name in order:
        array = tensors[name]
        index[name] = {
            "dtype": kinds[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
        sums.setdefault(section_of(name), hashlib.sha256()).update(_bytes(array))
    content = {
        **header,
        "checksums": {section: digest.hexdigest() for section, digest in sums.items()},
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "header": json.dumps(content, sort_keys=True, allow_nan=False),
        "header_sha256": _NO_SUM,
    }
    raw = json.dumps({"__metadata__": metadata, **index}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256(raw).hexdigest().encode()
    raw = raw.replace(
        f'"header_sha256":"{_NO_SUM}"'.encode(), b'"header_sha256":"' + digest + b'"', 1
    )
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.writelines(
            [len(raw).to_bytes(8, "little"), raw, *(_bytes(tensors[name]) for name in order)]
        )
    return 8 + len(raw) + at


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


class Container:
    """An open file: its header is read and checked, its sections are read, and checked, when asked for.

    Attributes:
        header: what `write_container` was given, with "checksums".
        entries: name -> `Entry`, in file order.
        size: bytes of the file; data_start: bytes before the data; bytes_read: bytes of it used so far.

    Raises:
        UserError: not a packed file, a newer version, or one that is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self._map = (
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
                )
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot open {path} ({getattr(error, 'strerror', None) or error})"
            ) from error
        try:
            self._parse()
        except UserError:
            self.close()
            raise

    def __enter__(self) -> "Container":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._map is not None:
            try:
                self._map.close()
            except BufferError:  # an array still looks at it; the mapping goes when that does
                self._map = None

    def _parse(self) -> None:
        data = self._map or b""
        length = int.from_bytes(data[:8], "little")
        if self.size < 8 or length > MAX_HEADER or length > self.size - 8:
            raise UserError(
                f"{self.path} is no packed file, or only a part of one; write it with `export`"
            )
        raw = data[8 : 8 + length]
        try:
            content = json.loads(raw.decode(), object_pairs_hook=_unique)
            metadata = content.pop("__metadata__")
            kind, version = metadata["format"], metadata["format_version"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.path} is no packed file of tq_lightning; write one with `export`"
            ) from error
        if kind != FORMAT:
            raise UserError(
                f"{self.path} is of format {str(kind)[:40]!r}, not {FORMAT!r}; write it with `export`"
            )
        if version != str(VERSION):
            hint = "update tq_lightning, or export the model again"
            raise UserError(
                f"{self.path} is of format version {str(version)[:20]!r}; this reader knows {VERSION}; {hint}"
            )
        digest = metadata.get("header_sha256")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise self.damaged("its header has no checksum")
        blank = raw.replace(
            b'"header_sha256":"' + digest.encode() + b'"',
            f'"header_sha256":"{_NO_SUM}"'.encode(),
            1,
        )
        if hashlib.sha256(blank).hexdigest() != digest:
            raise self.damaged("the checksum of its header does not match")
        self.data_start = 8 + length
        self.bytes_read = self.data_start
        try:
            self.header: dict[str, Any] = json.loads(metadata["header"], object_pairs_hook=_unique)
            self.entries = {name: _entry(name, given) for name, given in content.items()}
            self.checksums: dict[str, str] = dict(self.header["checksums"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.damaged(
                f"its header does not parse ({' '.join(str(error).split())[:80]})"
            ) from error
        self._check_layout()

    def _check_layout(self) -> None:
        """Ranges follow one another without gap or overlap, fill the file, and each section is one run."""
        at, seen, last = 0, set(), None
        self.entries = dict(
            sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end))
        )
        self.sections: dict[str, tuple[int, int]] = {}
        for name, entry in self.entries.items():
            if entry.begin != at:
                raise self.damaged(
                    f"the bytes of tensor {name[:60]!r} overlap others or leave a gap"
                )
            at = entry.end
            section = section_of(name)
            if section != last and section in seen:
                raise self.damaged(f"section {section[:60]!r} lies in two places")
            seen.add(section)
            last = section
            self.sections[section] = (self.sections.get(section, (entry.begin, 0))[0], entry.end)
        if self.data_start + at != self.size:
            raise self.damaged(
                f"it has {self.size} bytes, its header speaks of {self.data_start + at}"
            )
        if set(self.checksums) != seen:
            raise self.damaged("its checksums are not those of its sections")

    def damaged(self, how: str) -> UserError:
        return UserError(
            f"{self.path} is damaged or not made by `export`: {how}; fetch or export it again"
        )

    def read(self, section: str) -> dict[str, np.ndarray]:
        """The tensors of one section by full name, as read-only views of the mapped file, checked against its SHA-256.

        Raises:
            UserError: no such section, or its bytes are not those that were written.
        """
        if section not in self.sections:
            raise self.damaged(f"it has no section {section!r}")
        begin, end = self.sections[section]
        view = memoryview(self._map or b"")[self.data_start + begin : self.data_start + end]
        if hashlib.sha256(view).hexdigest() != self.checksums[section]:
            raise self.damaged(f"the checksum of section {section!r} does not match")
        self.bytes_read += end - begin
        found = {}
        for name, entry in self.entries.items():
            if section_of(name) == section:
                part = view[entry.begin - begin : entry.end - begin]
                found[name] = np.frombuffer(part, DTYPES[entry.dtype]).reshape(entry.shape)
        return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key stands twice")
    return out


def _entry(name: str, given: dict[str, Any]) -> Entry:
    dtype, shape, (begin, end) = given["dtype"], given["shape"], given["data_offsets"]
    if (
        set(given) != {"dtype", "shape", "data_offsets"}
        or dtype not in DTYPES
        or not isinstance(shape, list)
    ):
        raise ValueError(f"tensor {name[:60]!r} is not described as it should be")
    if len(shape) > 16 or any(
        type(n) is not int or n < 0 or n > 1 << 48 for n in (*shape, begin, end)
    ):
        raise ValueError(f"tensor {name[:60]!r} has an absurd shape or place")
    if end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise ValueError(f"tensor {name[:60]!r} has a place that does not fit its shape")
    return Entry(dtype, tuple(shape), begin, end)
