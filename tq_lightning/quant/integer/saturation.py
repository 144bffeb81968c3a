"""Exact sums on processors that add pairs of products in 16 bits.

x86 processors without VNNI multiply uint8 activation codes by int8 weights and add two products in
16 bits, which saturates silently. Either activation codes stay below 128 (`activation_top`), or the
weight is split into two tensors whose products fit: 2k' + 1 = 4 high + low (`split_weight`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tq_lightning.quant.integer.arithmetic import (
    LEAST_GAIN,
    finite_scale,
    signed_codes,
    signed_level,
)

INT16_MAX = 2**15 - 1
SPLIT = 4  # a 9-bit integer is SPLIT times one of 7 bits, plus one of 2 bits


def largest_integer(bits: int, level: str = "endpoint") -> int:
    """Return the largest magnitude among the int8 codes of `integer_weight` at a width.

    Raises:
        ValueError: as in `signed_level`.
    """
    _, half = signed_level(bits, level)
    return min(2**bits - 1, 127) if half else 2 ** (bits - 1)


def activation_top(bits: int, level: str = "endpoint", exact_sums: bool = True) -> int:
    """Return the largest uint8 activation code whose products with the weights have exact sums.

    x86 processors without VNNI add pairs of uint8 x int8 products in 16 bits, which saturates
    silently.

    Args:
        bits: width of the weights, 1..8.
        level: a key of `codes.LEVELS`.
        exact_sums: True if the processor adds products in 32 bits (VNNI, ARM).

    Returns:
        255, or 127 if two products with 255 could exceed 16 bits.

    Raises:
        ValueError: as in `signed_level`.
    """
    return 255 if exact_sums or 2 * 255 * largest_integer(bits, level) <= INT16_MAX else 127


class SplitWeight(NamedTuple):
    """A weight as two int8 tensors: weight = gain * codes, codes = SPLIT * high + low.

    No two products of a uint8 with `high` or `low` exceed 16 bits.

    Attributes:
        parts: (high, low), int8 in [-64, 63] and in [0, 3], shape of the weight.
        codes: int16, the odd codes of `endpoint` and `centre`, or the signed ones of `left`.
        gain: float64, positive, broadcastable to the weight.
        offset: float64, 0.
    """

    parts: tuple[Tensor, Tensor]
    codes: Tensor
    gain: Tensor
    offset: Tensor


def split_weight(codes: Tensor, bits: int, scale: Tensor, level: str = "endpoint") -> SplitWeight:
    """Convert codes and their scale to two int8 weights, exact at every width on every processor.

    Sums of their products with uint8 activations are exact even on processors that add pairs of
    products in 16 bits. The cost is two products instead of the one of `integer_weight`.

    Args:
        codes: uint8 codes of width `bits`, any shape.
        bits: width n, 1..8.
        scale: as in `integer_weight`.
        level: a key of `codes.LEVELS`.

    Returns:
        The two int8 parts with their gain.

    Raises:
        ValueError: as in `integer_weight`.

    Example:
        The 8-bit endpoint code 255 is the odd code 255 = 4 * 63 + 3.
    """
    step, half = signed_level(bits, level)
    scale = finite_scale(scale)
    signed = signed_codes(codes, bits).to(torch.int16)
    integers = 2 * signed + 1 if half else signed
    gain = scale.abs() * step / (2 if half else 1)
    integers = torch.where(scale < 0, -integers, integers)
    is_zero = gain < LEAST_GAIN
    integers, gain = torch.where(is_zero, 0, integers), torch.where(is_zero, 1.0, gain)
    high, low = integers // SPLIT, integers % SPLIT
    return SplitWeight(
        (high.to(torch.int8), low.to(torch.int8)), integers, gain, torch.zeros_like(gain)
    )
