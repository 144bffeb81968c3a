"""Edit packed files without building the network: fewer planes, compression, rest files.

A rest file holds only the planes after the first n, and the norm sets of those widths. Joining it
with the narrow file of n planes restores the full file, byte for byte.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tq_lightning.errors import UserError
from tq_lightning.export.packed.container import Container, write_container
from tq_lightning.export.packed.entries import section_of
from tq_lightning.export.packed.header import format_version, read_header
from tq_lightning.export.packed.optional_fields import check_ranges
from tq_lightning.export.packed.reader import read_planes
from tq_lightning.export.packed.sections import (
    compress_planes,
    keep_planes,
    section_sizes,
    sections_above,
)

# sections and header keys that a narrow file and its full file have in common
_SHARED_SECTIONS = ("int", "float64", "float", "scale", "plane0")
_ADDED_KEYS = ("activation_ranges",)
_SHARED_KEYS = ("model", "prepare", "layers", "dtypes", "norms", "folded", "codes")


def read_all(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the header and all tensors of a packed file, with planes decompressed.

    Raises:
        UserError: the file is damaged, foreign, newer, or a rest file.
    """
    with Container(path) as file:
        header = read_header(file)
        tensors = file.read_all()
        for p, plane in enumerate(read_planes(file, header, header["stored_bits"])):
            tensors[f"plane{p}"] = plane.copy()
    return {key: value for key, value in header.items() if key != "checksums"}, tensors


def repack(
    path: str | Path, out: str | Path, max_bits: int | None = None, compress: bool = False
) -> dict[str, int]:
    """Write a packed file again with fewer planes, compressed or not.

    Args:
        path: packed file to read.
        out: target file, written atomically.
        max_bits: number of planes to keep. None keeps all.
        compress: compress the planes.

    Returns:
        Bytes per section, with "header" and "total".

    Raises:
        UserError: see `read_all`; `max_bits` exceeds the number of planes of the file.
    """
    header, tensors = read_all(path)
    stored = header["stored_bits"] if max_bits is None else max_bits
    if not 1 <= stored <= header["stored_bits"]:
        raise UserError(
            f"{path} stores {header['stored_bits']} planes; pass --max-bits from 1 to "
            f"{header['stored_bits']}"
        )
    header, tensors = keep_planes({**header, "compression": None}, tensors, stored)
    if compress:
        header, tensors = compress_planes(header, tensors)
    return _write(out, tensors, header)


def add_ranges(
    path: str | Path, out: str | Path, ranges: Mapping[str, Sequence[float]]
) -> dict[str, int]:
    """Write a packed file again with other activation ranges.

    Args:
        path: packed file to read.
        out: target file, written atomically. It may be `path`.
        ranges: {layer name: (low, high)}, see `calibrate_activations`.

    Returns:
        Bytes per section, with "header" and "total".

    Raises:
        UserError: see `read_all` and `optional_fields.check_ranges`.
    """
    header, tensors = read_all(path)
    names = [layer["name"] for layer in header["layers"]]
    compressed = header["compression"] is not None
    header = {**header, "compression": None, "activation_ranges": check_ranges(ranges, names)}
    if compressed:
        header, tensors = compress_planes(header, tensors)
    return _write(out, tensors, header)


def write_rest(path: str | Path, out: str | Path, bits: int) -> dict[str, int]:
    """Write the planes of `path` after the first `bits`, and their norm sets, to a rest file.

    Returns:
        Bytes per section, with "header" and "total".

    Raises:
        UserError: see `read_all`; the file has no more than `bits` planes.
    """
    header, tensors = read_all(path)
    if not 1 <= bits < header["stored_bits"]:
        raise UserError(
            f"{path} stores {header['stored_bits']} planes and has no rest above {bits}"
        )
    sections = sections_above(bits)
    rest = {name: array for name, array in tensors.items() if section_of(name) in sections}
    header = {**header, "compression": None, "rest_of": _identity(header, tensors)}
    return _write(out, rest, header)


def join(path: str | Path, rest: str | Path, out: str | Path) -> dict[str, int]:
    """Add the planes of a rest file to a narrow file. The result is compressed if `path` is.

    Returns:
        Bytes per section, with "header" and "total".

    Raises:
        UserError: `rest` is not a rest file, belongs to another model, or does not start at the
            first plane that `path` lacks.
    """
    header, tensors = read_all(path)
    with Container(rest) as file:
        rest_header = read_header(file, rest=True)
        if rest_header["rest_of"] != _identity(header, tensors):
            raise UserError(
                f"{rest} belongs to another model than {path}; pass the rest file written with it"
            )
        added = file.read_all()
        for name, array in added.items():
            if name.startswith("plane") and array.shape != (header["codes"] // 8,):
                raise file.damaged(f"{name} does not have {header['codes'] // 8} bytes")
    tensors = {**tensors, **added}
    if any(f"plane{p}" not in tensors for p in range(rest_header["stored_bits"])):
        raise UserError(
            f"{rest} does not start at plane {header['stored_bits']}, the first that {path} lacks; "
            "pass the rest file written with it"
        )
    full = {key: v for key, v in rest_header.items() if key not in ("checksums", "rest_of")}
    if header["compression"] is not None:
        full, tensors = compress_planes(full, tensors)
    return _write(out, tensors, full)


def _write(
    out: str | Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, Any]
) -> dict[str, int]:
    version = format_version(header, tensors)
    return section_sizes(tensors, write_container(out, tensors, header, version))


def _identity(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return the digests of everything that a narrow file and its full file have in common."""
    values = [header[key] for key in _SHARED_KEYS]
    values += [header[key] for key in _ADDED_KEYS if key in header]  # not in files of version 1
    shared = json.dumps(values, sort_keys=True)
    digests: dict[str, Any] = {"header": hashlib.sha256(shared.encode())}
    for name in sorted(tensors):
        section = section_of(name)
        if section in _SHARED_SECTIONS:
            digests.setdefault(section, hashlib.sha256()).update(tensors[name].tobytes())
    return {section: digest.hexdigest() for section, digest in digests.items()}
