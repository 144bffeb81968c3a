"""Sections of a packed file: where each tensor is stored, and the sections that a width needs.

In file order: "int", "float64" and "float" (tensors that are not quantized), "levels1".."levels8"
(one table of levels per width, if levels are tables), "norm1".."norm8" (one set of norms per
width), "scale", and "plane0".."plane7" (most significant plane first, the codes of all layers in
one row). Running at n bits takes "levels<n>", "norm<n>", the first n planes, and all sections that
do not depend on the width.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError
from tq_lightning.export.packed.compression import CODING, compress_plane
from tq_lightning.export.packed.entries import section_of
from tq_lightning.quant.codes import STORED_BITS
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.quant.switchable_norm import FLOAT, PerWidthNorm


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of every module, under its first name.

    A tensor that several modules share has several names.
    """
    modules = list(model.named_modules())
    for kind in ("_parameters", "_buffers"):
        for prefix, module in modules:
            for leaf, value in getattr(module, kind).items():
                if value is not None:
                    yield f"{prefix}.{leaf}" if prefix else leaf, value


def second_names(model: nn.Module) -> set[str]:
    """Return the other names of the tensors of modules that have several names.

    Files written before modules were stored once have the tensors under these names too.
    """
    first = {name for name, _ in named_tensors(model)}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    every |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return every - first


def file_names(model: nn.Module) -> list[tuple[str, Tensor, str]]:
    """List the tensors of a prepared model that a file stores unquantized.

    Quantized weights, the float set of per-width norms, and the counters of batch norms (which do
    not affect outputs) are omitted. Non-persistent buffers are included, so that a reader needs no
    second source for any value.

    Returns:
        (name in the model, tensor, name in the file) in model order.
    """
    norms = {name for name, module in model.named_modules() if isinstance(module, PerWidthNorm)}
    # by name, not identity: an embedding tied to a quantized classifier is itself used in float
    quantized = {
        f"{weight.name.removesuffix(weight.tensor)}parametrizations.{weight.tensor}.{leaf}"
        for weight in weight_quantizers(model)
        for leaf in ("original", "0.range")  # "scale" holds a learned range
    }
    found = []
    for full, value in named_tensors(model):
        owner, _, leaf = full.rpartition(".")
        # the norm sets in the file are the calibrated ones, so the flag is redundant
        if leaf == "num_batches_tracked" or (leaf == "calibrated" and owner in norms):
            continue
        if full in quantized:
            continue
        kind = "float" if value.is_floating_point() else "int"
        if value.dtype == torch.float64:
            kind = "float64"
        name = f"{kind}/{full}"
        norm, _, inside = full.partition(".sets.")
        if norm in norms:
            key, _, rest = inside.partition(".")
            if key == FLOAT:
                continue
            if kind == "float":
                name = f"norm{key}/{norm}.{rest}"
        found.append((full, value, name))
    return found


def merge_norms(
    tensors: Mapping[str, np.ndarray],
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Join the tensors of each norm set into one row.

    A norm set of ResNet-50 has 212 tensors. For eight widths, their names would take more
    than a tenth of the bytes of a plane.

    Args:
        tensors: arrays by file name, e.g. "norm4/bn1.weight".

    Returns:
        The layout of every row, [{"name", "shape"}, ...], and the arrays with the rows "norm4", ...
    """
    merged = {name: array for name, array in tensors.items() if not name.startswith("norm")}
    layout: list[dict[str, Any]] = []
    for section in sorted({section_of(name) for name in tensors if name not in merged}):
        own = {
            name.removeprefix(f"{section}/"): array
            for name, array in tensors.items()
            if section_of(name) == section
        }
        layout = [{"name": name, "shape": list(array.shape)} for name, array in own.items()]
        merged[section] = np.concatenate([array.reshape(-1) for array in own.values()])
    return layout, merged


def split_norms(
    header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Undo `merge_norms`: "norm4" becomes "norm4/bn1.weight", and so on.

    Raises:
        UserError: a norm set does not have the size that the layout in the header gives.
    """
    result = {}
    for name, array in tensors.items():
        if not name.startswith("norm"):
            result[name] = array
            continue
        ends = np.cumsum([math.prod(part["shape"]) for part in header["norms"]])
        if array.ndim != 1 or array.dtype != np.float32 or ends[-1] != array.size:
            raise UserError(
                f"norm set {name!r} does not have the size given in the header; export it again"
            )
        for part, values in zip(header["norms"], np.split(array, ends[:-1]), strict=True):
            result[f"{name}/{part['name']}"] = values.reshape(part["shape"])
    return result


def sections_above(bits: int) -> set[str]:
    """Return the sections that a file with only the first `bits` planes lacks."""
    planes = {f"plane{n}" for n in range(bits, STORED_BITS)}
    wider = range(bits + 1, STORED_BITS + 1)
    return planes | {f"{kind}{n}" for kind in ("norm", "levels") for n in wider}


def keep_planes(
    header: Mapping[str, Any], tensors: Mapping[str, np.ndarray], bits: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header and tensors of the first `bits` planes, with the norm sets up to `bits`."""
    dropped = sections_above(bits)
    kept = {name: array for name, array in tensors.items() if section_of(name) not in dropped}
    widths = [n for n in header["norm_widths"] if n <= bits]
    return {**header, "stored_bits": bits, "norm_widths": widths}, kept


def compress_planes(
    header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header and tensors with every plane compressed to a zstd frame."""
    first = tensors["plane0"]
    frames = {
        name: compress_plane(array, None if name == "plane0" else first)
        for name, array in tensors.items()
        if name.startswith("plane")
    }
    return {**header, "compression": CODING}, {**tensors, **frames}


def section_sizes(tensors: Mapping[str, np.ndarray], total: int) -> dict[str, int]:
    """Return the bytes per section, with "header" (all bytes outside of tensors) and "total"."""
    sizes: dict[str, int] = {}
    for name, array in tensors.items():
        section = section_of(name)
        sizes[section] = sizes.get(section, 0) + array.nbytes
    header = total - sum(sizes.values())
    return {"header": header, **dict(sorted(sizes.items())), "total": total}
