"""Container of a packed file: a safetensors file, written atomically and read by byte range.

A file is 8 bytes (header length, little endian), a JSON header, and the data. Tensors are stored
in the order of the safetensors library: by type, wide types first, then by name. The part of a
tensor's name before the first "/" is its section. A section is one contiguous run of bytes with
one SHA-256. The header also has a SHA-256 of itself, computed with zeros in the place of the
digest. docs/format.md is the specification.
"""

import hashlib
import json
import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tq_lightning.errors import UserError, message_of
from tq_lightning.export.packed.entries import DTYPES, parse_entry, section_of
from tq_lightning.files import atomic_write

FORMAT = "tq_packed"
VERSIONS = (1, 2)  # readable versions; see `header.format_version` for the one that is written
MAX_HEADER = 64 << 20  # bytes; real headers are kilobytes
_NO_DIGEST = "0" * 64


def write_container(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    header: Mapping[str, Any],
    version: int = 1,
) -> int:
    """Write a container atomically.

    Args:
        path: target file. Its folder must exist.
        tensors: arrays of int64, float64, float32 or uint8 by name.
        header: JSON values for the reader. Version and checksums are added to it.
        version: format version, one of `VERSIONS`.

    Returns:
        Number of bytes written.

    Raises:
        UserError: the folder does not exist, or the file can't be written.
    """
    codes = {np.dtype(numpy_name): name for name, numpy_name in DTYPES.items()}
    rank = list(DTYPES)
    order = sorted(tensors, key=lambda name: (rank.index(codes[tensors[name].dtype]), name))
    index: dict[str, Any] = {}
    digests: dict[str, Any] = {}
    offset = 0
    for name in order:
        array = tensors[name]
        index[name] = {
            "dtype": codes[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
        digests.setdefault(section_of(name), hashlib.sha256()).update(_bytes(array))
    checksums = {section: digest.hexdigest() for section, digest in digests.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(version),
        "header": json.dumps({**header, "checksums": checksums}, sort_keys=True, allow_nan=False),
        "header_sha256": _NO_DIGEST,
    }
    raw = json.dumps({"__metadata__": metadata, **index}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    raw = raw.replace(_digest_field(_NO_DIGEST), _digest_field(hashlib.sha256(raw).hexdigest()), 1)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.writelines(
            [len(raw).to_bytes(8, "little"), raw, *(_bytes(tensors[name]) for name in order)]
        )
    return 8 + len(raw) + offset


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _digest_field(digest: str) -> bytes:
    return f'"header_sha256":"{digest}"'.encode()


class Container:
    """Open packed file. The header is checked on opening, each section when it is read.

    Args:
        path: file to open.

    Attributes:
        version: format version, one of `VERSIONS`.
        header: the header given to `write_container`, with "checksums".
        entries: `Entry` of each tensor by name, in file order.
        sections: byte range (begin, end) of each section, in file order.
        size: size of the file in bytes.
        data_start: bytes before the data.
        bytes_read: bytes of the file used so far.

    Raises:
        UserError: not a packed file, a newer version, or a damaged file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not (self.path.is_file() or self.path.is_dir()):
            raise UserError(f"cannot open {path} (not a regular file)")  # a pipe could block
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
        """Unmap the file."""
        if self._map is not None:
            try:
                self._map.close()
            except BufferError:  # an array still uses the mapping; it is freed with that array
                self._map = None

    def _parse(self) -> None:
        data = self._map or b""
        length = int.from_bytes(data[:8], "little")
        if self.size < 8 or length > MAX_HEADER or length > self.size - 8:
            raise UserError(
                f"{self.path} is not a packed file, or is incomplete; write it with `export`"
            )
        raw = data[8 : 8 + length]
        try:
            index = json.loads(raw.decode(), object_pairs_hook=_unique)
            metadata = index.pop("__metadata__")
            kind, version = metadata["format"], metadata["format_version"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.path} is not a packed file of tq_lightning; write one with `export`"
            ) from error
        if kind != FORMAT:
            raise UserError(
                f"{self.path} has format {str(kind)[:40]!r}, expected {FORMAT!r}; "
                "write it with `export`"
            )
        if version not in map(str, VERSIONS):
            raise UserError(
                f"{self.path} has format version {str(version)[:20]!r}, this reader supports "
                f"{' and '.join(map(str, VERSIONS))}; update tq_lightning or export it again"
            )
        self.version = int(version)
        digest = metadata.get("header_sha256")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise self.damaged("its header has no checksum")
        blank = raw.replace(_digest_field(digest), _digest_field(_NO_DIGEST), 1)
        if hashlib.sha256(blank).hexdigest() != digest:
            raise self.damaged("the checksum of its header does not match")
        self.data_start = 8 + length
        self.bytes_read = self.data_start
        try:
            self.header: dict[str, Any] = json.loads(metadata["header"], object_pairs_hook=_unique)
            self.entries = {name: parse_entry(name, value) for name, value in index.items()}
            self.checksums: dict[str, str] = dict(self.header["checksums"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = message_of(error, 80)
            raise self.damaged(f"its header can't be parsed ({reason})") from error
        self._check_layout()

    def _check_layout(self) -> None:
        """Check that the tensors fill the file without gap or overlap, section by section."""
        self.entries = dict(
            sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end))
        )
        self.sections: dict[str, tuple[int, int]] = {}
        offset, previous = 0, None
        for name, entry in self.entries.items():
            if entry.begin != offset:
                raise self.damaged(
                    f"the bytes of tensor {name[:60]!r} overlap others or leave a gap"
                )
            offset = entry.end
            section = section_of(name)
            if section != previous and section in self.sections:
                raise self.damaged(f"section {section[:60]!r} is not contiguous")
            begin, _ = self.sections.get(section, (entry.begin, 0))
            self.sections[section] = (begin, entry.end)
            previous = section
        if self.data_start + offset != self.size:
            raise self.damaged(
                f"it has {self.size} bytes, its header describes {self.data_start + offset}"
            )
        if set(self.checksums) != set(self.sections):
            raise self.damaged("its checksums do not match its sections")

    def damaged(self, reason: str) -> UserError:
        """Return the error for a file that is damaged or was made by another program."""
        return UserError(
            f"{self.path} is damaged or was not made by `export`: {reason}; "
            "fetch or export it again"
        )

    def read(self, section: str) -> dict[str, np.ndarray]:
        """Read one section and check its SHA-256.

        Args:
            section: name of a section.

        Returns:
            Read-only arrays by full tensor name, views of the mapped file.

        Raises:
            UserError: the section does not exist, or its checksum differs.
        """
        if section not in self.sections:
            raise self.damaged(f"it has no section {section!r}")
        begin, end = self.sections[section]
        view = memoryview(self._map or b"")[self.data_start + begin : self.data_start + end]
        if hashlib.sha256(view).hexdigest() != self.checksums[section]:
            raise self.damaged(f"the checksum of section {section!r} does not match")
        self.bytes_read += end - begin
        arrays = {}
        for name, entry in self.entries.items():
            if section_of(name) == section:
                part = view[entry.begin - begin : entry.end - begin]
                arrays[name] = np.frombuffer(part, DTYPES[entry.dtype]).reshape(entry.shape)
        return arrays

    def read_all(self) -> dict[str, np.ndarray]:
        """Read every section into arrays that remain valid after `close`."""
        return {
            name: array.copy()
            for section in self.sections
            for name, array in self.read(section).items()
        }


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result
