"""Levels as tables: 2^n values for every width n, computed for the bins of a normalizer.

A level L represents the weight scale * (2 L - 1), as in `codes.py`. The outermost levels may be
outside [0, 1] if the bin of a clipped range extends beyond the range.

To add a level that is a table, write its function and one row of `LEVEL_TABLES`.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from tq_lightning.quant.codes import check_bits
from tq_lightning.quant.normalizers import NORMALIZERS


def _edges(normalizer: str, bits: int) -> Tensor:
    """Return the bin edges of positive weights in units of the rms, float64 (2^(bits-1) + 1,)."""
    inverse = NORMALIZERS[normalizer].inverse
    assert inverse is not None, f"normalizer {normalizer} has no tables"
    u = 0.5 + torch.arange(2 ** (bits - 1) + 1, dtype=torch.float64) / 2**bits
    edges = inverse(u)
    edges[0] = 0.0
    return edges


def centroids(normalizer: str, bits: int) -> Tensor:
    """Compute the mean of a normal weight in each positive bin, the least-squares level.

    The outermost bin is unbounded: it includes the weights beyond the range.

    Source: Lloyd and Max, see Max, Quantizing for Minimum Distortion, 1960.
    """
    edges = _edges(normalizer, bits)
    edges[-1] = math.inf
    density = torch.exp(-0.5 * edges**2) / math.sqrt(2.0 * math.pi)
    above = torch.special.ndtr(-edges)
    return (density[:-1] - density[1:]) / (above[:-1] - above[1:])


def native(normalizer: str, bits: int) -> Tensor:
    """Compute the magnitude that each code encodes, the lower edge of its bin.

    Sign and exponent come first, so a truncated code is a float with a shorter mantissa. The codes
    of `float_e2` are E2M5, its 6-bit codes E2M3, and its 4-bit codes E2M1 (the elements of MXFP4
    and NVFP4), times half an rms. Codes of 1 and 2 bits have no 2-bit exponent, and most of their
    native levels would be zero; their levels are the centroids.

    Source: OCP Microscaling Formats (MX) Specification 1.0, 2023, for E2M1 and E2M3.
    """
    return _edges(normalizer, bits)[:-1] if bits >= 3 else centroids(normalizer, bits)


# (normalizer, bits) -> magnitudes of the codes of positive weights, in multiples of the rms
LEVEL_TABLES: dict[str, Callable[[str, int], Tensor]] = {
    "centroid": centroids,
    "native": native,
}


@cache
def level_table(
    level: str, normalizer: str, bits: int, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Return the level of each code, float32 (2^bits,); None if `level` is a formula.

    Tables are antisymmetric, L_k + L_(M - k) = 1, and exact in float32: scale * (2 L - 1) rounds
    once.

    Args:
        level: a key of `LEVEL_TABLES`; any other gives None.
        normalizer: a key of `normalizers.NORMALIZERS` with an inverse.
        bits: width n, 1..8.
        device: device of the table.

    Raises:
        ValueError: `bits` is out of range.
    """
    check_bits(bits)
    if level not in LEVEL_TABLES:
        return None
    span = NORMALIZERS[normalizer].span
    assert span is not None
    with torch.inference_mode(False):  # the table is cached, and training uses it too
        half = LEVEL_TABLES[level](normalizer, bits) / (2.0 * span)
        half = torch.round(half * 2.0**23) / 2.0**23
        return torch.cat([0.5 - half.flip(0), 0.5 + half]).float().to(device)
