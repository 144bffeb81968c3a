"""Levels: the position of each code in [0, 1], and the weight that it represents.

`top` is M_n = 2^n - 1, the largest code of width n: a number, or a tensor if the width is an input
of an exported graph.

These levels are formulas of the code. Levels that depend on the normalizer are tables, see
`level_tables.py`.

To add a level map, write its function and one row of `LEVELS`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tq_lightning.quant.codes import Top, check_bits


def _endpoint(k: Tensor, top: Top) -> Tensor:
    return k.div_(top)


def _left(k: Tensor, top: Top) -> Tensor:
    return k.div_(top + 1.0)


def _centre(k: Tensor, top: Top) -> Tensor:
    return k.add_(0.5).div_(top + 1.0)


# (codes as float32, which may be overwritten; top) -> levels in [0, 1]
LEVELS: dict[str, Callable[[Tensor, Top], Tensor]] = {
    "endpoint": _endpoint,
    "left": _left,
    "centre": _centre,
}


def codes_to_levels(
    codes: Tensor,
    bits: int,
    level: str = "endpoint",
    out: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Map codes to levels: endpoint k/M_n, left k/2^n, centre (k + 1/2)/2^n, or those of `table`.

    Args:
        codes: uint8 codes of width `bits`, any shape.
        bits: Width n, 1..8.
        level: A key of `LEVELS`. AdaBits (arXiv 1912.09666) calls floor codes with left levels
            "modified" and floor codes with centre levels "centered".
        out: float32 tensor to write to, shape of `codes`; None allocates one.
        table: The level of each code, float32 (2^bits,), used in place of `level`; see
            `level_tables.level_table`.

    Returns:
        float32 levels, shape of `codes`, in [0, 1] except for a table; `out` if it was given.

    Raises:
        ValueError: `bits` is out of range, `level` is unknown, or `out` has another dtype or shape.
    """
    check_bits(bits)
    if table is None and level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; pass one of {', '.join(LEVELS)}")
    if out is not None and (out.dtype != torch.float32 or out.shape != codes.shape):
        raise ValueError(
            f"out must be float32 of shape {tuple(codes.shape)}, "
            f"got {out.dtype} of shape {tuple(out.shape)}"
        )
    if table is not None:
        levels = table[codes.int()]
        return levels if out is None else out.copy_(levels)
    k = codes.to(torch.float32) if out is None else out.copy_(codes)
    return LEVELS[level](k, 2.0**bits - 1)


def dequantize(
    codes: Tensor,
    bits: int,
    scale: Tensor,
    level: str = "endpoint",
    out: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Map codes to weights: scale * (2 level - 1).

    Args:
        codes: uint8 codes of width `bits`, any shape.
        bits: Width n, 1..8.
        scale: float32, broadcastable to the shape of `codes`.
        level: A key of `LEVELS`.
        out: float32 tensor to write to, shape of `codes`; None allocates one.
        table: As in `codes_to_levels`.

    Returns:
        float32 weights, shape of `codes`; `out` if it was given.

    Raises:
        ValueError: As in `codes_to_levels`.
    """
    return levels_to_weights(codes_to_levels(codes, bits, level, out, table), scale)


def levels_to_weights(levels: Tensor, scale: Tensor) -> Tensor:
    """Map levels in [0, 1] to weights, in place: scale * (2 level - 1)."""
    return levels.mul_(2.0).sub_(1.0).mul_(scale)
