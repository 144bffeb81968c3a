"""Bytes of each layer of a prepared model, by kind: codes, scales, float tensors, norms.

The accounting uses a prepared model, so `prepare` decides which layers are quantized and which
norms are switchable.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tq_lightning.quant.bit_planes import aligned, plane_bytes
from tq_lightning.quant.layers import is_embedding
from tq_lightning.quant.normalizers import NORMALIZERS
from tq_lightning.quant.switchable_norm import FLOAT, PerWidthNorm
from tq_lightning.quant.weight import WeightQuantizer

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Row:
    """A layer in bytes.

    Attributes:
        name: name of the layer.
        kind: conv, linear, embedding, norm or other.
        shape: shape of its (first) weight.
        parameters: parameters of the layer in the float network; tied parameters count once.
        codes: number of quantized weights among them.
        bits: their stored width; None without quantized weights.
        plane: bytes of one bit plane of the layer, with the padding of the file.
        scales: bytes of its scales.
        floats: bytes of biases and weights left in float.
        tables: bytes that only a packed file has: constants and index tables, which the code of the
            network could recompute, and a tied float tensor under its second name.
        norm_set: bytes of one norm set: parameters and statistics.
        sets: number of norm sets.
        levels: True if the level tables of the file count with the scales of this layer: the first
            quantized layer, if levels are tables.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    codes: int
    bits: int | None
    plane: int
    scales: int
    floats: int
    tables: int
    norm_set: int
    sets: int
    levels: bool = False


def layer_rows(model: nn.Module) -> list[Row]:
    """Return a row for each layer of a prepared model that stores something, in model order."""
    seen: set[int] = set()
    candidates = (_row(name or "(root)", module, seen) for name, module in _layers(model))
    rows = [
        row
        for row in candidates
        if row.codes or row.scales or row.floats or row.tables or row.norm_set
    ]
    first = next((row for row in rows if row.levels), None)
    return [replace(row, levels=row is first) for row in rows]


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the network before prepare(), without parts added inside a layer."""
    yield name, module
    if isinstance(module, PerWidthNorm):
        return
    for child_name, child in module.named_children():
        if child_name != "parametrizations":
            yield from _layers(child, f"{name}.{child_name}" if name else child_name)


def _row(name: str, module: nn.Module, seen: set[int]) -> Row:
    many = isinstance(module, PerWidthNorm)
    chains = getattr(module, "parametrizations", {}).values()
    quantizers = [(c.original, c[0]) for c in chains if isinstance(c[0], WeightQuantizer)]
    weights = [w for w, _ in quantizers if id(w) not in seen]  # tied weights share their codes
    seen.update(id(w) for w in weights)
    kept, tables = _kept(module, seen)
    parameters = [p for p in [*weights, *kept] if isinstance(p, nn.Parameter)]
    kind = "norm" if many else _kind(module)
    kept_bytes = sum(_stored_bytes(t) for t in kept)
    return Row(
        name,
        kind,
        shape=next((tuple(t.shape) for t in [*weights, *kept]), ()),
        parameters=sum(p.numel() for p in parameters),
        codes=sum(w.numel() for w in weights),
        bits=next((q.width.max_bits for _, q in quantizers), None),
        plane=sum(plane_bytes(aligned(w.numel())) for w in weights),
        scales=sum(FLOAT_BYTES * _scale_count(w, q) for w, q in quantizers),
        floats=0 if kind == "norm" else kept_bytes,
        tables=tables,
        norm_set=kept_bytes if kind == "norm" else 0,
        sets=len(module.sets) - 1 if many else int(kind == "norm"),  # type: ignore[arg-type]
        levels=any(q.tables[1] is not None for _, q in quantizers),
    )


def _kept(module: nn.Module, seen: set[int]) -> tuple[list[Tensor], int]:
    """Return the float tensors of a layer (for a norm, of one set), and the bytes of its tables.

    The counter of batch norms does not affect outputs and is not stored.
    """
    kept: list[Tensor] = []
    tables = 0
    sets = len(module.sets) - 1 if isinstance(module, PerWidthNorm) else 1
    for part in module.sets[FLOAT].modules() if isinstance(module, PerWidthNorm) else [module]:
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is None or name == "num_batches_tracked":
                continue
            passing = name in part._non_persistent_buffers_set
            if tensor.is_floating_point() and not passing and id(tensor) not in seen:
                kept.append(tensor)
            else:
                tables += _stored_bytes(tensor) * sets
            seen.add(id(tensor))
    return kept, tables


def _stored_bytes(tensor: Tensor) -> int:
    """Return the bytes in a packed file, which supports float32, float64 and int64."""
    wide = tensor.dtype == torch.float64 or not tensor.is_floating_point()
    return tensor.numel() * (8 if wide else FLOAT_BYTES)


def _scale_count(weight: Tensor, quantizer: WeightQuantizer) -> int:
    """Return the number of scales: one per tensor, or one per channel and leading dimension."""
    return (
        math.prod(weight.shape[: quantizer.channel_dim + 1])
        if NORMALIZERS[quantizer.normalizer].per_channel
        else 1
    )


def _kind(module: nn.Module) -> str:
    if isinstance(module, _ConvNd):
        return "conv"
    if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
        return "linear"
    if is_embedding(module):
        return "embedding"
    return "norm" if "Norm" in type(module).__name__ else "other"
