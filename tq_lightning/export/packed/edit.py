"""Packed file -> packed file, without the network: fewer planes, compression, and the missing planes by themselves.

A rest file holds planes n+1.. and their norm sets alone. Joined to the narrow file they were cut from, it gives the whole
file again, byte for byte.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tq_lightning.errors import UserError
from tq_lightning.export.packed.compression import decompress_plane
from tq_lightning.export.packed.container import Container, section_of, write_container
from tq_lightning.export.packed.schema import read_header
from tq_lightning.export.packed.sections import compressed, narrowed, sections_above, sizes

_SHARED = (
    "int",
    "float64",
    "float",
    "scale",
    "plane0",
)  # sections that a narrow file and the whole one have in common
_KEYS = (
    "model",
    "prepare",
    "layers",
    "dtypes",
    "norms",
    "folded",
    "codes",
)  # and keys of the header


def read_all(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and tensors of a packed file, every section checked, planes unfolded.

    Raises:
        UserError: a file that is damaged, foreign, newer, or a rest file.
    """
    with Container(path) as file:
        header = read_header(file)
        tensors = {
            name: array.copy()
            for section in file.sections
            for name, array in file.read(section).items()
        }
    if any(f"plane{p}" not in tensors for p in range(header["stored_bits"])):
        raise file.damaged("it lacks a plane")
    if header["compression"] is None:
        _check_planes(file, header, tensors)
    else:
        first = tensors["plane0"] = decompress_plane(tensors["plane0"], None, header["codes"] // 8)
        for p in range(1, header["stored_bits"]):
            tensors[f"plane{p}"] = decompress_plane(
                tensors[f"plane{p}"], first, header["codes"] // 8
            )
    return {key: value for key, value in header.items() if key != "checksums"}, tensors


def repack(
    path: str | Path, out: str | Path, max_bits: int | None = None, compress: bool = False
) -> dict[str, int]:
    """Writes `path` anew with its first `max_bits` planes (None = all it has), compressed or not.

    Returns:
        {section: bytes}, with "header" and "total".

    Raises:
        UserError: as `read_all`; more planes asked for than there are.
    """
    header, tensors = read_all(path)
    stored = header["stored_bits"] if max_bits is None else max_bits
    if not 1 <= stored <= header["stored_bits"]:
        raise UserError(
            f"{path} stores {header['stored_bits']} planes; pass --max-bits from 1 to {header['stored_bits']}"
        )
    header, tensors = narrowed({**header, "compression": None}, tensors, stored)
    if compress:
        header, tensors = compressed(header, tensors)
    return sizes(tensors, write_container(out, tensors, header))


def write_rest(path: str | Path, out: str | Path, bits: int) -> dict[str, int]:
    """Writes what a file of the first `bits` planes of `path` lacks: the other planes and their norm sets.

    Raises:
        UserError: as `read_all`; nothing left above `bits`.
    """
    header, tensors = read_all(path)
    if not 1 <= bits < header["stored_bits"]:
        raise UserError(
            f"{path} stores {header['stored_bits']} planes, there is no rest above {bits}"
        )
    keep = sections_above(bits)
    rest = {name: array for name, array in tensors.items() if section_of(name) in keep}
    return sizes(
        rest,
        write_container(
            out, rest, {**header, "compression": None, "rest_of": _identity(header, tensors)}
        ),
    )


def join(path: str | Path, rest: str | Path, out: str | Path) -> dict[str, int]:
    """Brings the narrow file `path` to the planes of `rest`; compressed where `path` is.

    Raises:
        UserError: `rest` is no rest file, is of another model, or does not begin where `path` ends.
    """
    header, tensors = read_all(path)
    with Container(path) as file:
        was_compressed = file.header["compression"] is not None
    with Container(rest) as file:
        given = read_header(file, rest=True)
        if given["rest_of"] != _identity(header, tensors):
            raise UserError(
                f"{rest} belongs to another model than {path}; pass the rest written with it"
            )
        whole = {key: value for key, value in given.items() if key not in ("checksums", "rest_of")}
        more = {
            name: array.copy()
            for section in file.sections
            for name, array in file.read(section).items()
        }
        _check_planes(file, header, more)
    tensors = {**tensors, **more}
    if any(f"plane{p}" not in tensors for p in range(whole["stored_bits"])):
        raise UserError(
            f"{rest} begins above plane {header['stored_bits']}, where {path} ends; pass the rest written with it"
        )
    if was_compressed:
        whole, tensors = compressed(whole, tensors)
    return sizes(tensors, write_container(out, tensors, whole))


def _check_planes(
    file: Container, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    for name, array in tensors.items():
        if name.startswith("plane") and array.shape != (header["codes"] // 8,):
            raise file.damaged(f"{name} is not of {header['codes'] // 8} bytes")


def _identity(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    digests: dict[str, Any] = {
        "header": hashlib.sha256(json.dumps([header[k] for k in _KEYS], sort_keys=True).encode())
    }
    for name in sorted(tensors):
        if section_of(name) in _SHARED:
            digests.setdefault(section_of(name), hashlib.sha256()).update(tensors[name].tobytes())
    return {section: digest.hexdigest() for section, digest in digests.items()}
