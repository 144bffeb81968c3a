"""The autograd function of the normalizer: u from t and the range, and dL/dw from dL/du."""

import torch

from tq_lightning.quant.normalizers import NORMALIZERS


class Normalize(torch.autograd.Function):
    """u = t / (2 range) + 1/2, with the gradient of `w`; the range carries none here.

    Only `u` is kept for the backward pass, which recovers t from it. `FlatWeights` does the same
    for all weights of a model at once, in the same order of operations, so both give the same bits.

    forward(w, t, top, normalizer, clamped): float32 weight and t = squash(w), any shape; `top` is
    the range of t, broadcastable; `clamped` tells that t may lie outside of it (a learned range).
    Returns float32 u in [0, 1], shape of `w`.
    """

    @staticmethod
    def forward(ctx, w, t, top, normalizer, clamped):  # type: ignore[no-untyped-def]
        """Return u."""
        # halved first, since twice a maximum near 3e38 overflows
        u = (t * 0.5).div_(top).add_(0.5)
        if clamped:
            u.clamp_(0.0, 1.0)
        ctx.save_for_backward(u, top)
        ctx.rule = (normalizer, clamped)
        return u

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Return dL/dw = dL/du (dt/dw) / (2 range), 0 where `u` was clamped."""
        u, top = ctx.saved_tensors
        normalizer, clamped = ctx.rule
        slope = NORMALIZERS[normalizer].slope
        if clamped:
            grad = grad * ((u > 0) & (u < 1))
        if slope is not None:
            grad = grad * slope((u - 0.5).mul_(2.0).mul_(top))
        return grad * 0.5 / top, None, None, None, None
