"""The joint step: one optimizer step on the losses of several widths, at the memory of one.

Each width's forward and backward runs on its own, widest first, and its gradients are added up outside of `.grad`; what
the caller gets is one loss tensor whose backward hands the sums to the parameters. To everything behind it (Lightning's
automatic optimisation, clipping, accumulation, a gradient scaler, DDP's reducer) this is one ordinary backward: each
parameter's gradient arrives once a step, so DDP reduces once a step and not once a width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.errors import TrainingError
from tq_lightning.quant.bit_width import bit_width
from tq_lightning.quant.weight import shared_normalization

# what a width's logits are scored with: (bits, logits, logits of the passes before) -> scalar loss
WidthLoss = Callable[[int | None, Tensor, dict[int | None, Tensor]], Tensor]


class _HandOver(torch.autograd.Function):
    """loss -> loss; its backward gives each parameter the gradient that was summed up before, times the incoming one."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor | None], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads, ctx.grads = ctx.grads, None
        # in place: the sums belong to this step alone, and a copy of all gradients would be their second
        torch._foreach_mul_([g for g in grads if g is not None], grad.to(torch.float32))
        return None, None, *grads


def _own(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients that may be written to: autograd hands one tensor to both sides of a sum, or an expanded one."""
    seen: set[int] = set()
    owned: list[Tensor | None] = []
    for g in grads:
        if g is not None and (g.data_ptr() in seen or 0 in g.stride()):
            g = g.clone(memory_format=torch.contiguous_format)
        if g is not None:
            seen.add(g.data_ptr())
        owned.append(g)
    return owned


def _add(sums: list[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    old: list[Tensor] = []
    new: list[Tensor] = []
    for i, g in enumerate(grads):
        if g is None:
            continue
        so_far = sums[i]
        if so_far is None:
            sums[i] = g
        else:
            old.append(so_far)
            new.append(g)
    if old:
        torch._foreach_add_(old, new)


def joint_loss(
    model: nn.Module,
    images: Tensor,
    widths: Sequence[int | None],
    width_loss: WidthLoss,
    weights: Sequence[float] | None = None,
    loss_scale: float = 1.0,
) -> tuple[Tensor, dict[int | None, Tensor]]:
    """Runs forward and backward at every width and returns the weighted sum of their losses, ready for one backward.

    Args:
        model: a prepared model in training mode.
        images: (batch, channels, height, width).
        widths: widths of this step, widest first; None = float.
        width_loss: scores a width's logits, given the detached logits of the wider passes of this step.
        weights: factor per width, aligned with `widths`; None = 1 each.
        loss_scale: factor for the inner backward passes, undone after them: a gradient scaler's, for float16.

    Returns:
        loss: scalar; its backward puts d loss / d parameter into `.grad` of every parameter that took part.
        losses: {width: its detached loss, not weighted}.

    Raises:
        TrainingError: a loss that is not finite; the message names the width, and the first parameter that is not either.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    losses: dict[int | None, Tensor] = {}
    logits: dict[int | None, Tensor] = {}
    with shared_normalization(model) as quantized:
        position = {id(p): i for i, p in enumerate(params)}
        # a weight that takes part at its quantized widths is reached through its normalized leaf, see below
        leaves: dict[str, Tensor] = {}
        sums: list[Tensor | None] = [None] * len(params)
        leaf_sums: dict[str, Tensor] = {}
        for i, bits in enumerate(widths):
            with bit_width(model, bits):
                out = model(images)
                loss = width_loss(bits, out, logits)
            logits[bits], losses[bits] = out.detach(), loss.detach()
            factor = loss_scale if weights is None else loss_scale * weights[i]
            for w in quantized:
                shared = w.quantizer._shared
                if shared is not None and shared.u.requires_grad and w.name not in leaves:
                    leaves[w.name] = shared.u
            keys = list(leaves)
            with torch.autocast(images.device.type, enabled=False):
                inputs = [*params, *(leaves[k] for k in keys)]
                grads = _own(torch.autograd.grad(loss * factor, inputs, allow_unused=True))
            del out, loss
            _add(sums, grads[: len(params)])
            for key, g in zip(keys, grads[len(params) :], strict=True):
                if g is not None:
                    leaf_sums[key] = g if key not in leaf_sums else leaf_sums[key].add_(g)
            del grads
        with torch.no_grad():
            for w in quantized:
                if w.name in leaf_sums:
                    grad = w.quantizer.normalizer_grad(leaf_sums.pop(w.name))
                    _add_at(sums, position[id(w.original)], grad.to(w.original.dtype))
    present = [g for g in sums if g is not None]
    if loss_scale != 1.0:
        torch._foreach_div_(present, loss_scale)
    bad = [bits for bits, loss in losses.items() if not torch.isfinite(loss)]
    if bad:
        raise TrainingError(
            f"loss is not finite at width {'float' if bad[0] is None else bad[0]}{_culprit(model)}"
        )
    factors = [1.0] * len(widths) if weights is None else list(weights)
    total = torch.stack([f * losses[b].float() for f, b in zip(factors, widths, strict=True)]).sum()
    return _HandOver.apply(total, sums, *params), losses


def _culprit(model: nn.Module) -> str:
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            return f"; {name.replace('.parametrizations.', '.').removesuffix('.original')} holds NaN or infinity"
    return ""


def idle_parameters(model: nn.Module, loss: Tensor) -> list[nn.Parameter]:
    """Parameters of `model` that took no part in the joint `loss` and get no gradient from it: norms of other widths."""
    params = [p for p in model.parameters() if p.requires_grad]
    grads = loss.grad_fn.grads  # type: ignore[union-attr]  # the context of _HandOver
    return [p for p, g in zip(params, grads, strict=True) if g is None]


def _add_at(sums: list[Tensor | None], i: int, grad: Tensor) -> None:
    old = sums[i]
    sums[i] = grad if old is None else old.add_(grad)
