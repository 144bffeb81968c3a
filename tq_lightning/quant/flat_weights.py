"""Flat weights: quantized weights in one buffer, so that one call does for all of them.

The weights are normalized once. The functions of `codes.py` and `ste.py` then run once per width on
the whole buffer, and the layers read tensors that share its memory. The values are those of
`WeightQuantizer`, bit for bit, and so are the gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tq_lightning.quant.codes import QUANTIZERS, truncate_codes
from tq_lightning.quant.levels import codes_to_levels, dequantize
from tq_lightning.quant.normalizers import NORMALIZERS
from tq_lightning.quant.ste import STES
from tq_lightning.quant.weight import TINY, QuantizedTensor, WeightQuantizer, span_of

ALIGNMENT = 16  # elements between the starts of two weights divide by it: 64 bytes of float32


class FlatWeights:
    """The quantized weights of a model that share their quantizer, normalizer, level and STE.

    Args:
        weights: Weights on one device. They must not change while this object is in use.
    """

    def __init__(self, weights: Sequence[QuantizedTensor]) -> None:
        self.weights = list(weights)
        self.rule: WeightQuantizer = weights[0].quantizer
        self.originals = [w.original for w in weights]
        self.device = self.originals[0].device
        self.bits: int | None = None  # width of the weights in `_made`
        self.finite: Tensor | None = None  # scalar bool on the device, set by `normalize`
        self.ranges = [w.quantizer.range for w in weights if w.quantizer.range is not None]
        self._trained = [
            i
            for i, w in enumerate(self.originals)
            if w.requires_grad or (self.ranges and self.ranges[i].requires_grad)
        ]
        self.leaves: list[Tensor] = []  # the weights in use that get a gradient
        self._float_grads: dict[int, Tensor] = {}
        self._grad_sum: Tensor | None = None
        self._range_sums: list[Tensor] = []
        self._has_grad = [False] * len(self._trained)
        self._made, views = self._flat()
        # not views for autograd and `torch.compile`, but tensors with the memory of the views
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

        Nothing is read back from the device: `finite` tells whether all weights are.
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

    @torch.no_grad()
    def make(self, bits: int | None, source: str) -> bool:
        """Write the weights of a width to `tensors`, which the layers read; None = float weights.

        Returns:
            Whether the weights had to be normalized first.
        """
        self.bits = bits
        normalized = bits is not None or self.rule.float_pass == "normalized"
        fresh = normalized and self.finite is None
        if fresh:
            self.normalize()
        if not normalized:
            torch._foreach_copy_(self.tensors, self.originals)
        elif bits is None:
            torch.sub(self._u, 0.5, out=self._made).mul_(2.0 * self._scale)
        else:
            codes = self._codes(bits, source)
            self._table = self.rule.table(bits, self.device)
            dequantize(codes, bits, self._scale, self.rule.level, out=self._made, table=self._table)
            self._kept = codes if STES[self.rule.ste].elementwise or self.ranges else None
        if torch.is_autocast_enabled(self.device.type):
            torch.clear_autocast_cache()  # it knows tensors by identity, and theirs does not change
        for w, made in zip(self.weights, self.tensors, strict=True):
            w.quantizer.made = made
        return fresh

    def _codes(self, bits: int, source: str) -> Tensor:
        codes, max_bits = QUANTIZERS[self.rule.quantizer].codes, self.rule.width.max_bits
        if source != "truncate":
            return codes(self._u, bits)
        if self._stored is None:
            self._stored = codes(self._u, max_bits)
        return truncate_codes(self._stored, max_bits, bits)

    def release(self) -> None:
        """Let the layers make their weights on their own again."""
        for w in self.weights:
            w.quantizer.made = None

    def require_grad(self) -> None:
        """Turn the weights in training into `leaves` of autograd."""
        if not self.leaves:
            self.leaves = [self.tensors[i].requires_grad_() for i in self._trained]

    @torch.no_grad()
    def add_grads(self, grads: Sequence[Tensor | None]) -> None:
        """Add the gradients of a width: dL/dleaf of each of `leaves`, None if it took no part.

        The straight-through rule of the width is applied here, once for all weights.
        """
        if all(g is None for g in grads):
            return
        if self.bits is None and self.rule.float_pass == "plain":
            pairs = zip(self._trained, grads, strict=True)
            self._float_grads = {i: g for i, g in pairs if g is not None}
            return
        if self._grad_sum is None:
            self._grad, self._grad_views = self._flat()
        present = [i for i, g in enumerate(grads) if g is not None]
        if len(present) < len(self.weights):
            self._grad.zero_()
        torch._foreach_copy_(
            [self._grad_views[self._trained[i]] for i in present],
            [g for g in grads if g is not None],
        )
        for i in present:
            self._has_grad[i] = True
        if self.bits is None:
            self._add(self._grad * (2.0 * self._scale))
            return
        level = None
        if self._kept is not None:
            level = codes_to_levels(self._kept, self.bits, self.rule.level, table=self._table)
        grad_level = self._grad * (2.0 * self._scale)
        ste = STES[self.rule.ste]
        grad_u = ste.rule(
            grad_level,
            self._u,
            level,  # type: ignore[arg-type]  # only elementwise rules read it
            self.bits,
            self.rule.quantizer,
        )
        if self.ranges:
            assert level is not None
            args = (self._u, level, self._scale, self.bits, self.rule.quantizer)
            self._add_range_grads(ste.scale_rule(self._grad, grad_u, *args))
        self._add(grad_u)

    def _add(self, grad_u: Tensor) -> None:
        self._grad_sum = grad_u if self._grad_sum is None else self._grad_sum.add_(grad_u)

    def _add_range_grads(self, each: Tensor) -> None:
        views = [each.as_strided(v.shape, v.stride(), v.storage_offset()) for v in self.tensors]
        sums = [
            w.quantizer.range_grad(v, r)
            for w, v, r in zip(self.weights, views, self.ranges, strict=True)
        ]
        if self._range_sums:
            torch._foreach_add_(self._range_sums, sums)
        else:
            self._range_sums = sums

    @torch.no_grad()
    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs (parameter, its gradient), summed over the widths; ends the use of `u`.

        The parameters are weights, and learned ranges, that took part. du/dw is (dt/dw) / (2 range
        of t), or 1 / (2 scale) for the rule "value"; see `Normalize`, which has the same operations
        in the same order.
        """
        if self._grad_sum is not None:
            self._normalizer_backward()
        pairs: list[tuple[Tensor, Tensor]] = []
        for i, has in zip(self._trained, self._has_grad, strict=True):
            if i in self._float_grads:
                grad = self._float_grads[i]
                pairs.append((self.originals[i], grad.add_(self._grad_views[i]) if has else grad))
            elif has:
                pairs.append((self.originals[i], self._grad_views[i]))
            if has and self.ranges:
                pairs.append((self.ranges[i], self._range_sums[i]))
        return [(p, g.to(p.dtype)) for p, g in pairs if p.requires_grad]

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
    """The mean, or, where its float32 sum overflowed, the one of the weight times 2^-64."""
    return torch.where(mean.isfinite(), mean, huge * 2.0**64)


def _dense_strides(w: Tensor) -> tuple[int, ...]:
    """The strides of a dense weight, so that reductions keep their order; else contiguous ones."""
    order = sorted(range(w.dim()), key=w.stride, reverse=True)
    expected = 1
    for dim in reversed(order):
        if w.shape[dim] != 1 and w.stride(dim) != expected:
            return torch.empty(w.shape, device="meta").stride()
        expected *= w.shape[dim]
    return w.stride()
