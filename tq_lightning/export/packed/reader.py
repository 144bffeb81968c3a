"""load_packed(): a packed file -> a model that runs at the widths whose planes were read.

The network is built on the meta device, without memory or initialization, and then filled from the
file. The header is compared with that network before any plane is unpacked, so a file that does not
fit raises an error first.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError
from tq_lightning.export.packed.compression import decompress_plane
from tq_lightning.export.packed.container import Container
from tq_lightning.export.packed.header import read_header
from tq_lightning.export.packed.load_tensors import cast_to_header_dtype, fill_unquantized
from tq_lightning.export.packed.model_checks import check_layers, check_names, check_parameters
from tq_lightning.export.packed.sections import named_tensors, split_norms
from tq_lightning.export.packed.size_limits import SizeLimits
from tq_lightning.export.packed.skeleton import check_args, create_skeleton, prepare_skeleton
from tq_lightning.export.packed.weight import MODES, PackedWeight, attach_packed_weight
from tq_lightning.factories import only_allow
from tq_lightning.quant.activation_ranges import ActivationRange
from tq_lightning.quant.bit_planes import unpack_planes
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.integer import integer_model
from tq_lightning.quant.integer.kernels import missing_kernels
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.quant.switchable_norm import per_width_norms

_KEPT_FIELDS = ("model", "preprocessing", "class_names", "prepare", "stored_bits")


def load_packed(
    path: str | Path,
    bits: int | None = None,
    model: nn.Module | str | None = None,
    mode: str = "resident",
) -> nn.Module:
    """Load a packed file as a model in evaluation mode. Reads only the planes that it needs.

    Args:
        path: file written by `save_packed`.
        bits: load this width only, with its planes and its norm set. None loads all stored
            planes and norm sets; `bit_width(model, n)` then switches without reading the file
            again. The model starts at the widest width loaded.
        model: float network (or one prepared with the same options) to fill in place. None builds
            the timm model that the header names. If the header names a factory,
            package.module:function, pass the same name here; it is not imported otherwise.
        mode: "resident" keeps the weights of the width in use in memory. "lean" computes them
            layer by layer at every use. "integer" runs integer kernels on CPU and returns an
            `IntegerModel`; the file needs activation ranges, or a network trained with
            `activations=`. If PyTorch has no integer kernels, a warning is issued and the mode is
            "resident".

    Returns:
        The model. `model.tq_ranges` holds the activation ranges of the file. `model.tq_file` holds
        the header fields "model", "preprocessing", "class_names", "prepare" and "stored_bits", and
        "path", "file_bytes" and "bytes_read".

    Raises:
        UserError: an unknown width or mode; the file is not a packed file, is damaged or newer, or
            does not fit its network; mode "integer" without activation ranges.
    """
    if mode not in MODES:
        raise UserError(f"unknown mode {mode!r}; pass one of {', '.join(MODES)}")
    if mode == "integer" and (reason := missing_kernels()) is not None:
        warnings.warn(
            f"mode='integer' is not available ({reason}); using mode='resident'", stacklevel=2
        )
        mode = "resident"
    with Container(path) as file:
        header = read_header(file)
        stored = header["stored_bits"]
        if bits is not None and (type(bits) is not int or not 1 <= bits <= stored):
            raise UserError(
                f"{path} stores {stored} bit planes; pass bits from 1 to {stored}, or None for "
                f"all, got {bits!r}"
            )
        planes = stored if bits is None else bits
        try:
            if isinstance(model, str):
                model = _own_network(header["model"], model, path)
            model = _matching_skeleton(file, header, model, bits)
            widths = _usable_widths(header, model, bits)
        except ValueError as error:
            raise UserError(f"{path} can't be loaded: {error}") from error
        sections = [s for s in file.sections if not s.startswith(("plane", "norm", "levels"))]
        per_width = [f"{kind}{n}" for kind in ("levels", "norm") for n in widths]
        sections += [s for s in per_width if s in file.sections]
        arrays = {name: array for s in sections for name, array in file.read(s).items()}
        width = width_of(model)
        width.packed, width.default_source = True, "truncate"
        width.bits, width.source = max(widths), "truncate"
        fill_unquantized(model, header, split_norms(header, arrays), widths)
        codes = unpack_planes(read_planes(file, header, planes), header["codes"])
        tables = {n: arrays[f"levels{n}"] for n in widths if f"levels{n}" in arrays}
        checked = {n: check_table(file, n, table) for n, table in tables.items()}
        _attach_codes(
            model, header, arrays["scale"], torch.from_numpy(codes), planes, widths, mode, checked
        )
        ranges = header.get("activation_ranges", {})
        model.tq_ranges = {name: ActivationRange(*pair) for name, pair in ranges.items()}  # type: ignore[assignment]
        model.tq_file = {  # type: ignore[assignment]
            **{key: header[key] for key in _KEPT_FIELDS},
            "inputs": header.get("inputs"),
            "path": str(path),
            "file_bytes": file.size,
            "bytes_read": file.bytes_read,
        }
    empty = [name for name, value in named_tensors(model) if value.is_meta]
    if empty:
        raise UserError(
            f"{path} has no values for {', '.join(empty[:3])}; pass the network itself as model="
        )
    model = model.eval().requires_grad_(False)
    return integer_model(model) if mode == "integer" else model


def _own_network(spec: Mapping[str, Any], name: str, path: str | Path) -> nn.Module:
    """Call the factory `name`, which must also be the name in the header."""
    from tq_lightning.models import create_model

    stored, args = spec.get("name"), spec.get("args")
    if stored != name:
        raise UserError(
            f"its network is {str(stored)[:60]!r}, got model={name!r}; pass the name of its "
            "network, or the network itself"
        )
    check_args(args, own=True)
    with only_allow(name, path):
        return create_model(name, **args)  # type: ignore[arg-type]


def _matching_skeleton(
    file: Container, header: Mapping[str, Any], model: nn.Module | None, bits: int | None
) -> nn.Module:
    """Build the prepared network of a file and check the names and shapes of its tensors."""
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    if model is None:
        tensors = len(header["layers"]) + len(shapes) + len(header["norms"])
        numbers = header["codes"] + sum(math.prod(shape) for shape in shapes.values())
        model = create_skeleton(header["model"], SizeLimits(tensors, numbers))
        check_parameters(header, set(shapes), model)
    norm_sets = header["norm_widths"] if bits is None else [bits]
    model = prepare_skeleton(model, header["prepare"], norm_sets)
    stored, max_bits = header["stored_bits"], width_of(model).max_bits
    if stored > max_bits:
        raise UserError(f"it has {stored} planes of {max_bits}-bit codes")
    check_names(header, set(shapes), model)
    check_layers(header, shapes, model)
    return model


def read_planes(file: Container, header: Mapping[str, Any], bits: int) -> list[np.ndarray]:
    """Read the first `bits` planes, decompressed.

    Returns:
        Arrays of uint8 (codes / 8,), most significant plane first.

    Raises:
        UserError: a plane is missing, damaged, or has another size.
    """
    size = header["codes"] // 8
    planes: list[np.ndarray] = []
    for p in range(bits):
        plane = file.read(f"plane{p}").get(f"plane{p}")
        if plane is not None and header["compression"] is not None:
            plane = decompress_plane(plane, planes[0] if planes else None, size)
        if plane is None or plane.shape != (size,):
            raise file.damaged(f"plane{p} does not have {size} bytes")
        planes.append(plane)
    return planes


def _attach_codes(
    model: nn.Module,
    header: Mapping[str, Any],
    scales: np.ndarray,
    codes: Tensor,
    planes: int,
    widths: list[int],
    mode: str,
    tables: Mapping[int, Tensor],
) -> None:
    """Replace every quantized float parameter by its codes and scale.

    Args:
        model: prepared network.
        header: header of the file, with the layer map.
        scales: float32 (n,), the scales of all layers in one row.
        codes: uint8 (codes,), the codes of all layers in one row.
        planes: width of the codes.
        widths: widths that the model will run at.
        mode: see `load_packed`.
        tables: {width: its levels, float32 (2^width,)}; empty if the levels are a formula.
    """
    width, start = width_of(model), 0
    weights = {weight.name: weight for weight in weight_quantizers(model)}
    for layer in header["layers"]:
        full, offset, count = layer["name"], layer["offset"], math.prod(layer["scale"])
        weight = weights[full]
        own = codes[offset : offset + math.prod(layer["shape"])].view(layer["shape"])
        scale = torch.tensor(scales[start : start + count]).view(layer["scale"])
        start += count
        dtype = cast_to_header_dtype(header, full, torch.empty(0), torch.float32).dtype
        level = weight.quantizer.level
        packed = PackedWeight(full, width, planes, widths, level, scale, dtype, mode, tables)
        attach_packed_weight(weight.module, weight.tensor, own, packed)


def check_table(file: Container, bits: int, table: np.ndarray) -> Tensor:
    """Check that the levels of a width are finite, sorted and near [0, 1].

    Returns:
        The levels, float32 (2^bits,).

    Raises:
        UserError: the levels are invalid.
    """
    if not np.isfinite(table).all() or np.any(np.diff(table) < 0) or np.abs(table).max() > 4:
        raise file.damaged(f"its table of {bits}-bit levels is not sorted or out of range")
    return torch.tensor(table)


def _usable_widths(header: Mapping[str, Any], model: nn.Module, bits: int | None) -> list[int]:
    """Return the widths that the loaded model can run at."""
    usable = list(range(1, header["stored_bits"] + 1))
    if per_width_norms(model):
        usable = header["norm_widths"]
    if bits is None and usable:
        return usable
    if bits is None or bits not in usable:
        raise UserError(
            f"it has no norm statistics for {bits or 'any'} bits, only for {usable}; "
            "call calibrate_norms(model, batches) before exporting"
        )
    return [bits]
