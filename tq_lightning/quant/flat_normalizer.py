"""Normalized weights in flat buffers: u, scale and the normalizer's backward pass for all layers.

The operations and their order are those of `WeightQuantizer.normalize` and `Normalize`. A buffer is
as large as all weights together. Two buffers are kept between calls: that of `tensors`, and `u`,
which nested codes replace (`FlatWeights`).
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from tq_lightning.quant.normalizers import NORMALIZERS
from tq_lightning.quant.quantized_tensors import QuantizedTensor
from tq_lightning.quant.ste import STES
from tq_lightning.quant.weight import TINY, WeightQuantizer, span_of

# elements per row of a buffer; a weight starts at a row, so that a column can scale each weight
ROW = 256


class FlatNormalizer:
    """Normalize the weights of a model that share their quantizer, normalizer, level and STE.

    Args:
        weights: weights on one device. They must not change while this object is in use.

    Attributes:
        tensors: tensors of the shape of the weights, in the memory of one buffer. They hold the
            weights of a width, then their gradients, and intermediate results of `normalize`.
        finite: scalar bool on the device: whether all weights are finite. None before `normalize`.
    """

    def __init__(self, weights: Sequence[QuantizedTensor]) -> None:
        self.weights = list(weights)
        self.choices: WeightQuantizer = weights[0].quantizer  # those of all weights
        self.row = NORMALIZERS[self.choices.normalizer]
        self.originals = [w.original for w in weights]
        self.device = self.originals[0].device
        self.ranges = [w.quantizer.range for w in weights if w.quantizer.range is not None]
        self._range_layouts = [w.quantizer.range_layout for w in weights]
        self.finite: Tensor | None = None
        self.tensors: list[Tensor] = []
        self._rows = [-(-w.numel() // ROW) for w in self.originals]
        self._layouts = [(w.shape, _dense_strides(w)) for w in self.originals]
        self._clamped = bool(self.ranges) or self.row.reference == "rms"
        self._u: Tensor | None = None
        self._range_sums: list[Tensor] = []  # dL/drange, summed over the widths

    # -- buffers ---------------------------------------------------------------------------------
    @torch.inference_mode(False)  # training may use the buffer after an evaluation
    def _allocate(self) -> None:
        """Allocate the buffer of `tensors`."""
        self._buffer = torch.zeros(sum(self._rows), ROW, device=self.device)
        storage, start = self._buffer.untyped_storage(), 0
        # tensors that share the memory, without being views for autograd and `torch.compile`
        for (shape, strides), rows in zip(self._layouts, self._rows, strict=True):
            empty = torch.empty(0, dtype=torch.float32, device=self.device)
            self.tensors.append(empty.set_(storage, start * ROW, shape, strides))
            start += rows

    def _views(self, flat: Tensor) -> list[Tensor]:
        """View a buffer as one tensor per weight."""
        views, start = [], 0
        for (shape, strides), rows in zip(self._layouts, self._rows, strict=True):
            views.append(flat.as_strided(shape, strides, start * ROW))
            start += rows
        return views

    def _broadcast(self, values: Sequence[Tensor]) -> Tensor:
        """Expand values per weight to a column (one per row), values per channel to a buffer."""
        if self.row.per_channel:
            flat = torch.ones(sum(self._rows), ROW, device=self.device)
            torch._foreach_copy_(self._views(flat), list(values))
            return flat
        repeats = constant(tuple(self._rows), torch.int64, self.device)
        # without `output_size` this would synchronize with the device
        column = torch.stack(list(values)).repeat_interleave(repeats, output_size=sum(self._rows))
        return column.unsqueeze(1)

    def _reduce(self, how: str) -> list[Tensor]:
        """Reduce `tensors`, which hold magnitudes; see `WeightQuantizer.reduce`."""
        if how == "max" and not self.row.per_channel:
            return list(torch._foreach_max(self.tensors))
        return [w.quantizer.reduce(v, how) for w, v in zip(self.weights, self.tensors, strict=True)]

    # -- normalization ---------------------------------------------------------------------------
    def normalize(self) -> None:
        """Compute u, scale and max|t| of every weight; see `WeightQuantizer.normalize`.

        It does not synchronize with the device. `finite` stores whether all weights are finite.
        """
        self._rms = self._top = None
        if self.ranges:
            t = self._squash()
            scales = self._learned_ranges()
            self._grad_divisor = self._top = self._broadcast(scales)
        elif self.row.reference == "rms":
            torch._foreach_copy_(self.tensors, self.originals)
            rms = self._root_mean_squares()
            scales = [span_of(each, self.row) for each in rms]
            self._grad_divisor = self._rms = self._broadcast(rms)
            t = self._squash()
        else:
            t = self._squash()
            scales = self._means() if self.choices.scale_kind == "mean" else self._maxima()
            torch.abs(t, out=self._buffer)
            tops = self._reduce("max")
            torch._foreach_clamp_min_(tops, TINY)
            self._grad_divisor = self._top = self._broadcast(tops)
        self._scale = self._broadcast(scales)
        if STES[self.choices.ste].value:
            self._grad_divisor = self._scale.clamp_min(TINY)
        self._u = self._to_unit(t)

    def _squash(self) -> Tensor:
        """Copy the weights to `tensors`; return t = squash(w) in another buffer."""
        torch._foreach_copy_(self.tensors, self.originals)
        w = self._buffer if self._rms is None else self._buffer / self._rms
        t = self.row.squash(w)
        return t.clone() if t is self._buffer else t

    def _to_unit(self, t: Tensor) -> Tensor:
        """Compute u from t, in place."""
        t.mul_(0.5)
        if self._top is not None:
            t.div_(self._top)
        t.add_(0.5)
        return t.clamp_(0.0, 1.0) if self._clamped else t

    def _unit(self) -> Tensor:
        """Return u. If it was dropped, compute it again, which overwrites `tensors`."""
        if self._u is None:
            self._u = self._to_unit(self._squash())
        return self._u

    def _maxima(self) -> list[Tensor]:
        self._buffer.abs_()
        tops = self._reduce("max")
        self.finite = torch.stack([top.isfinite().all() for top in tops]).all()
        return tops

    def _root_mean_squares(self) -> list[Tensor]:
        tops = self._maxima()
        torch._foreach_clamp_min_(tops, TINY)
        torch._foreach_div_(self.tensors, tops)
        self._buffer.mul_(self._buffer)
        means = self._reduce("mean")
        return [m.sqrt().mul(t).clamp_min(TINY) for m, t in zip(means, tops, strict=True)]

    def _learned_ranges(self) -> list[Tensor]:
        values = [x.value(r) for x, r in zip(self._range_layouts, self.ranges, strict=True)]
        every_range = torch.cat([v.flatten() for v in values])
        self.finite = self._buffer.isfinite().all() & every_range.isfinite().all()
        return values

    def _means(self) -> list[Tensor]:
        self._buffer.abs_()
        means = self._reduce("mean")
        self._buffer.mul_(2.0**-64)  # see WeightQuantizer.huge_mean
        if self.row.per_channel:
            huge = self._reduce("mean")
            scales = [_finite_mean(m, h) for m, h in zip(means, huge, strict=True)]
            self.finite = torch.stack([s.isfinite().all() for s in scales]).all()
            return scales
        sizes = constant(tuple(w.numel() for w in self.originals), torch.float32, self.device)
        all_huge = torch.stack(torch._foreach_norm(self.tensors, 1.0)) / sizes
        scale = _finite_mean(torch.stack(means), all_huge)
        self.finite = scale.isfinite().all()
        return list(scale.unbind())

    def check(self) -> None:
        """Raise ValueError if a weight contains NaN or infinity; the message names it."""
        if self.finite is None or bool(self.finite):
            return
        for w in self.weights:
            w.quantizer.check_finite(w.original)

    # -- backward --------------------------------------------------------------------------------
    def _backward(self, grad: Tensor) -> None:
        """Compute dL/dw from dL/du, in place; `tensors` may be overwritten.

        dL/dw is dL/du (dt/dw) / (2 range of t), or / (2 scale) for the rule "value"; see
        `Normalize`, which has the same operations in the same order.
        """
        slope = None if STES[self.choices.ste].value else self.row.slope
        if self._clamped or slope is not None:
            u = self._unit()
            if self._clamped:
                grad.mul_((u > 0) & (u < 1))
            if slope is not None:
                t = u.sub_(0.5).mul_(2.0)
                grad.mul_(slope(t if self._top is None else t.mul_(self._top)))
        grad.mul_(0.5).div_(self._grad_divisor)
        self._u = None

    def _add_range_grads(self, each: Tensor) -> None:
        each_weight = zip(self._range_layouts, self._views(each), self.ranges, strict=True)
        sums = [x.grad(v, r) for x, v, r in each_weight]
        if self._range_sums:
            torch._foreach_add_(self._range_sums, sums)
        else:
            self._range_sums = sums


@cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy constants to a device once, because each copy to a GPU waits for earlier work.

    They are never freed: recorded CUDA graphs read them.
    """
    with torch.inference_mode(False):  # training uses the cached tensor too
        return torch.tensor(values, dtype=dtype, device=device)


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
