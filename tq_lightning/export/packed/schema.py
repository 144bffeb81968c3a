"""Checks of a packed file's header: by itself, and against the network it describes.

All of them run before a plane is unpacked, so a file that does not fit raises an error and never
becomes a model.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError
from tq_lightning.export.packed.compression import CODING
from tq_lightning.export.packed.container import MAX_EXTENT, Container, is_shape, section_of
from tq_lightning.export.packed.sections import file_names, named_tensors
from tq_lightning.quant.bit_planes import aligned
from tq_lightning.quant.codes import STORED_BITS
from tq_lightning.quant.switchable_norm import PerWidthNorm
from tq_lightning.quant.weight import weight_quantizers

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
    "norm": "F32",
    "plane": "U8",
}
_SET_KEYS = {str(bits) for bits in range(1, STORED_BITS + 1)}  # keys of norm sets
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box", "random")
_CROPS = ("center", "squash", "border")
# Planes larger than this many times their compressed file are a decompression bomb.
_MAX_RATIO, _FREE_BYTES = 256, 16 << 20


def check_preprocessing(options: Mapping[str, Any] | None) -> None:
    """Check the preprocessing options of a header. Unknown keys may hold anything.

    Raises:
        UserError: images can't be prepared with these options.
    """
    options = options or {}
    size = options.get("input_size", [1, 1, 1])
    if (
        not isinstance(size, list | tuple)
        or len(size) != 3
        or any(type(n) is not int or not 0 < n <= 1 << 14 for n in size)
    ):
        raise UserError(
            f"preprocessing has input_size {str(size)[:40]}; expected [channels, height, width]"
        )
    numbers = [options.get("crop_pct", 1.0)]
    for key in ("mean", "std"):
        values = options.get(key, [])
        numbers += values if isinstance(values, list | tuple) else [None]
    if any(
        isinstance(n, bool) or not isinstance(n, int | float) or not abs(n) < 1e6 for n in numbers
    ):
        raise UserError("preprocessing has a mean, std or crop_pct that is not made of numbers")
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
        rest: whether a rest file (missing planes only) is expected.

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


def _check_layout(file: Container, header: Mapping[str, Any]) -> None:
    """Check the form of the layer map and of the norm layout."""
    for keys, items in ((_LAYER_KEYS, header["layers"]), (_NORM_KEYS, header["norms"])):
        for item in items:
            if not isinstance(item, dict) or set(item) != keys or not isinstance(item["name"], str):
                raise file.damaged("its layer map is invalid")
            shapes = (item["shape"], item.get("scale", []), [item.get("offset", 0)])
            if not all(is_shape(shape) for shape in shapes):
                raise file.damaged("its layer map has an invalid shape or offset")
        if len({item["name"] for item in items}) != len(items):
            raise file.damaged("its layer map has duplicate names")


def cast_to_header_dtype(
    header: Mapping[str, Any], full: str, value: Tensor, default: torch.dtype
) -> Tensor:
    """Cast `value` to the type that the header gives for the tensor `full`, or to `default`.

    Raises:
        UserError: an unknown type, or one of another kind than that of `value`.
    """
    name = header["dtypes"].get(full, str(default).removeprefix("torch."))
    dtype = getattr(torch, str(name), None)
    try:
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point == value.is_floating_point():
            return value.to(dtype)
    except (RuntimeError, TypeError):  # quantized and packed types can't be converted to
        pass
    raise UserError(f"the file gives {full} an invalid type {str(name)[:40]!r}")


def check_parameters(header: Mapping[str, Any], names: set[str], model: nn.Module) -> None:
    """Check that a file has all tensors of its network, before the network is prepared.

    Preparing takes much longer than creating a network, so a file must not ask for it with a
    network that is not its own.

    Args:
        header: header of the file.
        names: names of the tensors in the file.
        model: network that was not prepared.

    Raises:
        UserError: the network has other tensors.
    """
    quantized = {layer["name"]: tuple(layer["shape"]) for layer in header["layers"]}
    present = {re.sub(r"\.sets\.\d+", "", name.partition("/")[2]) for name in names}
    present |= {part["name"] for part in header["norms"]} | set(quantized)
    counters = ("num_batches_tracked",)
    ignored = (*counters, "running_mean", "running_var") if header["folded"] else counters
    in_model = {name: tuple(value.shape) for name, value in named_tensors(model)}
    missing = {name for name in in_model if name not in present and not name.endswith(ignored)}
    if missing:
        raise _mismatch(header, missing, set())
    if any(in_model.get(name) != shape for name, shape in quantized.items()):
        raise UserError("its layer map does not match its network")


def _mismatch(header: Mapping[str, Any], missing: set[str], extra: set[str]) -> UserError:
    differences = [
        f"{verb} {', '.join(sorted(names)[:2])}"
        for verb, names in (("lacks", missing), ("adds", extra))
        if names
    ]
    return UserError(
        f"the file {' and '.join(differences)} compared with the network "
        f"{header['model'].get('name')!r} made with {str(header['model'].get('args'))[:200]}; pass "
        "the model_args= of the model to save_packed, or model= to load_packed"
    )


def check_names(header: Mapping[str, Any], names: set[str], model: nn.Module) -> None:
    """Check that the tensors of a file are those of its network.

    Args:
        header: header of the file.
        names: names of the tensors in the file.
        model: prepared network, possibly without the norm sets of some widths.

    Raises:
        UserError: tensors are missing, or there are others.
    """
    folded = (".running_mean", ".running_var") if header["folded"] else ()
    in_model = file_names(model)
    expected = {name for _, _, name in in_model if not name.startswith("norm")} | {"scale"}
    expected |= {f"norm{n}" for n in header["norm_widths"] if header["norms"]}
    expected |= {f"plane{p}" for p in range(header["stored_bits"])}
    missing = expected - names
    extra = {name for name in names - expected if not _of_unbuilt_set(name, model)}
    if header["norm_widths"]:
        # all sets have the same layout, so those that were built stand for the others
        shapes = {
            name.split("/", 1)[1]: value.shape
            for _, value, name in in_model
            if name.startswith("norm")
        }
        given = {part["name"]: torch.Size(part["shape"]) for part in header["norms"]}
        missing |= set(shapes) - set(given)
        extra |= {name for name in given if given[name] != shapes.get(name)}
    if folded:
        missing = {name for name in missing if not name.endswith(folded)}
    if missing or extra:
        raise _mismatch(header, missing, extra)


def _of_unbuilt_set(name: str, model: nn.Module) -> bool:
    """Check if a file name ("float64/bn1.sets.3.weight") is of a norm set that was not built."""
    norm_name, _, inside = name.partition("/")[2].partition(".sets.")
    key = inside.partition(".")[0]
    if key not in _SET_KEYS:
        return False
    module: nn.Module | None = model
    for part in norm_name.split("."):
        # not get_submodule(), which would evaluate a quantized weight of that name
        module = None if module is None else module._modules.get(part)
    return isinstance(module, PerWidthNorm) and key not in module.sets


def check_layers(
    header: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], model: nn.Module
) -> None:
    """Check the layer map against the network and against the row of codes.

    Args:
        header: header of the file.
        shapes: shape of each tensor in the file.
        model: prepared network.

    Raises:
        UserError: layers, codes, planes or scales do not match.
    """
    layers = header["layers"]
    expected = {weight.name: tuple(weight.original.shape) for weight in weight_quantizers(model)}
    given = {layer["name"]: tuple(layer["shape"]) for layer in layers}
    if given != expected or len(given) != len(layers):
        raise UserError("its layer map does not match its network")
    runs = {layer["offset"]: aligned(math.prod(layer["shape"])) for layer in layers}
    end = 0
    for offset, size in sorted(runs.items()):
        if offset != end:
            raise UserError("its layers overlap or leave a gap")
        end += size
    if any(aligned(math.prod(layer["shape"])) != runs[layer["offset"]] for layer in layers):
        raise UserError("two layers of different size share their codes")
    if end != header["codes"]:
        raise UserError(f"its layers have {end} codes, its header gives {header['codes']}")
    for p in range(header["stored_bits"]):
        shape = shapes[f"plane{p}"]
        if len(shape) != 1 or (header["compression"] is None and shape[0] != end // 8):
            raise UserError(f"plane {p} does not have {end // 8} bytes")
    for layer in layers:
        pairs = zip(layer["scale"], layer["shape"], strict=False)
        if len(layer["scale"]) not in (0, len(layer["shape"])) or any(
            s not in (1, n) for s, n in pairs
        ):
            raise UserError(f"the scale of {layer['name']} does not match its weight")
    if shapes["scale"] != (sum(math.prod(layer["scale"]) for layer in layers),):
        raise UserError("its number of scales does not match its header")
