"""The autograd function of the normalizer: u from t and its range, and dL/dw from dL/du."""

import torch

from tq_lightning.quant.normalizers import NORMALIZERS


class Normalize(torch.autograd.Function):
    """Compute u = t / (2 range) + 1/2, with a gradient for `w` but not for the range.

    Only `u` is saved for the backward pass, which recovers t from it. `FlatWeights` computes the
    same for all weights of a model at once, in the same order of operations, with bit-identical
    results.

    forward(w, t, top, over, normalizer, slope, clamped):

    - `w` is the float32 weight, and `t` = squash(w), of any shape.
    - `top` is the range of t, broadcastable, or None for 1.
    - `over` is the divisor of the gradient: dL/dw = dL/du (dt/dw) / (2 over). None is `top`,
      because torch.compile does not trace a tensor that is passed twice.
    - `slope` includes the factor dt/dw in the gradient.
    - `clamped` clamps u to [0, 1]; the gradient is 0 at both ends.

    Returns float32 u in [0, 1], shape of `w`.
    """

    @staticmethod
    def forward(ctx, w, t, top, over, normalizer, slope, clamped):  # type: ignore[no-untyped-def]
        """Return u."""
        # halved first, since twice a maximum near 3e38 overflows
        u = t * 0.5
        if top is not None:
            u.div_(top)
        u.add_(0.5)
        if clamped:
            u.clamp_(0.0, 1.0)
        ctx.save_for_backward(u, top, over)
        ctx.rule = (NORMALIZERS[normalizer].slope if slope else None, clamped)
        return u

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Return dL/dw = dL/du (dt/dw) / (2 over), 0 where `u` was clamped."""
        u, top, over = ctx.saved_tensors
        over = top if over is None else over
        slope, clamped = ctx.rule
        if clamped:
            grad = grad * ((u > 0) & (u < 1))
        if slope is not None:
            t = (u - 0.5).mul_(2.0)
            grad = grad * slope(t if top is None else t.mul_(top))
        return grad * 0.5 / over, None, None, None, None, None, None
