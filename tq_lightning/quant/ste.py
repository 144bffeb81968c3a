"""Straight-through estimators: what stands for the derivative of a staircase, which is zero almost everywhere.

Each rule maps dL/dlevel to dL/du, where u in [0, 1] is what the quantizer was given and level in [0, 1] what it
returned. A rule is a pure function `(grad, u, level, bits, quantizer) -> grad`; all tensors have the shape of `u`.
`quantizer` names the bins (a key of `codes.BIN_EDGES`).

To add a rule, write its function and add a row to `STES`; `ELEMENTWISE` lists those that read `u` or `level`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tq_lightning.quant.codes import BIN_EDGES

EWGS_DELTA = 1e-3
DSQ_SHARPNESS = (
    5.0  # k times the bin width: tanh(2.5) = 0.987, the soft stair nearly reaches its levels
)


def identity(grad: Tensor, u: Tensor, level: Tensor, bits: int, quantizer: str) -> Tensor:
    """dL/du = dL/dlevel. Source: Bengio et al., arXiv 1308.3432; DoReFa-Net, arXiv 1606.06160.

    Example: at 2 bits u = 0.4 gives level 1/3, a gradient of 1 stays 1.
    """
    return grad


def scaled(grad: Tensor, u: Tensor, level: Tensor, bits: int, quantizer: str) -> Tensor:
    """dL/du = dL/dlevel * M_n / (M_n + 1), M_n = 2^n - 1, n the width in use. Source: TruncQuant, arXiv 2506.11431.

    Example: at 2 bits u = 0.4 gives level 1/3, a gradient of 1 becomes 3/4.
    """
    return grad * ((2**bits - 1) / 2**bits)


def slope(grad: Tensor, u: Tensor, level: Tensor, bits: int, quantizer: str) -> Tensor:
    """dL/du = dL/dlevel * (M_n + 1) / M_n: step height 1/M_n over bin width 1/2^n of floor codes on endpoint levels.

    The mean slope of that staircase, the reciprocal of `scaled`. Source: this project, from the definition of the bins.
    Example: at 2 bits u = 0.4 gives level 1/3, a gradient of 1 becomes 4/3.
    """
    return grad * (2**bits / (2**bits - 1))


def clipped(grad: Tensor, u: Tensor, level: Tensor, bits: int, quantizer: str) -> Tensor:
    """dL/du = dL/dlevel where 0 < u < 1, else 0. Source: BinaryConnect/BNN, arXiv 1602.02830, eq. 4 (hard tanh).

    Example: at 2 bits u = 0.4 keeps a gradient of 1, u = 1 (level 1) gets 0.
    """
    return grad * ((u > 0) & (u < 1))


def ewgs(grad: Tensor, u: Tensor, level: Tensor, bits: int, quantizer: str) -> Tensor:
    """dL/du = dL/dlevel * (1 + delta sign(dL/dlevel) (u - level)), delta = 1e-3. Source: EWGS, arXiv 2104.00903, eq. 5.

    Example: at 2 bits u = 0.4 gives level 1/3, a gradient of 1 becomes 1 + 1e-3 / 15 = 1.0000667.
    """
    return grad * (1 + EWGS_DELTA * grad.sign() * (u - level))


def dsq(grad: Tensor, u: Tensor, level: Tensor, bits: int, quantizer: str) -> Tensor:
    """Derivative of a soft staircase: tanh stairs centred on the bin edges, of the bins' width D and height h = 1/M_n.

    dL/du = dL/dlevel * (h/2) s k (1 - tanh^2(k d)), s = 1/tanh(k D/2), d = u - nearest edge, k D = 5; its mean over a bin
    is h/D, the slope of endpoint levels, wherever the levels lie. Source: DSQ, arXiv 1908.05033, eq. 4-7.
    Example: 1-bit floor, u = 0.5 (on the edge, D = 1/2, h = 1):
    (1/2) * 5 / 0.5 / tanh(2.5) = 5.068; u = 0 gives 5.068 * (1 - tanh(5)^2) = 0.00092.
    """
    edge, width = BIN_EDGES[quantizer](u, bits)
    step = 1.0 / (2**bits - 1)
    k = DSQ_SHARPNESS / width
    height = 0.5 * step * k / math.tanh(DSQ_SHARPNESS / 2)
    return grad * (height * (1 - torch.tanh(k * (u - edge)) ** 2))


STES: dict[str, Callable[[Tensor, Tensor, Tensor, int, str], Tensor]] = {
    "identity": identity,
    "scaled": scaled,
    "slope": slope,
    "clipped": clipped,
    "ewgs": ewgs,
    "dsq": dsq,
}
ELEMENTWISE = frozenset({"clipped", "ewgs", "dsq"})

AUTO_STE = {"floor": "scaled", "round": "identity"}  # the paper's pairing


def resolve_ste(ste: str, quantizer: str) -> str:
    """`auto` becomes the paper's pairing (scaled for floor, identity for round); any other name stands for itself.

    Raises:
        ValueError: an unknown name.
    """
    if ste == "auto":
        return AUTO_STE.get(quantizer, "identity")
    if ste not in STES:
        raise ValueError(f"unknown ste {ste!r}; pass auto or one of {', '.join(STES)}")
    return ste
