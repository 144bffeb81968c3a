"""Integers: the code of a value at a width, the shift that narrows a code, the level a code stands for.

Training, evaluation and export all call the functions of this file; there is no second formula anywhere. `u` is the
normalised weight or clipped activation in [0, 1], float32. A product with 2^n is exact in float32, hence

    floor_codes(u, n) == floor_codes(u, N) >> (N - n)     for every u in [0, 1] and every n <= N

exactly (TruncQuant, arXiv 2506.11431), while `round_codes` has no such identity for 1 < n < N.

To add a quantizer, write its code function and its bin-edge function and add a row to `QUANTIZERS` and `BIN_EDGES`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

STORED_BITS = 8


def check_bits(bits: int, name: str = "bits") -> None:
    """Raises ValueError, which calls the width `name`, for anything but a whole number from 1 to `STORED_BITS`."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= STORED_BITS:
        raise ValueError(f"{name} must be a whole number from 1 to {STORED_BITS}, got {bits!r}")


def floor_codes(u: Tensor, bits: int) -> Tensor:
    """Codes whose bins are the bins of a right shift: k = clamp(floor(2^n u), 0, 2^n - 1).

    Args:
        u: values in [0, 1], any shape, float32.
        bits: width n, 1..8.

    Returns:
        uint8 codes of the shape of `u`.

    Raises:
        ValueError: `bits` is no whole number from 1 to 8.

    Source: TruncQuant, arXiv 2506.11431. Example: `floor_codes(0.4, 2)` is 1, and `floor_codes(0.4, 8) >> 6` is 102 >> 6 = 1.
    """
    check_bits(bits)
    return torch.mul(u, 2.0**bits).floor_().clamp_(0, 2**bits - 1).to(torch.uint8)


def round_codes(u: Tensor, bits: int) -> Tensor:
    """Codes whose bins are centred on k / M_n: k = round(M_n u), M_n = 2^n - 1 (half to even, as in PyTorch).

    Args, returns and errors as in `floor_codes`. Source: DoReFa-Net, arXiv 1606.06160, eq. 5.
    Example: `round_codes(0.34, 2)` is 1, but `round_codes(0.2, 2)` is 1 while `round_codes(0.2, 8) >> 6` is 51 >> 6 = 0.
    """
    check_bits(bits)
    top = 2**bits - 1
    return torch.mul(u, float(top)).round_().clamp_(0, top).to(torch.uint8)


def truncate_codes(codes: Tensor, from_bits: int, to_bits: int) -> Tensor:
    """Narrows stored codes as a device does: codes >> (from_bits - to_bits).

    Args:
        codes: uint8 codes of width `from_bits`, any shape.
        from_bits: stored width N, 1..8.
        to_bits: wanted width n, 1..N.

    Returns:
        uint8 codes of width `to_bits`, of the same shape (the same tensor where nothing is shifted).

    Raises:
        ValueError: a width out of range, or `to_bits` above `from_bits`.
        TypeError: `codes` are not uint8.
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


def _endpoint(k: Tensor, bits: int) -> Tensor:
    return k.div_(float(2**bits - 1))


def _left(k: Tensor, bits: int) -> Tensor:
    return k.mul_(2.0**-bits)


def _centre(k: Tensor, bits: int) -> Tensor:
    return k.add_(0.5).mul_(2.0**-bits)


def codes_to_levels(
    codes: Tensor, bits: int, level: str = "endpoint", out: Tensor | None = None
) -> Tensor:
    """Places codes in [0, 1]: endpoint k/M_n, left k/2^n, centre (k + 1/2)/2^n.

    Args:
        codes: uint8 codes of width `bits`, any shape.
        bits: width n, 1..8.
        level: a key of `LEVELS`. AdaBits (arXiv 1912.09666) calls floor + left 'modified', floor + centre 'centered'.
        out: float32 of the shape of `codes` to write to, without a tensor in between; None = a new one.

    Returns:
        float32 levels of the shape of `codes`, `out` where given.

    Raises:
        ValueError: `bits` out of range, an unknown `level`, or an `out` of another type or shape.
    """
    check_bits(bits)
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; pass one of {', '.join(LEVELS)}")
    if out is None:
        return LEVELS[level](codes.to(torch.float32), bits)
    if out.dtype != torch.float32 or out.shape != codes.shape:
        raise ValueError(
            f"out must be float32 of shape {tuple(codes.shape)}, got {out.dtype} of shape {tuple(out.shape)}"
        )
    return LEVELS[level](out.copy_(codes), bits)


def dequantize(
    codes: Tensor, bits: int, scale: Tensor, level: str = "endpoint", out: Tensor | None = None
) -> Tensor:
    """The weight a code stands for: scale * (2 level - 1).

    Args:
        codes: uint8 codes of width `bits`, any shape.
        bits: width n, 1..8.
        scale: float32, broadcastable to the shape of `codes`.
        level: a key of `LEVELS`.
        out: as in `codes_to_levels`.

    Returns:
        float32 weights of the shape of `codes`, `out` where given. Raises as `codes_to_levels`.
    """
    return codes_to_levels(codes, bits, level, out).mul_(2.0).sub_(1.0).mul_(scale)


def _floor_edges(u: Tensor, bits: int) -> tuple[Tensor, float]:
    width = 2.0**-bits
    return (u / width).round().clamp(1, 2**bits - 1) * width, width


def _round_edges(u: Tensor, bits: int) -> tuple[Tensor, float]:
    top = 2**bits - 1
    return ((u * top - 0.5).round().clamp(0, top - 1) + 0.5) / top, 1.0 / top


QUANTIZERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "floor": floor_codes,
    "round": round_codes,
}

# Nearest inner edge between two bins, and the bins' width: what a soft staircase needs to know of a quantizer.
BIN_EDGES: dict[str, Callable[[Tensor, int], tuple[Tensor, float]]] = {
    "floor": _floor_edges,
    "round": _round_edges,
}

# Each takes codes as a float32 tensor, which it overwrites with the levels.
LEVELS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "endpoint": _endpoint,
    "left": _left,
    "centre": _centre,
}
