"""Integer arithmetic of quantization: codes, their truncation, and their levels.

Training, evaluation and export all call these functions, so every formula exists once. `u` is the
normalized weight or the clipped activation, float32 in [0, 1]. `top` is M_n = 2^n - 1, the largest
code of width n: a number, or a tensor if the width is an input of an exported graph.

A product with 2^n is exact in float32. Hence, for every u in [0, 1] and every n <= N,

    floor_codes(u, n) == floor_codes(u, N) >> (N - n)

(TruncQuant, arXiv 2506.11431). `round_codes` has no such identity for 1 < n < N. At n = 1,
only u = 1/2 violates it.

To add a quantizer or a level map, write its functions and one row of `QUANTIZERS` or `LEVELS`.
Levels that depend on the normalizer are tables, see `level_tables.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STORED_BITS = 8

Top = float | Tensor


def check_bits(bits: int, name: str = "bits") -> None:
    """Raise ValueError unless `bits` is an integer from 1 to 8; the message calls it `name`."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= STORED_BITS:
        raise ValueError(f"{name} must be an integer from 1 to {STORED_BITS}, got {bits!r}")


@dataclass(frozen=True)
class Quantizer:
    """A row of `QUANTIZERS`: a map from [0, 1] to codes, and everything that depends on it.

    Attributes:
        unclamped_codes: (u, top) -> codes as float32, not yet clamped to [0, top].
        edges: (u, bits) -> (inner bin edge nearest to each `u`, bin width).
        ste: the straight-through estimator that `ste="auto"` selects, a key of `ste.STES`.
        nested: True if the n-bit code always equals the N-bit code shifted right by N - n. The
            sources "quantize" and "truncate" then agree by construction.
        rounding: (extra, offset) with code = round(u (M_n + extra) + offset) except at ties, the
            form that integer kernels compute. None if the quantizer has no such form.
    """

    unclamped_codes: Callable[[Tensor, Top], Tensor]
    edges: Callable[[Tensor, int], tuple[Tensor, float]]
    ste: str
    nested: bool
    rounding: tuple[int, float] | None = None

    def codes(self, u: Tensor, bits: int) -> Tensor:
        """Quantize `u` (float32 in [0, 1], any shape) to uint8 codes of width `bits`."""
        return _to_codes(self.unclamped_codes, u, bits)

    def float_codes(self, u: Tensor, top: Tensor) -> Tensor:
        """Quantize `u` to float32 codes with `top` as a tensor, for ONNX and compiled graphs."""
        return torch.minimum(self.unclamped_codes(u, top).clamp_min_(0.0), top)


def _to_codes(unclamped: Callable[[Tensor, Top], Tensor], u: Tensor, bits: int) -> Tensor:
    check_bits(bits)
    top = 2.0**bits - 1
    return unclamped(u, top).clamp_(0.0, top).to(torch.uint8)


def _unclamped_floor(u: Tensor, top: Top) -> Tensor:
    return torch.mul(u, top + 1.0).floor_()


def _floor_edges(u: Tensor, bits: int) -> tuple[Tensor, float]:
    width = 2.0**-bits
    return (u / width).round().clamp_min(1).clamp_max(2**bits - 1) * width, width


def _unclamped_round(u: Tensor, top: Top) -> Tensor:
    return torch.mul(u, top).round_()


def _round_edges(u: Tensor, bits: int) -> tuple[Tensor, float]:
    top = 2**bits - 1
    return ((u * top - 0.5).round().clamp_min(0).clamp_max(top - 1) + 0.5) / top, 1.0 / top


QUANTIZERS: dict[str, Quantizer] = {
    "floor": Quantizer(
        _unclamped_floor, _floor_edges, ste="scaled", nested=True, rounding=(1, -0.5)
    ),
    "round": Quantizer(
        _unclamped_round, _round_edges, ste="identity", nested=False, rounding=(0, 0.0)
    ),
}


def floor_codes(u: Tensor, bits: int) -> Tensor:
    """Quantize to codes whose bins a right shift merges: k = clamp(floor(2^n u), 0, 2^n - 1).

    Args:
        u: values in [0, 1], any shape, float32.
        bits: width n, 1..8.

    Returns:
        uint8 codes, shape of `u`.

    Raises:
        ValueError: `bits` is not an integer from 1 to 8.

    Source:
        TruncQuant, arXiv 2506.11431.

    Example:
        `floor_codes(0.4, 2)` is 1, and `floor_codes(0.4, 8) >> 6` is 102 >> 6 = 1.
    """
    return _to_codes(_unclamped_floor, u, bits)


def round_codes(u: Tensor, bits: int) -> Tensor:
    """Quantize to codes whose bins are centered on k / M_n: k = round(M_n u), M_n = 2^n - 1.

    Ties round to the even code, as in `torch.round`.

    Args:
        u: values in [0, 1], any shape, float32.
        bits: width n, 1..8.

    Returns:
        uint8 codes, shape of `u`.

    Raises:
        ValueError: `bits` is not an integer from 1 to 8.

    Source:
        DoReFa-Net, arXiv 1606.06160, eq. 5.

    Example:
        `round_codes(0.34, 2)` is 1. `round_codes(0.2, 2)` is 1 too, but `round_codes(0.2, 8) >> 6`
        is 51 >> 6 = 0.
    """
    return _to_codes(_unclamped_round, u, bits)


def truncate_codes(codes: Tensor, from_bits: int, to_bits: int) -> Tensor:
    """Truncate stored codes to fewer bits, as a device does: codes >> (from_bits - to_bits).

    Args:
        codes: uint8 codes of width `from_bits`, any shape.
        from_bits: stored width N, 1..8.
        to_bits: target width n, 1..N.

    Returns:
        uint8 codes of width `to_bits`, shape of `codes`; `codes` itself if both widths are equal.

    Raises:
        ValueError: a width is out of range, or `to_bits` is greater than `from_bits`.
        TypeError: `codes` is not uint8.

    Source:
        TruncQuant, arXiv 2506.11431.

    Example:
        The 8-bit code 102 is the 2-bit code 102 >> 6 = 1.
    """
    check_bits(from_bits, "from_bits")
    check_bits(to_bits, "to_bits")
    if to_bits > from_bits:
        raise ValueError(
            f"cannot truncate {from_bits}-bit codes to {to_bits} bits; pass to_bits <= {from_bits}"
        )
    if codes.dtype != torch.uint8:
        raise TypeError(
            f"codes must be uint8, got {codes.dtype}; make them with floor_codes or round_codes"
        )
    shift = from_bits - to_bits
    return codes if shift == 0 else codes >> shift


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
        bits: width n, 1..8.
        level: a key of `LEVELS`. AdaBits (arXiv 1912.09666) calls floor codes with left levels
            "modified" and floor codes with centre levels "centered".
        out: float32 tensor to write to, shape of `codes`; None allocates one.
        table: the level of each code, float32 (2^bits,), used in place of `level`; see
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
        bits: width n, 1..8.
        scale: float32, broadcastable to the shape of `codes`.
        level: a key of `LEVELS`.
        out: float32 tensor to write to, shape of `codes`; None allocates one.
        table: as in `codes_to_levels`.

    Returns:
        float32 weights, shape of `codes`; `out` if it was given.

    Raises:
        ValueError: as in `codes_to_levels`.
    """
    return levels_to_weights(codes_to_levels(codes, bits, level, out, table), scale)


def levels_to_weights(levels: Tensor, scale: Tensor) -> Tensor:
    """Map levels in [0, 1] to weights, in place: scale * (2 level - 1)."""
    return levels.mul_(2.0).sub_(1.0).mul_(scale)
