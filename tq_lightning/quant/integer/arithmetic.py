"""Integer arithmetic of inference: n-bit codes as int8 weights.

With k' = k - 2^(n-1) the signed code and M = 2^n - 1, a weight of scale s is

    left      s k' / 2^(n-1)
    endpoint  s (2k' + 1) / M
    centre    s (2k' + 1) / 2^n

The signed n-bit code is the stored signed code after an arithmetic right shift, k'_n = k'_N >> (N -
n), so an int8 kernel runs every width. `left` is exact up to 8 bits with k'. `endpoint` and
`centre` are exact up to 7 bits with the odd code 2k' + 1. At 8 bits the odd code needs 9 bits.
Either the nearest int8 replaces it, which is not exact, or k' does, with half the sum of the
activation codes added to every product:

    sum (k' + 1/2) a = sum k' a + 1/2 sum a

This term depends on the input, so a bias cannot replace it. For processors that add pairs of
products in 16 bits, see `saturation.py`.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from tq_lightning.quant.codes import LEVELS, check_bits

MOST_BIAS_STEPS = 2**30  # a larger bias leaves no room for the products in a 32-bit sum
LEAST_GAIN = torch.finfo(torch.float32).tiny  # a smaller gain is denormal or 0 in float32


class IntegerWeight(NamedTuple):
    """A weight as integers: weight = gain * (codes + offset).

    Attributes:
        codes: int8 with zero point 0, shape of the weight.
        gain: float64, positive, broadcastable to the weight.
        offset: float64, broadcastable to the weight: 0, 1/2 or 1. It is nonzero only with
            `exact=True`; a kernel then adds offset times the sum of the activation codes to the
            integer product.
        exact: True if gain * (codes + offset) is the dequantized weight.
    """

    codes: Tensor
    gain: Tensor
    offset: Tensor
    exact: bool


def signed_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the signed form of codes: k' = k - 2^(n-1).

    Args:
        codes: uint8 codes of width `bits`, any shape.
        bits: width n, 1..8.

    Returns:
        int8 in [-2^(n-1), 2^(n-1) - 1], shape of `codes`. An arithmetic right shift truncates them
        like `truncate_codes` truncates `codes`.

    Raises:
        ValueError: `bits` is not an integer from 1 to 8.

    Example:
        At 2 bits the codes 0, 1, 2, 3 are -2, -1, 0, 1.
    """
    check_bits(bits)
    return codes.to(torch.int16).sub_(2 ** (bits - 1)).to(torch.int8)


def signed_level(bits: int, level: str) -> tuple[float, float]:
    """Return step and offset of a uniform level map: 2 level - 1 = step * (k' + offset).

    Args:
        bits: width n, 1..8.
        level: a key of `codes.LEVELS`.

    Returns:
        (step, offset); the offset is 0 (`left`) or 1/2 (`endpoint`, `centre`).

    Raises:
        ValueError: `bits` is out of range, `level` is unknown or a table, or its levels are not
            evenly spaced with such an offset, so that no integer kernel can use them.
    """
    check_bits(bits)
    if level not in LEVELS:
        raise ValueError(f"level {level!r} has no integer form; pass one of {', '.join(LEVELS)}")
    fitted = _fitted(bits, LEVELS[level])
    if fitted is None:
        raise ValueError(
            f"level {level!r} is not evenly spaced; integer kernels support endpoint, left, centre"
        )
    return fitted


@cache  # called in every forward pass of a layer
def _fitted(bits: int, level: Callable[[Tensor, float], Tensor]) -> tuple[float, float] | None:
    """Return (step, offset) of a level map at a width; None if it has no such form."""
    count = 2**bits
    k = torch.arange(count, dtype=torch.float64)
    values = 2.0 * level(k.clone(), count - 1.0) - 1.0
    step = ((values[-1] - values[0]) / (count - 1)).item()
    offset = round(2.0 * (values[0].item() / step + count / 2)) / 2.0
    even = torch.allclose(values, step * (k - count / 2 + offset))
    return (step, offset) if even and offset in (0.0, 0.5) else None


def integer_weight(
    codes: Tensor,
    bits: int,
    scale: Tensor,
    level: str = "endpoint",
    exact: bool = False,
    largest: int = 127,
) -> IntegerWeight:
    """Convert codes and their scale to int8 weights with zero point 0 and a positive gain.

    A folded batch norm multiplies the scale by gamma / sqrt(var + eps). If this factor is negative,
    the codes change their sign instead of the gain: 2k' + 1 becomes -(2k' + 1), and k' becomes
    ~k' = -k' - 1, whose offset is 1 minus that of k'. If the scale is 0 (or too small for a float32
    gain), codes and offset are 0 and the gain is 1, so that the product is 0 and the gain positive.

    Args:
        codes: uint8 codes of width `bits`, any shape.
        bits: width n, 1..8.
        scale: scale of the weight times the factor of a folded norm, any sign, broadcastable to
            `codes`.
        level: a key of `codes.LEVELS`.
        exact: return exact integers at every width, with a nonzero offset where needed. False
            returns offset 0 everywhere: the nearest int8, 127/255 (2k' + 1), for 8-bit `endpoint`
            and `centre`; 127 for 128, the negative of the smallest 8-bit code of `left`.
        largest: largest integer that the kernel takes, 127 or, for int4, 7. With `exact=True`, k'
            and an offset represent odd codes beyond it.

    Returns:
        The integer weight.

    Raises:
        ValueError: as in `signed_level`, or `scale` is not finite.

    Example:
        `integer_weight(codes, 2, scale=3.0)` has the int8 codes -3, -1, 1, 3 and the gain 1, which
        are the 2-bit endpoint levels with a scale of 3.
    """
    step, half = signed_level(bits, level)
    scale = finite_scale(scale)
    signed = signed_codes(codes, bits).to(torch.int16)
    gain, negative = scale.abs() * step, scale < 0
    offset = torch.zeros_like(gain)
    is_exact = True
    if exact and 2**bits - 1 > largest:
        integers = torch.where(negative, ~signed, signed)
        offset = torch.where(negative, 1.0 - half, half).to(torch.float64)
    else:
        integers = 2 * signed + 1 if half else signed
        gain = gain / 2 if half else gain
        if bits == 8 and half:
            integers = torch.round(integers.to(torch.float64) * 127 / 255).to(torch.int16)
            gain, is_exact = gain * 255 / 127, False
        integers = torch.where(negative, -integers, integers)
        is_exact = is_exact and int(integers.max() if integers.numel() else 0) <= 127
        integers = integers.clamp_max(127)
    is_zero = gain < LEAST_GAIN
    integers = torch.where(is_zero, 0, integers).to(torch.int8)
    gain, offset = torch.where(is_zero, 1.0, gain), torch.where(is_zero, 0.0, offset)
    return IntegerWeight(integers, gain, offset, is_exact)


def bias_factors(codes: Tensor, steps: Tensor, largest: int = 127) -> Tensor:
    """Choose factors of the integers of a weight that make its bias nearly an integer.

    Kernels hold the bias of a layer as an int32 in steps of the gain times the activation step. At
    1 or 2 bits, such a step can be as large as a hundredth of an output code. If the integers are
    multiplied by a factor and the gain is divided by it, the weight is the same and the steps of
    the bias are finer. The factor with the smallest rounding error of the bias is chosen.

    Args:
        codes: int8 (out, ...).
        steps: float64 (out,), bias of each output channel in steps.
        largest: largest magnitude of the multiplied integers.

    Returns:
        int64 (out,), at least 1.

    Example:
        Codes up to 3 and a bias of 1.4 steps: with the factor 5, the bias is 7 steps.
    """
    tried = torch.arange(1, largest + 1)
    scaled = steps[:, None] * tried
    fits = codes.int().abs().flatten(1).amax(1)[:, None] * tried <= largest
    fits &= scaled.abs() <= MOST_BIAS_STEPS
    fits[:, 0] = True
    error = (scaled - scaled.round()).abs() / tried
    return tried[error.masked_fill(~fits, torch.inf).argmin(1)]


def finite_scale(scale: Tensor) -> Tensor:
    """Return a scale in float64. Raise ValueError if it contains NaN or infinity."""
    scale = torch.as_tensor(scale).to(torch.float64)
    if not torch.isfinite(scale).all():
        raise ValueError("the scale of a weight times its folded norm contains NaN or infinity")
    return scale
