"""Batch norms that integer layers fold into their gain and bias."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tq_lightning.quant.integer.kernels import GELU, kernel_act
from tq_lightning.quant.integer.trace import NO_OPS
from tq_lightning.quant.switchable_norm import PerWidthNorm


def folds(norm: nn.Module | None) -> bool:
    """Return True if a norm can be folded: a batch norm of PyTorch or timm with statistics.

    timm's `BatchNormAct2d` includes an activation, which the kernel has to apply.
    """
    if isinstance(norm, PerWidthNorm):
        return all(folds(one) for one in norm.sets.values())
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return False
    if type(norm).forward is _BatchNorm.forward:
        return True
    act, drop = getattr(norm, "act", None), getattr(norm, "drop", None)
    return (
        type(norm).__name__ == "BatchNormAct2d"
        and isinstance(drop, NO_OPS)
        and (isinstance(act, NO_OPS) or (kernel_act(act) or GELU).name != "gelu")
    )


def act_of(norm: nn.Module | None) -> nn.Module | None:
    """Return the activation inside a norm that `folds`, or None."""
    if isinstance(norm, PerWidthNorm):
        norm = next(iter(norm.sets.values()))
    return getattr(norm, "act", None)


def folded_norm(norm: nn.Module | None, channels: int) -> tuple[Tensor, Tensor]:
    """Return factor and shift of a batch norm in evaluation mode, float64 (channels,)."""
    if isinstance(norm, PerWidthNorm):
        width = norm.width
        norm = norm.sets[str(width.bits)]
    if norm is None:
        one = torch.ones(channels, dtype=torch.float64)
        return one, torch.zeros_like(one)
    assert isinstance(norm, _BatchNorm) and norm.running_var is not None
    assert norm.running_mean is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -norm.running_mean.double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return factor, shift


# The output of a batch norm has heavier tails than a normal distribution. In a trained ResNet-20, a
# spread of 4 clips up to 15 values in 10,000 of a tensor, and 6 clips at most 1 in 10,000.
SPREAD = 6.0


def norm_spread(beta: Tensor, gamma: Tensor) -> tuple[float, float]:
    """Return the range of a batch norm's output from its parameters (channels,); it includes 0."""
    low = (beta - SPREAD * gamma.abs()).min()
    high = (beta + SPREAD * gamma.abs()).max()
    return min(float(low), 0.0), max(float(high), 0.0)
