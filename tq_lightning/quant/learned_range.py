"""Learned ranges: the parameters of the normalizers `learned` and `learned_channel`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

LEAST_RANGE = 1e-6  # a learned range at or below zero would never recover


class _Gain(torch.autograd.Function):
    """Identity whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx, x, gain):  # type: ignore[no-untyped-def]
        """Return `x`."""
        ctx.gain = gain
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Return the gradient times the number."""
        return grad * ctx.gain, None


@dataclass(frozen=True)
class LearnedRange:
    """The layout and the gradient of the learned range of a weight.

    The parameter is a scalar, or has one element per output channel, broadcastable to the weight.
    Its gradient is the `scale_rule` of the STE, summed over the N weights of the range and divided
    by sqrt(N). LSQ (arXiv 1902.08153) divides the gradient of a step size by sqrt(N Q) for Q steps.
    The range spans Q steps and does not shrink as the width grows, so the factor Q is not needed.

    Attributes:
        gain: factor of the gradient, 1 / sqrt(N).
        groups: groups of a transposed convolution with a range per channel, else None.
        rows: rows of each group, which share a range.
    """

    gain: float = 1.0
    groups: int | None = None
    rows: int = 1

    @classmethod
    def start(
        cls, weight: Tensor, first: Tensor, groups: int | None
    ) -> tuple["LearnedRange", nn.Parameter]:
        """Return a learned range and its parameter.

        Args:
            weight: the weight.
            first: first values, broadcastable to the weight; 1 replaces values near 0.
            groups: as in the attribute.
        """
        first = torch.where(first > LEAST_RANGE, first, torch.ones_like(first))
        rows = 1
        if groups is not None:
            rows = weight.shape[0] // groups
            first = first.unflatten(0, (groups, rows))[:, :1]
        gain = (first.numel() / max(1, weight.numel())) ** 0.5
        return cls(gain, groups, rows), nn.Parameter(first.clone())

    def value(self, parameter: Tensor) -> Tensor:
        """Return the range, at least `LEAST_RANGE`, broadcastable to the weight, in float32."""
        learned = parameter.float()
        floor = learned - learned.detach() + LEAST_RANGE
        value = _Gain.apply(torch.where(learned > LEAST_RANGE, learned, floor), self.gain)
        if self.groups is None:
            return value
        return value.expand(-1, self.rows, *(-1,) * (value.dim() - 2)).flatten(0, 1)

    def grad(self, each: Tensor, parameter: Tensor) -> Tensor:
        """Sum dL/drange of each element of the weight to the shape of the parameter."""
        if self.groups is not None:
            each = each.sum_to_size(*each.shape[:2], *parameter.shape[3:])
            each = each.unflatten(0, (self.groups, self.rows))
        return each.sum_to_size(parameter.shape) * self.gain
