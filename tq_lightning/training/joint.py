"""Joint training: one optimizer step on the losses of several widths, with the memory of one.

Forward and backward passes run one width at a time, widest first. The gradients are summed outside
of `.grad`. The caller gets one loss tensor, whose backward pass assigns the sums to the parameters.
Lightning's automatic optimization, clipping, accumulation, a gradient scaler and DDP's reducer see
one ordinary backward pass. Each parameter receives its gradient once per step, so DDP reduces once
per step instead of once per width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tq_lightning.errors import TrainingError
from tq_lightning.quant.batches import call_model, overwrites_outputs
from tq_lightning.quant.bit_width import walk_modules
from tq_lightning.quant.flat_normalizer import constant
from tq_lightning.quant.fused_weights import fused_weights
from tq_lightning.quant.trained_parameters import TrainedParameters
from tq_lightning.training.losses import WidthLoss
from tq_lightning.training.precomputed_gradients import with_gradients


class JointGradients(NamedTuple):
    """The tensors that a joint step computes, without reading any of them.

    Attributes:
        losses: loss of each width, not weighted, float32 (widths,).
        finite: scalar bool: whether all losses and weights are finite.
        grads: gradient of the weighted sum of the losses for each of `parameters`; None if it was
            not used.
        parameters: the parameters of the model that require a gradient.
    """

    losses: Tensor
    finite: Tensor
    grads: list[Tensor | None]
    parameters: list[nn.Parameter]


def joint_loss(
    model: nn.Module,
    inputs: Any,
    widths: Sequence[int | None],
    width_loss: WidthLoss,
    weights: Sequence[float] | None = None,
    loss_scale: float = 1.0,
) -> tuple[Tensor, dict[int | None, Tensor]]:
    """Run forward and backward at every width and return the weighted sum of the losses.

    Args:
        model: a prepared model in training mode.
        inputs: inputs of the model: a tensor, a tuple of arguments, or a mapping of keyword
            arguments.
        widths: widths of this step, widest first; None is float.
        width_loss: (width, its logits, {wider width: detached logits}) -> scalar loss. It depends
            on the parameters only through the logits: no gradients of the norms of other widths
            are computed.
        weights: weight of each loss, in the order of `widths`; None is 1 for each.
        loss_scale: factor of the inner backward passes, which is divided out afterward. In float16,
            pass the scale of the gradient scaler.

    Returns:
        (loss, losses). `loss` is a scalar; `loss.backward()` adds to the `.grad` of every parameter
        that was used (`torch.autograd.grad` does not find the parameters). `losses` is {width:
        detached loss, not weighted}.

    Raises:
        TrainingError: a loss is not finite. The message names the width, and the first parameter
            that is not finite if there is one.
    """
    step = joint_gradients(model, inputs, widths, width_loss, weights, loss_scale)
    return loss_with_gradients(model, step, widths, weights)


def loss_with_gradients(
    model: nn.Module,
    step: JointGradients,
    widths: Sequence[int | None],
    weights: Sequence[float] | None = None,
) -> tuple[Tensor, dict[int | None, Tensor]]:
    """Return what `joint_loss` returns, from the tensors of `joint_gradients`.

    The gradients become those of the parameters, without a copy.

    Raises:
        TrainingError: a loss is not finite.
    """
    losses = dict(zip(widths, step.losses.unbind(), strict=True))
    if not bool(step.finite):  # the only synchronization of a step with the device
        raise TrainingError(_not_finite(model, losses))
    values, factors = step.losses, tuple(weights or ())
    if any(factor != 1.0 for factor in factors):
        values = values * constant(factors, torch.float32, values.device)
    return with_gradients(values.sum(), step.grads, step.parameters), losses


def joint_gradients(
    model: nn.Module,
    inputs: Any,
    widths: Sequence[int | None],
    width_loss: WidthLoss,
    weights: Sequence[float] | None = None,
    loss_scale: float = 1.0,
) -> JointGradients:
    """Run forward and backward at every width; see `joint_loss` for the arguments.

    Nothing is read from the device, so the kernels can be recorded as a CUDA graph.
    """
    factors = [1.0] * len(widths) if weights is None else list(weights)
    losses: list[Tensor] = []
    logits: dict[int | None, Tensor] = {}
    copy = overwrites_outputs(model)
    with fused_weights(model, check=False, keep=True) as fused, fused.held():
        inner = fused.depth > 1  # the block of a caller, who may have opened it for another module
        trained = TrainedParameters(walk_modules(model)) if inner else fused.trained
        params = trained.parameters
        sums: list[Tensor | None] = [None] * len(params)
        for bits, factor in zip(widths, factors, strict=True):
            with fused.at(bits):
                for group in fused.groups:
                    group.require_grad()
                out = call_model(model, inputs)
                loss = width_loss(bits, out, logits)
                losses.append(loss.detach().float())
                logits[bits] = out.detach().clone() if copy else out.detach()
                # the weights of a width are leaves; their gradients go through the straight-through
                # rule here, and once per step through the normalizer
                leaves = [leaf for group in fused.groups for leaf in group.leaves]
                used = trained.used(bits)
                inputs_of_grad = [*(params[index] for index in used), *leaves]
                with torch.autocast(params[0].device.type, enabled=False):
                    if loss_scale * factor != 1.0:
                        loss = loss * (loss_scale * factor)
                    grads = torch.autograd.grad(loss, inputs_of_grad, allow_unused=True)
            del out, loss
            _accumulate(sums, used, _writable(grads[: len(used)]), copy)
            leaf_grads = iter(grads[len(used) :])
            if copy and bits is None:  # the fused weights keep the gradients of the float pass
                leaf_grads = iter([None if g is None else g.clone() for g in leaf_grads])
            for group in fused.groups:
                group.add_grads([next(leaf_grads) for _ in group.leaves])
            del grads, leaf_grads
        finite = [group.finite for group in fused.groups if group.finite is not None]
        for group in fused.groups:
            for parameter, grad in group.gradients():
                index = trained.indices[id(parameter)]
                before = sums[index]
                sums[index] = grad if before is None else before.add_(grad)
    if loss_scale != 1.0:
        torch._foreach_div_([g for g in sums if g is not None], loss_scale)
    values = torch.stack(losses)
    all_finite = torch.stack([values.isfinite().all(), *finite]).all()
    return JointGradients(values, all_finite, sums, params)


def _writable(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Clone gradients that share memory: autograd may return a tensor twice, or expanded."""
    present = [g for g in grads if g is not None]
    distinct = len(set(map(Tensor.data_ptr, present))) == len(present)
    if distinct and all(map(Tensor.is_contiguous, present)):  # an expanded one is not
        return list(grads)
    seen: set[int] = set()
    writable: list[Tensor | None] = []
    for g in grads:
        if g is not None and (g.data_ptr() in seen or 0 in g.stride()):
            g = g.clone(memory_format=torch.contiguous_format)
        if g is not None:
            seen.add(g.data_ptr())
        writable.append(g)
    return writable


def _accumulate(
    sums: list[Tensor | None], used: list[int], grads: Sequence[Tensor | None], copy: bool
) -> None:
    """Add `grads` to the sums with the indices `used`, with one fused call.

    The first gradient becomes the sum itself, or a copy of it if `copy`.
    """
    old: list[Tensor] = []
    new: list[Tensor] = []
    for i, g in zip(used, grads, strict=True):
        if g is None:
            continue
        total = sums[i]
        if total is None:
            sums[i] = g.clone() if copy else g
        else:
            old.append(total)
            new.append(g)
    if old:
        torch._foreach_add_(old, new)


def _not_finite(model: nn.Module, losses: dict[int | None, Tensor]) -> str:
    """Describe the first width with a non-finite loss, and the first non-finite parameter."""
    bad = [bits for bits, loss in losses.items() if not torch.isfinite(loss)]
    width = next(iter(bad or losses))
    text = f"loss is not finite at width {'float' if width is None else width}"
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            layer = name.replace(".parametrizations.", ".").removesuffix(".original")
            return f"{text}; {layer} contains NaN or infinity"
    return text
