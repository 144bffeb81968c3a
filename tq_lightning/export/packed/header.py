"""Header of a packed file: its fields, their types and ranges, and the version they require."""

from collections.abc import Iterable, Mapping
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.export.packed.compression import CODING
from tq_lightning.export.packed.container import Container
from tq_lightning.export.packed.entries import MAX_EXTENT, is_shape, section_of
from tq_lightning.export.packed.optional_fields import (
    check_inputs,
    check_preprocessing,
    check_ranges,
)
from tq_lightning.quant.codes import STORED_BITS
from tq_lightning.quant.config import ADDED_CHOICES

# type of each header field
_FIELDS: dict[str, Any] = {
    "model": dict,
    "preprocessing": dict | None,
    "class_names": list | None,
    "prepare": dict,
    "stored_bits": int,
    "codes": int,
    "layers": list,
    "dtypes": dict,
    "norm_widths": list,
    "norms": list,
    "folded": bool,
    "compression": str | None,
}
_LAYER_KEYS, _NORM_KEYS = {"name", "shape", "offset", "scale"}, {"name", "shape"}
# tensor type of each section
_TYPES = {
    "int": "I64",
    "float64": "F64",
    "float": "F32",
    "scale": "F32",
    "levels": "F32",
    "norm": "F32",
    "plane": "U8",
}
WIDTH_KEYS = {str(bits) for bits in range(1, STORED_BITS + 1)}  # of norm sets and level tables
# Planes that are more times larger than their compressed file are a decompression bomb.
_MAX_RATIO, _FREE_BYTES = 256, 16 << 20


def format_version(header: Mapping[str, Any], tensors: Iterable[str]) -> int:
    """Return the format version that a file requires: 2 if it uses a feature of version 2."""
    new = (
        "activation_ranges" in header
        or "inputs" in header
        or any(key in header["prepare"] for key in ADDED_CHOICES)
        or any(section_of(name).startswith("levels") for name in tensors)
    )
    return 2 if new else 1


def read_header(file: Container, rest: bool = False) -> dict[str, Any]:
    """Check the type and range of every header field.

    Args:
        file: open container.
        rest: expect a rest file (missing planes only).

    Returns:
        The header.

    Raises:
        UserError: an invalid field, an unknown compression, or the wrong kind of file.
    """
    header = file.header
    if rest and header.get("rest_of") is None:
        raise UserError(
            f"{file.path} is not a rest file; write one with "
            "`export FULL --max-bits n --out NARROW --rest FILE`"
        )
    if not rest and header.get("rest_of") is not None:
        raise UserError(
            f"{file.path} is a rest file (missing planes only); join it with "
            "`export NARROW --add REST --out FILE`"
        )
    for key, kind in _FIELDS.items():
        value = header.get(key)
        if (
            key not in header
            or not isinstance(value, kind)
            or (kind is int and isinstance(value, bool))
        ):
            raise file.damaged(f"its header has no valid {key!r}")
    if header["compression"] not in (None, CODING):
        raise UserError(
            f"{file.path} has unknown compression {header['compression'][:20]!r}; "
            "update tq_lightning"
        )
    stored, codes = header["stored_bits"], header["codes"]
    if not 1 <= stored <= STORED_BITS:
        raise file.damaged(f"its number of planes is not in 1..{STORED_BITS}")
    if not 0 <= codes < MAX_EXTENT:
        raise file.damaged("its number of codes is out of range")
    if stored * codes // 8 > _MAX_RATIO * file.size + _FREE_BYTES:
        raise file.damaged("its row of codes is many times larger than the file")
    _check_layout(file, header)
    _check_additions(file, header)
    widths = header["norm_widths"]
    if any(type(n) is not int or not 1 <= n <= stored for n in widths):
        raise file.damaged("it has norm sets for widths that it does not store")
    if len(set(widths)) != len(widths):
        raise file.damaged("its norm widths are not unique")
    if any(not isinstance(name, str) for name in header["class_names"] or []):
        raise file.damaged("its class names are not strings")
    for name, entry in file.entries.items():
        section = section_of(name)
        kind = section if section in _TYPES else section.rstrip("0123456789")
        if entry.dtype != _TYPES.get(kind):
            raise file.damaged(f"tensor {name[:60]!r} has the wrong type {entry.dtype}")
    try:
        check_preprocessing(header["preprocessing"])
    except UserError as error:
        raise file.damaged(str(error)) from error
    return header


def _check_additions(file: Container, header: Mapping[str, Any]) -> None:
    """Check the features of version 2: the version, activation ranges, sizes of level tables."""
    needed = format_version(header, file.entries)
    if file.version < needed:
        raise file.damaged(f"it has fields of version {needed} but is marked {file.version}")
    names = [layer["name"] for layer in header["layers"]]
    try:
        check_ranges(header.get("activation_ranges", {}), names)
        if "inputs" in header:
            check_inputs(header["inputs"])
    except UserError as error:
        raise file.damaged(str(error)) from error
    for name, entry in file.entries.items():
        if section_of(name).startswith("levels"):
            bits = name.removeprefix("levels")
            if bits not in WIDTH_KEYS or entry.shape != (2 ** int(bits),):
                raise file.damaged(f"tensor {name[:60]!r} is not a table of levels")


def _check_layout(file: Container, header: Mapping[str, Any]) -> None:
    """Check the structure of the layer map and of the norm layout."""
    for keys, items in ((_LAYER_KEYS, header["layers"]), (_NORM_KEYS, header["norms"])):
        for item in items:
            if not isinstance(item, dict) or set(item) != keys or not isinstance(item["name"], str):
                raise file.damaged("its layer map is invalid")
            shapes = (item["shape"], item.get("scale", []), [item.get("offset", 0)])
            if not all(is_shape(shape) for shape in shapes):
                raise file.damaged("its layer map has an invalid shape or offset")
        if len({item["name"] for item in items}) != len(items):
            raise file.damaged("its layer map has duplicate names")
