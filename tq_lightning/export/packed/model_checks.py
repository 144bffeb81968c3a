"""Checks of the header of a packed file against the network that it describes.

All of them run before any plane is unpacked.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tq_lightning.errors import UserError
from tq_lightning.export.packed.header import WIDTH_KEYS
from tq_lightning.export.packed.sections import file_names, named_tensors, second_names
from tq_lightning.quant.bit_planes import aligned
from tq_lightning.quant.level_tables import LEVEL_TABLES
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.quant.switchable_norm import PerWidthNorm


def check_parameters(header: Mapping[str, Any], names: set[str], model: nn.Module) -> None:
    """Check that a file has all tensors of its network, before the network is prepared.

    Preparing a network takes much longer than creating it, so mismatches are found first.

    Args:
        header: header of the file.
        names: names of the tensors in the file.
        model: float network, not yet prepared.

    Raises:
        UserError: the network has other tensors than the file.
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
        raise UserError("the layer map of the file does not match the network")


def _mismatch(header: Mapping[str, Any], missing: set[str], extra: set[str]) -> UserError:
    differences = [
        f"{verb} {', '.join(sorted(names)[:2])}"
        for verb, names in (("lacks", missing), ("adds", extra))
        if names
    ]
    if header["model"].get("name") is None:
        return UserError(
            f"the file {' and '.join(differences)} compared with the network passed as model=; "
            "pass the network that the file was written from"
        )
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
        UserError: tensors are missing or unexpected.
    """
    folded = (".running_mean", ".running_var") if header["folded"] else ()
    in_model = file_names(model)
    _check_float64(names, in_model)
    expected = {name for _, _, name in in_model if not name.startswith("norm")} | {"scale"}
    expected |= {f"norm{n}" for n in header["norm_widths"] if header["norms"]}
    expected |= {f"plane{p}" for p in range(header["stored_bits"])}
    if header["prepare"].get("level") in LEVEL_TABLES:
        expected |= {f"levels{n}" for n in range(1, header["stored_bits"] + 1)}
    missing = expected - names
    allowed = second_names(model)
    extra = {
        name
        for name in names - expected
        if name.partition("/")[2] not in allowed and not _of_unbuilt_set(name, model)
    }
    if header["norm_widths"]:
        # all sets have the same layout, so checking one of them is enough
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


def _check_float64(names: set[str], in_model: list[tuple[str, torch.Tensor, str]]) -> None:
    """Check that file and network agree on the tensors that are float64.

    Raises:
        UserError: a tensor is float64 in only one of them, e.g. after `model.double()`.
    """
    in_file = {name.partition("/")[2]: name.startswith("float64/") for name in names}
    for full, value, _ in in_model:
        wide = value.dtype == torch.float64
        if value.is_floating_point() and in_file.get(full, wide) != wide:
            one, two = ("network", "file") if wide else ("file", "network")
            raise UserError(
                f"{full} is float64 in the {one}, but not in the {two}; pass model.float() to "
                "save_packed, or a model= of the type of the file to load_packed"
            )


def _of_unbuilt_set(name: str, model: nn.Module) -> bool:
    """Check if a file name ("float64/bn1.sets.3.weight") is of a norm set that was not built."""
    norm_name, _, inside = name.partition("/")[2].partition(".sets.")
    key = inside.partition(".")[0]
    if key not in WIDTH_KEYS:
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
        raise UserError("the layer map of the file does not match the network")
    runs = {layer["offset"]: aligned(math.prod(layer["shape"])) for layer in layers}
    end = 0
    for offset, size in sorted(runs.items()):
        if offset != end:
            raise UserError("the layers of the file overlap or leave a gap")
        end += size
    if any(aligned(math.prod(layer["shape"])) != runs[layer["offset"]] for layer in layers):
        raise UserError("two layers of different size share their codes")
    if end != header["codes"]:
        raise UserError(f"the layers have {end} codes, the header gives {header['codes']}")
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
        raise UserError("the number of scales in the file does not match its header")
