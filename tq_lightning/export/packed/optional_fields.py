"""Optional header fields: activation ranges, inputs and preprocessing.

The writer checks them before it writes a file, and the reader when it opens one.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.export.packed.entries import is_shape
from tq_lightning.quant.input_spec import TYPES

_MAX_FLOAT = 3.4e38
MAX_INPUTS = 64
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box", "random")
_CROPS = ("center", "squash", "border")
_MAX_INPUT = 1 << 24  # values of an input image, e.g. 3 x 2364 x 2364
_MAX_RESIZED = 1 << 13  # pixels of a side before the crop


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


def input_size(header: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images of a packed file.

    Args:
        header: header of the file, or `tq_file` of its model.

    Raises:
        UserError: the file has no input size.
    """
    size = (header["preprocessing"] or {}).get("input_size")
    if size is None:
        raise UserError(
            "the packed file has no input size; export it with preprocessing={'input_size': ...}, "
            "or with inputs= if the network does not take images"
        )
    channels, height, width = size
    return channels, height, width


def check_takes_images(header: Mapping[str, Any], path: Any) -> None:
    """Check that the network of a packed file takes images.

    Raises:
        UserError: it takes other inputs; the message names them.
    """
    if rows := header.get("inputs"):
        names = ", ".join(row["name"] for row in rows)
        raise UserError(
            f"only images are supported, and the network of {path} takes {names}; run it with "
            "load_packed"
        )
