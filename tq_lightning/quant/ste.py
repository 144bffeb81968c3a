"""Straight-through estimators: replacements for the derivative of a staircase, which is zero.

Each rule maps dL/dlevel to dL/du, where u in [0, 1] is the input of the quantizer and level in
[0, 1] its output. A rule is a pure function `(grad, u, level, bits, quantizer) -> grad`. All
tensors have the shape of `u`; `quantizer` is a key of `codes.QUANTIZERS`.

If the scale of the weights is a parameter (`WeightQuantizer.range`), a second rule
`(grad, grad_u, u, level, scale, bits, quantizer) -> grad` gives dL/dscale of each element. `grad`
is dL/dw^ of the quantized weight w^ = scale (2 level - 1), and `grad_u` what the first rule
returned. The caller sums the result over the elements that share a scale. No gradient flows from
`u` to the scale, so the rule accounts for both roles of the scale: the factor of w^, and the range
of u. `range_gradient` is the chain rule over both and the default; a row may name another one.
`FakeQuantize` and `FlatWeights` call the same rules, with bit-identical results.

To add a rule, write its function and one row of `STES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tq_lightning.quant.codes import QUANTIZERS

EWGS_DELTA = 1e-3
# Sharpness k times the bin width: tanh(2.5) = 0.987, so a soft stair nearly reaches its levels.
DSQ_SHARPNESS = 5.0


def identity(grad: Tensor, u: Tensor, level: Tensor, bits: int, quantizer: str) -> Tensor:
    """dL/du = dL/dlevel.

    Source: Bengio et al., arXiv 1308.3432; DoReFa-Net, arXiv 1606.06160.

    Example: at 2 bits u = 0.4 gives level 1/3; a gradient of 1 stays 1.
    """
    return grad


def scaled(grad: Tensor, u: Tensor, level: Tensor, bits: int, quantizer: str) -> Tensor:
    """dL/du = dL/dlevel * M_n / (M_n + 1), with M_n = 2^n - 1 and n the width in use.

    Source: TruncQuant, arXiv 2506.11431.

    Example: at 2 bits u = 0.4 gives level 1/3; a gradient of 1 becomes 3/4.
    """
    return grad * ((2**bits - 1) / 2**bits)


def slope(grad: Tensor, u: Tensor, level: Tensor, bits: int, quantizer: str) -> Tensor:
    """dL/du = dL/dlevel * (M_n + 1) / M_n, the mean slope of floor codes on endpoint levels.

    That staircase rises by 1/M_n over a bin of width 1/2^n. The factor is the reciprocal of the one
    in `scaled`.

    Source: this project, from the definition of the bins.

    Example: at 2 bits u = 0.4 gives level 1/3; a gradient of 1 becomes 4/3.
    """
    return grad * (2**bits / (2**bits - 1))


def clipped(grad: Tensor, u: Tensor, level: Tensor, bits: int, quantizer: str) -> Tensor:
    """dL/du = dL/dlevel if 0 < u < 1, else 0.

    Source: BinaryConnect/BNN, arXiv 1602.02830, eq. 4 (hard tanh).

    Example: at 2 bits u = 0.4 keeps a gradient of 1; u = 1 (level 1) gets 0.
    """
    return grad * ((u > 0) & (u < 1))


def ewgs(grad: Tensor, u: Tensor, level: Tensor, bits: int, quantizer: str) -> Tensor:
    """dL/du = dL/dlevel * (1 + delta sign(dL/dlevel) (u - level)), with delta = 1e-3.

    Source: EWGS, arXiv 2104.00903, eq. 5.

    Example: at 2 bits u = 0.4 gives level 1/3; a gradient of 1 becomes 1 + 1e-3 / 15 = 1.0000667.
    """
    return grad * (1 + EWGS_DELTA * grad.sign() * (u - level))


def dsq(grad: Tensor, u: Tensor, level: Tensor, bits: int, quantizer: str) -> Tensor:
    """Derivative of a soft staircase: one tanh per bin edge, of bin width D and step h = 1/M_n.

    dL/du = dL/dlevel * (h/2) s k (1 - tanh^2(k d)) with s = 1/tanh(k D/2), d = u - nearest edge and
    k D = 5. Its mean over a bin is h/D, the slope of endpoint levels, for every level map.

    Source: DSQ, arXiv 1908.05033, eq. 4-7.

    Example: floor at 1 bit, where D = 1/2 and h = 1. On the edge, u = 0.5, a gradient of 1 becomes
    (1/2) * 5 / 0.5 / tanh(2.5) = 5.068; at u = 0 it becomes 5.068 * (1 - tanh(5)^2) = 0.00092.
    """
    edge, width = QUANTIZERS[quantizer].edges(u, bits)
    step = 1.0 / (2**bits - 1)
    k = DSQ_SHARPNESS / width
    height = 0.5 * step * k / math.tanh(DSQ_SHARPNESS / 2)
    return grad * (height * (1 - torch.tanh(k * (u - edge)) ** 2))


def range_gradient(
    grad: Tensor,
    grad_u: Tensor,
    u: Tensor,
    level: Tensor,
    scale: Tensor,
    bits: int,
    quantizer: str,
) -> Tensor:
    """dL/dscale = dL/dw^ (2 level - 1) - dL/du (2u - 1) / (2 scale); only the first if clamped.

    The chain rule for w^ = scale (2 level - 1) and u = clamp(w / (2 scale) + 1/2, 0, 1). With the
    identity rule an element inside the range contributes dL/dw^ times (w^ - w) / scale.

    Source: LSQ, arXiv 1902.08153, eq. 3, for a range in place of a step size.

    Example: floor at 2 bits, center levels, scale 1, identity. w = -0.2 is u = 0.4, level 0.375,
    w^ = -0.25: a gradient of 1 becomes -0.25 + 0.2 = -0.05. w = 3 is u = 1, level 0.875: 0.75.
    """
    through_u = (u * 2.0).sub_(1.0).mul_(grad_u).div_(2.0 * scale)
    through_u.mul_((u > 0) & (u < 1))
    return (level * 2.0).sub_(1.0).mul_(grad).sub_(through_u)


def value(grad: Tensor, u: Tensor, level: Tensor, bits: int, quantizer: str) -> Tensor:
    """dL/du = dL/dlevel; and dL/dw = dL/dw^ inside the range, for every slope of the normalizer.

    If the levels preserve values, the staircase over u has the mean slope 1 / G', which the slope
    G' of a non-uniform normalizer cancels. The other rules keep G' in the gradient, so that weights
    in dense bins learn faster.

    Source: this project; Bengio et al., arXiv 1308.3432, applied to the weight instead of `u`.

    Example: at 2 bits u = 0.4 gives level 1/3; a gradient of 1 stays 1, and reaches w unchanged.
    """
    return grad


@dataclass(frozen=True)
class STE:
    """A row of `STES`.

    Attributes:
        rule: (grad, u, level, bits, quantizer) -> grad.
        elementwise: the rule reads `u` or `level`. Other rules get None for both, so that the
            forward pass does not save them.
        scale_rule: (grad, grad_u, u, level, scale, bits, quantizer) -> dL/dscale of each element.
            Called only if the scale is a parameter; `u` and `level` are then saved for every rule.
        value: omit the slope of the normalizer from dL/dw, which is then dL/du / (2 scale).
        uniform: the rule compares levels with `u`, which needs a uniform normalizer.
    """

    rule: Callable[[Tensor, Tensor, Tensor, int, str], Tensor]
    elementwise: bool = False
    scale_rule: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, str], Tensor] = (
        range_gradient
    )
    value: bool = False
    uniform: bool = False


STES: dict[str, STE] = {
    "identity": STE(identity),
    "scaled": STE(scaled),
    "slope": STE(slope),
    "clipped": STE(clipped, elementwise=True),
    "ewgs": STE(ewgs, elementwise=True, uniform=True),
    "dsq": STE(dsq, elementwise=True),
    "value": STE(value, value=True),
}


def resolve_ste(ste: str, quantizer: str) -> str:
    """Resolve `ste`: "auto" is the STE paired with the quantizer; other keys are returned.

    Raises:
        ValueError: an unknown `ste`.
    """
    if ste == "auto":
        return QUANTIZERS[quantizer].ste
    if not isinstance(ste, str) or ste not in STES:
        raise ValueError(f"unknown ste {ste!r}; pass auto or one of {', '.join(STES)}")
    return ste
