"""Normalized weights in flat buffers: u, scale and the normalizer's backward pass for all layers.

The operations and their order are those of `WeightQuantizer.normalize` and `Normalize`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tq_lightning.quant.normalizers import NORMALIZERS
from tq_lightning.quant.quantized_tensors import QuantizedTensor
from tq_lightning.quant.ste import STES
from tq_lightning.quant.weight import TINY, WeightQuantizer, span_of

ALIGNMENT = 16  # every weight starts at a multiple of 16 elements, i.e. 64 bytes of float32


class NormalizedWeights:
    """The weights of a model that share their quantizer, normalizer, level and STE.

    Args:
        weights: Weights on one device. They must not change while this object is in use.
    """

    def __init__(self, weights: Sequence[QuantizedTensor]) -> None:
        self.weights = list(weights)
        self.rule: WeightQuantizer = weights[0].quantizer
        self.originals = [w.original for w in weights]
        self.device = self.originals[0].device
        self.finite: Tensor | None = None  # scalar bool on the device, set by `normalize`
        self.ranges = [w.quantizer.range for w in weights if w.quantizer.range is not None]
        self._grad_sum: Tensor | None = None  # dL/du, summed over the widths
        self._grad: Tensor  # flat; it and its views are created by the first gradient of a step
        self._grad_views: list[Tensor]
        self._made, views = self._flat()
        # tensors that share the memory, without being views for autograd and `torch.compile`
        self.tensors = [
            torch.empty(0, dtype=torch.float32, device=self.device).set_(
                self._made.untyped_storage(), v.storage_offset(), v.shape, v.stride()
            )
            for v in views
        ]

    def _flat(self) -> tuple[Tensor, list[Tensor]]:
        """Allocate a flat float32 buffer and one view per weight, with its strides."""
        size = sum(-(-w.numel() // ALIGNMENT) * ALIGNMENT for w in self.originals)
        flat = torch.zeros(size, dtype=torch.float32, device=self.device)
        views, start = [], 0
        for w in self.originals:
            views.append(flat.as_strided(w.shape, _dense_strides(w), start))
            start += -(-w.numel() // ALIGNMENT) * ALIGNMENT
        return flat, views

    def _reduce(self, views: list[Tensor], how: str) -> list[Tensor]:
        if how == "max" and not NORMALIZERS[self.rule.normalizer].per_channel:
            return list(torch._foreach_max(views))
        return [w.quantizer.reduce(v, how) for w, v in zip(self.weights, views, strict=True)]

    def normalize(self) -> None:
        """Compute u, scale and max|t| of every weight; see `WeightQuantizer.normalize`.

        It does not synchronize with the device: `finite` is True if all weights are finite.
        """
        row = NORMALIZERS[self.rule.normalizer]
        self._u, self._u_views = self._flat()
        self._scale, scale_views = self._flat()
        torch._foreach_copy_(self._u_views, self.originals)
        self._top: list[Tensor] | None = None
        if self.ranges:
            scales = self._over = self._top = self._learned_ranges()
            self._squash()
        elif row.reference == "rms":
            self._over = self._rms()
            scales = [span_of(rms, row) for rms in self._over]
            torch._foreach_div_(self._u_views, self._over)
            self._squash()
        else:
            scales = self._means() if self.rule.scale == "mean" else self._maxima()
            self._squash()
            torch.abs(self._u, out=self._made)
            self._over = self._top = self._reduce(self.tensors, "max")
            torch._foreach_clamp_min_(self._top, TINY)
        if STES[self.rule.ste].value:
            self._over = [scale.detach().clamp_min(TINY) for scale in scales]
        torch._foreach_copy_(scale_views, scales)
        self._u.mul_(0.5)
        if self._top is not None:
            torch._foreach_div_(self._u_views, self._top)
        self._u.add_(0.5)
        self._clamped = bool(self.ranges) or row.reference == "rms"
        if self._clamped:
            self._u.clamp_(0.0, 1.0)
        self._stored: Tensor | None = None

    def _squash(self) -> None:
        t = NORMALIZERS[self.rule.normalizer].squash(self._u)
        if t is not self._u:
            self._u.copy_(t)

    def _maxima(self) -> list[Tensor]:
        torch.abs(self._u, out=self._made)
        tops = self._reduce(self.tensors, "max")
        self.finite = torch.stack([top.isfinite().all() for top in tops]).all()
        return tops

    def _rms(self) -> list[Tensor]:
        tops = self._maxima()
        torch._foreach_clamp_min_(tops, TINY)
        torch._foreach_div_(self.tensors, tops)
        self._made.mul_(self._made)
        means = self._reduce(self.tensors, "mean")
        return [m.sqrt().mul(t).clamp_min(TINY) for m, t in zip(means, tops, strict=True)]

    def _learned_ranges(self) -> list[Tensor]:
        values = [
            w.quantizer.range_value(r) for w, r in zip(self.weights, self.ranges, strict=True)
        ]
        every = torch.cat([v.flatten() for v in values])
        self.finite = self._u.isfinite().all() & every.isfinite().all()
        return values

    def _means(self) -> list[Tensor]:
        torch.abs(self._u, out=self._made)
        means = self._reduce(self.tensors, "mean")
        self._made.mul_(2.0**-64)  # see WeightQuantizer.huge_mean
        huge = self._reduce(self.tensors, "mean")
        if NORMALIZERS[self.rule.normalizer].per_channel:
            scales = [_finite_mean(m, h) for m, h in zip(means, huge, strict=True)]
            self.finite = torch.stack([s.isfinite().all() for s in scales]).all()
        else:
            scale = _finite_mean(torch.stack(means), torch.stack(huge))
            self.finite = scale.isfinite().all()
            scales = list(scale.unbind())
        return scales

    def check(self) -> None:
        """Raise ValueError if a weight contains NaN or infinity; the message names it."""
        if self.finite is None or bool(self.finite):
            return
        for w in self.weights:
            w.quantizer.check_finite(w.original)

    def _normalizer_backward(self) -> None:
        assert self._grad_sum is not None
        slope = NORMALIZERS[self.rule.normalizer].slope
        self._grad.copy_(self._grad_sum)
        if self._clamped:
            self._grad.mul_((self._u > 0) & (self._u < 1))
        if slope is not None and not STES[self.rule.ste].value:
            self._u.sub_(0.5).mul_(2.0)
            if self._top is not None:
                torch._foreach_mul_(self._u_views, self._top)
            self._grad.mul_(slope(self._u))
        self._grad.mul_(0.5)
        torch._foreach_div_(self._grad_views, self._over)
        self.finite = None  # `u` is overwritten


def _finite_mean(mean: Tensor, huge: Tensor) -> Tensor:
    """Return the mean, or, if its float32 sum overflowed, the scaled mean times 2^64."""
    return torch.where(mean.isfinite(), mean, huge * 2.0**64)


def _dense_strides(w: Tensor) -> tuple[int, ...]:
    """Return the strides of a dense weight, to keep the order of reductions; else contiguous."""
    order = sorted(range(w.dim()), key=w.stride, reverse=True)
    expected = 1
    for dim in reversed(order):
        if w.shape[dim] != 1 and w.stride(dim) != expected:
            return torch.empty(w.shape, device="meta").stride()
        expected *= w.shape[dim]
    return w.stride()
