"""Header of a packed file: its fields, their types and ranges, and the version they require."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.export.packed.compression import CODING
from tq_lightning.export.packed.container import Container
from tq_lightning.export.packed.entries import MAX_EXTENT, is_shape, section_of
from tq_lightning.quant.codes import STORED_BITS
from tq_lightning.quant.config import ADDED_CHOICES
from tq_lightning.quant.inputs import TYPES

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
_SET_KEYS = {str(bits) for bits in range(1, STORED_BITS + 1)}
_MAX_FLOAT = 3.4e38
MAX_INPUTS = 64
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box", "random")
_CROPS = ("center", "squash", "border")
_MAX_INPUT = 1 << 24  # values of an input image, e.g. 3 x 2364 x 2364
_MAX_RESIZED = 1 << 13  # pixels of a side before the crop
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


def check_ranges(ranges: Any, layers: Iterable[str]) -> dict[str, list[float]]:
    """Check activation ranges.

    Args:
        ranges: {layer name: (low, high)}.
        layers: full names of the quantized tensors, as "conv1.weight".

    Returns:
        {layer name: [low, high]} as Python floats.

    Raises:
        UserError: a name that is not a quantized layer, or a range that is not low <= 0 <= high
            with finite float32 bounds; the message names it.
    """
    if not isinstance(ranges, Mapping):
        raise UserError(f"activation_ranges must map layer names to ranges, got {str(ranges)[:40]}")
    known = {layer.rpartition(".")[0] or "(root)" for layer in layers}
    checked = {}
    for name, pair in ranges.items():
        if name not in known:
            raise UserError(
                f"activation_ranges has the name {str(name)[:60]!r}, which is not a quantized layer"
            )
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(_is_bound, pair)):
            raise UserError(
                f"activation_ranges has {name}: {str(pair)[:60]}; expected two finite numbers"
            )
        low, high = map(float, pair)
        if not low <= 0.0 <= high:
            raise UserError(
                f"activation_ranges has {name}: [{low:g}, {high:g}]; expected low <= 0 <= high"
            )
        checked[name] = [low, high]
    return checked


def check_inputs(inputs: Any) -> list[dict[str, Any]]:
    """Check the inputs of a network that does not take images.

    Raises:
        UserError: they are not a list of {"name", "shape", "type"} with different names.
    """
    fits = isinstance(inputs, list) and 0 < len(inputs) <= MAX_INPUTS
    for row in inputs if fits else ():
        fits = fits and isinstance(row, dict) and set(row) == {"name", "shape", "type"}
        fits = fits and isinstance(row["name"], str) and row["name"].isidentifier()
        fits = fits and is_shape(row["shape"]) and row["type"] in TYPES
        fits = fits and math.prod(row["shape"]) < 1 << 30
    if not fits or len({row["name"] for row in inputs}) != len(inputs):
        raise UserError(
            f"inputs are {str(inputs)[:60]}; expected rows of name, shape (without the batch) and "
            f"type ({', '.join(TYPES)})"
        )
    return inputs


def _is_bound(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= _MAX_FLOAT


def check_preprocessing(options: Mapping[str, Any] | None) -> None:
    """Check the preprocessing options of a header. Unknown keys are not checked.

    Raises:
        UserError: an option is invalid.
    """
    options = options or {}
    size = options.get("input_size", [1, 1, 1])
    if (
        not isinstance(size, list | tuple)
        or len(size) != 3
        or any(type(n) is not int or not 0 < n <= _MAX_INPUT for n in size)
        or math.prod(size) > _MAX_INPUT
    ):
        raise UserError(
            f"preprocessing has input_size {str(size)[:40]}; expected [channels, height, width] "
            f"with at most {_MAX_INPUT:,} values"
        )
    crop = options.get("crop_pct", 1.0)
    numbers = [crop]
    for key in ("mean", "std"):
        values = options.get(key, [])
        numbers += values if isinstance(values, list | tuple) else [None]
    if any(
        isinstance(n, bool) or not isinstance(n, int | float) or not abs(n) < 1e6 for n in numbers
    ):
        raise UserError("preprocessing has a mean, std or crop_pct that is not a number")
    counts = {1, 3, size[0]}
    if any(len(options.get(key, [0.5])) not in counts for key in ("mean", "std")):
        raise UserError("preprocessing has a mean or std that is not one number per channel")
    if min(options.get("std", [1.0])) <= 0.0:
        raise UserError(f"preprocessing has std {options['std']}; expected numbers above 0")
    # images are resized to the size / crop_pct
    if not max(size[1:]) / _MAX_RESIZED <= crop <= _MAX_RESIZED:
        raise UserError(f"preprocessing has crop_pct {crop}; expected the share that is kept")
    if (
        options.get("interpolation", "bicubic") not in _INTERPOLATIONS
        or options.get("crop_mode", "center") not in _CROPS
    ):
        raise UserError(
            "preprocessing has an unknown interpolation or crop_mode; expected one of "
            f"{', '.join(_INTERPOLATIONS)} and one of {', '.join(_CROPS)}"
        )


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
            if bits not in _SET_KEYS or entry.shape != (2 ** int(bits),):
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
