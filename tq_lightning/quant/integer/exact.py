"""Exact reference of an integer layer: integer sums in float64, and their rounding to codes."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tq_lightning.quant.integer.activations import CodeParams
from tq_lightning.quant.integer.prepack import pad_input

if TYPE_CHECKING:
    from tq_lightning.quant.integer.layer import IntegerLayer


def exact_value(layer: "IntegerLayer", a: Tensor, residual: Tensor | None) -> Tensor:
    """Compute the value of a layer before rounding, in float64 from exact integer sums.

    Args:
        layer: an integer layer.
        a: its input codes.
        residual: its shortcut, not overwritten.

    Returns:
        float64: codes of the output before rounding, clamp and shift; or values without `out`.
    """
    prepacked, inner = layer.prepacked(a), layer.layer
    inputs, weight = pad_input(inner, a, prepacked.into.zero).double(), prepacked.integers.double()
    weight = weight + prepacked.offset.view(-1, *[1] * (weight.dim() - 1))
    if isinstance(inner, nn.Conv2d):
        padding = (0, 0) if prepacked.into.zero else inner.padding
        sums = F.conv2d(inputs, weight, None, inner.stride, padding, inner.dilation, inner.groups)
        shape: tuple[int, ...] = (-1, 1, 1)
    else:
        sums, shape = F.linear(inputs, weight), (-1,)
    y = sums * (prepacked.gain * prepacked.into.step).view(shape) + prepacked.bias.view(shape)
    if residual is not None:
        y = y + residual.double() * prepacked.residual_step
    return exact_codes(layer.act.exact(y), prepacked.out)


def exact_codes(value: Tensor, out: CodeParams | None) -> Tensor:
    """Convert values to codes without rounding; return them unchanged if `out` is None."""
    return value if out is None else value / out.make_step + out.zero


def finish(value: Tensor, out: CodeParams | None) -> Tensor:
    """Round exact values to the output of the layer."""
    if out is None:
        return value.float()
    codes = value.round().clamp(0, out.make_top).to(torch.uint8)
    return codes >> out.shift if out.shift else codes
