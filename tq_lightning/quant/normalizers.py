"""Normalizers: monotone maps G from float weights to u in [0, 1], which quantizers turn into codes.

The codes `floor(2^n u)` nest for every monotone G. A non-uniform code is therefore a normalizer,
not a quantizer: G maps its bins to equal parts of [0, 1].

To add a normalizer, write its functions and one row of `NORMALIZERS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

MU = 8.0  # places the 2-bit threshold at one rms; the least-squares code has it at 0.98
OCTAVES = 8.0  # of `log`: 3 bits after the sign are the exponent of a power of two


@dataclass(frozen=True)
class Normalizer:
    """A row of `NORMALIZERS`: u = (t / r + 1) / 2, with t = `squash(w)`, and its options.

    Attributes:
        squash: w -> t, odd and increasing; with `reference="rms"` w / rms -> t in [-1, 1].
        slope: t -> dt/dw, may overwrite its argument; None if t is w.
        per_channel: compute the maximum, the root mean square, the learned range and the scale per
            output channel instead of per tensor.
        reference: "max" has r = max|t|. "rms" divides w by its root mean square before `squash`,
            and r is 1. "learned" has r = c, a parameter, and clamps u.
        span: weight at u = 1 in multiples of the rms; the range c of "learned" starts there. None
            for "max", where it is the largest weight.
        inverse: u (float64) -> w / rms, for tables of levels; None if no level is a table.
        levels: supported levels, keys of `codes.LEVELS` or `level_tables.LEVEL_TABLES`; None =
            every key of `LEVELS`.
        scales: supported scales, of `SCALES`.
        ste: Straight-through estimator of `ste="auto"`; None = that of the quantizer.
    """

    squash: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor] | None
    per_channel: bool
    reference: str = "max"
    span: float | None = None
    inverse: Callable[[Tensor], Tensor] | None = None
    levels: tuple[str, ...] | None = None
    scales: tuple[str, ...] = ("mean", "span")
    ste: str | None = None


SCALES = ("mean", "span")


def _unchanged(w: Tensor) -> Tensor:
    return w


def _tanh_slope(t: Tensor) -> Tensor:
    return t.square_().neg_().add_(1.0)


def _learned_inverse(u: Tensor) -> Tensor:
    return (u * 2.0 - 1.0) * 2.5


# -- G = Phi(z / sqrt 3), z = w / rms: bins as dense as the cube root of a normal weight's density -
def _gaussian(z: Tensor) -> Tensor:
    return torch.erf(z * (1.0 / math.sqrt(6.0)))


def _gaussian_slope(t: Tensor) -> Tensor:
    return torch.erfinv(t).square_().neg_().exp_().mul_(2.0 / math.sqrt(6.0 * math.pi))


def _gaussian_inverse(u: Tensor) -> Tensor:
    return torch.special.ndtri(u) * math.sqrt(3.0)


# -- sign, 2 exponent bits, mantissa; a magnitude of 8 is 4 rms ------------------------------------
def _float_e2(z: Tensor) -> Tensor:
    # the exponents 0 and 1, 2, and 3 are the pieces of a concave function of x = 2 |z| < 8
    x = z.abs() * 2.0
    magnitude = torch.minimum(x * 0.25, (x * 0.125).add_(0.25))
    magnitude = torch.minimum(magnitude, x.mul_(0.0625).add_(0.5)).clamp_max_(1.0)
    return magnitude.copysign_(z)


def _float_e2_slope(t: Tensor) -> Tensor:
    t = t.abs_()
    return 0.5 - 0.25 * (t >= 0.5).to(t.dtype) - 0.125 * (t >= 0.75).to(t.dtype)


def _float_e2_inverse(u: Tensor) -> Tensor:
    t = u * 2.0 - 1.0
    m = t.abs()
    x = torch.where(m < 0.5, 4.0 * m, torch.where(m < 0.75, 8.0 * m - 2.0, 16.0 * m - 8.0))
    return (x * 0.5).copysign(t)


# -- mu-law companding over 4 rms ------------------------------------------------------------------
def _mu_law(z: Tensor) -> Tensor:
    x = z.abs().mul_(MU / 4.0).log1p_().mul_(1.0 / math.log1p(MU))
    return x.clamp_max_(1.0).copysign_(z)


def _mu_law_slope(t: Tensor) -> Tensor:
    log = math.log1p(MU)
    return t.abs_().mul_(-log).exp_().mul_(MU / 4.0 / log)


def _mu_law_inverse(u: Tensor) -> Tensor:
    t = u * 2.0 - 1.0
    return (t.abs() * math.log1p(MU)).expm1().mul(4.0 / MU).copysign(t)


# -- sign and binary logarithm of the magnitude, over 8 octaves below 4 rms ------------------------
def _log(z: Tensor) -> Tensor:
    x = z.abs().mul_(0.25).log2_().mul_(1.0 / OCTAVES).add_(1.0)
    return x.clamp_(0.0, 1.0).copysign_(z)


def _log_slope(t: Tensor) -> Tensor:
    t = t.abs_()
    inverse = t.sub(1.0).mul_(-OCTAVES).exp2_().mul_(0.25 / (OCTAVES * math.log(2.0)))
    return inverse.mul_(t > 0)  # magnitudes below the lowest octave are all code 0


def _log_inverse(u: Tensor) -> Tensor:
    t = u * 2.0 - 1.0
    magnitude = 4.0 * torch.exp2((t.abs() - 1.0) * OCTAVES)
    return torch.where(t == 0, torch.zeros_like(t), magnitude.copysign(t))


_LEARNED = Normalizer(
    _unchanged,
    None,
    per_channel=False,
    reference="learned",
    span=2.5,
    inverse=_learned_inverse,
    levels=("centre", "centroid"),
    scales=("span",),
    ste="identity",
)
# options that all non-uniform normalizers share
_of_rms = partial(
    Normalizer, per_channel=False, reference="rms", span=4.0, scales=("span",), ste="value"
)
NORMALIZERS: dict[str, Normalizer] = {
    "tanh": Normalizer(torch.tanh, _tanh_slope, per_channel=False),
    "tanh_channel": Normalizer(torch.tanh, _tanh_slope, per_channel=True),
    "absmax": Normalizer(_unchanged, None, per_channel=False),
    "absmax_channel": Normalizer(_unchanged, None, per_channel=True),
    "learned": _LEARNED,
    "learned_channel": replace(_LEARNED, per_channel=True),
    "gaussian": _of_rms(
        _gaussian, _gaussian_slope, inverse=_gaussian_inverse, levels=("centroid",)
    ),
    "float_e2": _of_rms(
        _float_e2, _float_e2_slope, inverse=_float_e2_inverse, levels=("centroid", "native")
    ),
    "mu_law": _of_rms(_mu_law, _mu_law_slope, inverse=_mu_law_inverse, levels=("centroid",)),
    "log": _of_rms(_log, _log_slope, inverse=_log_inverse, levels=("centroid", "native")),
}


class Normalize(torch.autograd.Function):
    """The autograd function of all normalizers: u = t / (2 range) + 1/2.

    `w` gets a gradient, the range does not. Only `u` is saved for the backward pass, which recovers
    t from it. `FlatWeights` computes the same for all weights of a model at once, in the same order
    of operations, with bit-identical results.

    forward(w, t, top, grad_divisor, normalizer, slope, clamped):

    - `w` is the float32 weight, and `t` = squash(w), of any shape.
    - `top` is the range of t, broadcastable, or None for 1.
    - `grad_divisor` is broadcastable: dL/dw = dL/du (dt/dw) / (2 grad_divisor). None is `top`,
      because torch.compile does not trace a tensor that is passed twice.
    - `slope` includes the factor dt/dw in the gradient.
    - `clamped` clamps u to [0, 1]; the gradient is 0 at both ends.

    Returns float32 u in [0, 1], shape of `w`.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, w, t, top, grad_divisor, normalizer, slope, clamped
    ):
        """Return u."""
        # halved first, since twice a maximum near 3e38 overflows
        u = t * 0.5
        if top is not None:
            u.div_(top)
        u.add_(0.5)
        if clamped:
            u.clamp_(0.0, 1.0)
        ctx.save_for_backward(u, top, grad_divisor)
        ctx.rule = (NORMALIZERS[normalizer].slope if slope else None, clamped)
        return u

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Return dL/dw = dL/du (dt/dw) / (2 grad_divisor), 0 where `u` was clamped."""
        u, top, grad_divisor = ctx.saved_tensors
        grad_divisor = top if grad_divisor is None else grad_divisor
        slope, clamped = ctx.rule
        if clamped:
            grad = grad * ((u > 0) & (u < 1))
        if slope is not None:
            t = (u - 0.5).mul_(2.0)
            grad = grad * slope(t if top is None else t.mul_(top))
        return grad * 0.5 / grad_divisor, None, None, None, None, None, None
