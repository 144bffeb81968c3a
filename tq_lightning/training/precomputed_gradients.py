"""A loss whose backward pass gives the parameters gradients that were computed before."""

from typing import Any

import torch
from torch import Tensor, nn


def with_gradients(
    loss: Tensor, grads: list[Tensor | None], parameters: list[nn.Parameter]
) -> Tensor:
    """Return a loss equal to `loss`; its `backward` adds to the `.grad` of the parameters.

    Args:
        loss: scalar without a graph.
        grads: gradient for each of `parameters`, of its shape; None if it was not used. The
            backward pass multiplies them by its incoming gradient, in place.
        parameters: the parameters in training.
    """
    inputs = parameters if _observed(parameters) else []
    if not inputs:
        loss.requires_grad_()  # else there would be no backward pass
    return _PrecomputedGradients.apply(loss, grads, parameters, *inputs)


def unused_parameters(loss: Tensor) -> list[nn.Parameter]:
    """Return the parameters without a gradient from `loss`, the result of `with_gradients`."""
    return loss.grad_fn.unused  # type: ignore[union-attr]  # the context of _PrecomputedGradients


class _PrecomputedGradients(torch.autograd.Function):
    """Identity on the loss, whose backward pass gives the parameters precomputed gradients.

    The gradients are multiplied by the incoming gradient of the loss. Autograd assigns those of
    `inputs`, and calls their hooks. Without inputs, `backward` assigns the gradients of
    `parameters` with the same result, in a third of the time if there are hundreds of small ones.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        grads: list[Tensor | None],
        parameters: list[nn.Parameter],
        *inputs: Tensor,
    ) -> Tensor:
        ctx.grads = grads
        ctx.unused = [p for p, g in zip(parameters, grads, strict=True) if g is None]
        ctx.assign = None if inputs else parameters
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads, ctx.grads = ctx.grads, None
        # in place: nothing else reads the sums, and a copy would double the gradient memory
        torch._foreach_mul_([g for g in grads if g is not None], grad.to(torch.float32))
        if ctx.assign is None:
            return None, None, None, *grads
        _assign(ctx.assign, grads)
        return None, None, None


def _assign(parameters: list[nn.Parameter], grads: list[Tensor | None]) -> None:
    """Add the gradients to those of the parameters, as autograd does."""
    old: list[Tensor] = []
    new: list[Tensor] = []
    for p, g in zip(parameters, grads, strict=True):
        if g is None:
            continue
        before = p.grad
        if before is not None:
            old.append(before)
            new.append(g)
        else:  # with the strides of the parameter
            p.grad = g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
    if old:
        torch._foreach_add_(old, new)


def _observed(parameters: list[nn.Parameter]) -> bool:
    """Return True if something may expect autograd to assign the gradients: DDP, or a hook."""
    return (torch.distributed.is_available() and torch.distributed.is_initialized()) or any(
        p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters
    )
