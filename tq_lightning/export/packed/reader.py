"""load_packed(): a packed file -> a model that runs at the widths whose planes were read.

The network is built on the meta device, without memory or initialisation, and every tensor of it then comes from the
file. What the header says is compared with that network before a plane is unpacked: a file that does not fit ends in an
error, never in a model.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError
from tq_lightning.export.packed.compression import decompress_plane
from tq_lightning.export.packed.container import Container
from tq_lightning.export.packed.module import MODES, PackedWeight, attach
from tq_lightning.export.packed.schema import (
    cast,
    check_layers,
    check_names,
    file_names,
    named_tensors,
    read_header,
)
from tq_lightning.export.packed.sections import split_norms
from tq_lightning.export.packed.skeleton import build_skeleton
from tq_lightning.quant.bit_planes import unpack_planes
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.switchable_norm import per_width_norms
from tq_lightning.quant.weight import weight_quantizers


def load_packed(
    path: str | Path,
    bits: int | None = None,
    model: nn.Module | None = None,
    mode: str = "resident",
) -> nn.Module:
    """Builds the model of a packed file, in evaluation mode, reading what the width needs and no more.

    Args:
        path: file written by `save_packed`.
        bits: the one width to load for: its planes, its norm set; None = all stored planes and sets, and
            `bit_width(model, n)` then switches without touching the file. It starts at the widest width loaded.
        model: the float (or equally prepared) network to fill, changed in place; None = the header's, by timm's name.
        mode: "resident" keeps the weights of the width in use at hand; "lean" makes them layer by layer at every use.

    Returns:
        The model; `model.tq_file` holds the file's header, "path", "file_bytes" and "bytes_read".

    Raises:
        UserError: no such width or mode; a file that is damaged, foreign, newer, or does not fit its network.
    """
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}; pass one of {', '.join(MODES)}")
    with Container(path) as file:
        header = read_header(file)
        stored = header["stored_bits"]
        if bits is not None and (type(bits) is not int or not 1 <= bits <= stored):
            raise UserError(
                f"{path} stores {stored} bit planes; pass bits from 1 to {stored}, or None for all, got {bits!r}"
            )
        shapes = {name: entry.shape for name, entry in file.entries.items()}
        planes = stored if bits is None else bits
        try:
            held = sum(math.prod(layer["shape"]) for layer in header["layers"])
            held += sum(math.prod(shape) for shape in shapes.values())
            count = len(header["layers"]) + len(shapes) + len(header["norms"])
            wanted_sets = header["norm_widths"] if bits is None else [bits]
            model = build_skeleton(header, model, wanted_sets, (count, held))
            if stored > width_of(model).max_bits:
                raise UserError(f"it has {stored} planes of {width_of(model).max_bits}-bit codes")
            check_names(header, set(shapes), model)
            check_layers(header, shapes, model)
            widths = _widths(header, model, bits)
        except ValueError as error:
            raise UserError(f"{path} cannot be loaded: {error}") from error
        wanted = [s for s in file.sections if not s.startswith(("plane", "norm"))]
        wanted += [f"norm{n}" for n in widths if f"norm{n}" in file.sections]
        floats = {name: array for section in wanted for name, array in file.read(section).items()}
        width = width_of(model)
        width.packed, width.default_source = True, "truncate"
        width.bits, width.source = max(widths), "truncate"
        _fill(model, header, split_norms(header, floats), widths)
        _attach_codes(
            model, header, floats["scale"], _read_codes(file, header, planes), planes, widths, mode
        )
        model.tq_file = {  # type: ignore[assignment]
            **{
                key: header[key]
                for key in ("model", "preprocessing", "class_names", "prepare", "stored_bits")
            },
            "path": str(path),
            "file_bytes": file.size,
            "bytes_read": file.bytes_read,
        }
    left = [name for name, value in named_tensors(model) if value.is_meta]
    if left:
        raise UserError(
            f"{path} holds no values for {', '.join(left[:3])}; pass the network itself as model="
        )
    return model.eval().requires_grad_(False)


def _widths(header: Mapping[str, Any], model: nn.Module, bits: int | None) -> list[int]:
    """The widths that the loaded model can run at."""
    usable = (
        header["norm_widths"]
        if per_width_norms(model)
        else list(range(1, header["stored_bits"] + 1))
    )
    if bits is None and usable:
        return usable
    if bits not in usable:
        raise UserError(
            f"it has no norm statistics for {bits or 'any'} bits, only for {usable}; "
            "call calibrate_norms(model, batches) before exporting"
        )
    return [bits]  # type: ignore[list-item]


def _read_codes(file: Container, header: Mapping[str, Any], bits: int) -> Tensor:
    """The first `bits` planes as one row of codes of that width: uint8 (codes,)."""
    planes: list[np.ndarray] = []
    for p in range(bits):
        plane = file.read(f"plane{p}")[f"plane{p}"]
        if header["compression"] is not None:
            plane = decompress_plane(plane, planes[0] if planes else None, header["codes"] // 8)
        planes.append(plane)
    return torch.from_numpy(unpack_planes(planes, header["codes"]))


def _owner(model: nn.Module, full: str) -> tuple[nn.Module, str]:
    parent, _, leaf = full.rpartition(".")
    return model.get_submodule(parent), leaf


def _put(module: nn.Module, leaf: str, value: Tensor) -> None:
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def _fill(
    model: nn.Module, header: Mapping[str, Any], floats: Mapping[str, np.ndarray], widths: list[int]
) -> None:
    """Every tensor that is not quantized, from the file; norm sets of other widths go."""
    for full, value, name in file_names(model):
        module, leaf = _owner(model, full)
        if name.startswith("norm") and int(name[4]) not in widths:
            continue
        if name in floats:
            array = floats[name]
            if array.shape != tuple(value.shape):
                raise UserError(
                    f"{full} is {tuple(array.shape)} in the file, {tuple(value.shape)} in its network"
                )
            filled = torch.tensor(array)
        else:  # a folded batch norm: weight and bias say all
            filled = torch.full(
                value.shape, 0.0 if leaf == "running_mean" else 1.0 - float(module.eps)
            )  # type: ignore[arg-type]
        _put(module, leaf, cast(header, full, filled, value.dtype))
    for full, value in list(named_tensors(model)):
        if full.endswith("num_batches_tracked"):
            module, leaf = _owner(model, full)
            _put(module, leaf, torch.zeros(value.shape, dtype=torch.long))
    for norm in per_width_norms(model):
        for key in set(norm.sets) - {str(n) for n in widths}:
            del norm.sets[key]
        norm.calibrated = torch.tensor([n in widths for n in range(norm.width.max_bits + 1)])


def _attach_codes(
    model: nn.Module,
    header: Mapping[str, Any],
    scales: np.ndarray,
    codes: Tensor,
    planes: int,
    widths: list[int],
    mode: str,
) -> None:
    """Codes in the place of every float parameter."""
    width, start = width_of(model), 0
    found = {weight.name: weight for weight in weight_quantizers(model)}
    for layer in header["layers"]:
        full, offset, count = layer["name"], layer["offset"], math.prod(layer["scale"])
        weight = found[full]
        part = codes[offset : offset + math.prod(layer["shape"])].view(layer["shape"])
        scale = torch.tensor(scales[start : start + count]).view(layer["scale"])
        start += count
        dtype = cast(header, full, torch.empty(0), torch.float32).dtype
        level = weight.quantizer.level
        packed = PackedWeight(full, width, planes, widths, level, scale, dtype, mode)
        attach(weight.module, weight.tensor, part, packed)
