"""Prepack an integer layer at one width: its weight, batch norm and bias as one or two kernels."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tq_lightning.quant.integer.activations import CodeParams
from tq_lightning.quant.integer.arithmetic import IntegerWeight, integer_weight
from tq_lightning.quant.integer.kernels import Conv2d, Linear, Requantization
from tq_lightning.quant.integer.norms import folded_norm
from tq_lightning.quant.integer.saturation import (
    SPLIT,
    SplitWeight,
    activation_top,
    split_weight,
)
from tq_lightning.quant.integer.stored_weight import codes_at, stored_weight

if TYPE_CHECKING:
    from tq_lightning.quant.integer.layer import IntegerLayer


class Prepacked(NamedTuple):
    """The kernel of a layer at one width.

    Attributes:
        key: width and source.
        kernel: prepacked kernel.
        second: second product, which is added to the first; see `IntegerLayer.in_parts`.
        into: codes of the input.
        out: codes of the output.
        requantize: step and zero point of the codes `out`.
        residual_step: step of the shortcut.
        integers: int8 weights; with a second kernel, their exact sum in int16.
        gain: float64 (out,), weight per integer step of each output channel.
        offset: float64 (out,), added to the integers of each output channel.
        bias: float64 (out,).
    """

    key: tuple[Any, ...]
    kernel: Conv2d | Linear
    second: "SecondProduct | None"
    into: CodeParams
    out: CodeParams | None
    requantize: Requantization | None
    residual_step: float
    integers: Tensor
    gain: Tensor
    offset: Tensor
    bias: Tensor


class SecondProduct(NamedTuple):
    """A kernel without bias whose result is added to that of the first.

    Attributes:
        kernel: prepacked kernel.
        factor: float32, multiplies the product; broadcastable to the output.
    """

    kernel: Conv2d | Linear
    factor: Tensor


def prepack(layer: "IntegerLayer", a: Tensor) -> Prepacked:
    """Build the kernels of a layer at the width in use.

    Args:
        layer: the layer.
        a: an input of it, whose shape the kernels are built for.
    """
    inner, width = layer.layer, layer.width
    bits = width.bits
    assert bits is not None
    weight = stored_weight(inner)
    narrow = codes_at(inner, width)
    channels = narrow.shape[0]
    factor, shift = folded_norm(layer.norm, channels)
    per_channel = (channels, *(1,) * (narrow.dim() - 1))
    into = layer.into.at(width)
    out = None if layer.out is None else layer.out.at(width)
    scale = weight.scale.double() * factor.view(per_channel)
    safe = layer.exact_sums or into.top <= activation_top(bits, weight.level, False)
    split = None if safe else split_weight(narrow, bits, scale, weight.level)
    integers = split or integer_weight(narrow, bits, scale, weight.level, layer.exact)
    gain, offset = integers.gain.reshape(channels), integers.offset.reshape(channels)
    bias = shift.clone()
    if inner.bias is not None:
        bias += inner.bias.detach().double() * factor  # type: ignore[operator,union-attr]
    sums = integers.codes.flatten(1).sum(1, dtype=torch.int64)
    sums = sums + offset * narrow[0].numel()
    bias -= gain * into.step * into.zero * sums
    if out is not None:
        bias += out.make_offset * out.make_step
    of_input = (pad_input(inner, a, into.zero), into.step, into.zero)
    second = None
    if split is not None:
        high, low = split.parts
        kernel = _kernel(inner, high, SPLIT * gain, bias, *of_input)
        second = SecondProduct(_kernel(inner, low, gain, 0 * bias, *of_input), torch.ones(()))
    else:
        kernel = _kernel(inner, integers.codes, gain, bias, *of_input)
        if offset.any():
            second = _sum_of_inputs(inner, integers, of_input)
    return Prepacked(
        (bits, width.source),
        kernel,
        second,
        into,
        out,
        None if out is None else Requantization(out.make_step, out.zero),
        1.0 if layer.residual is None else layer.residual.at(width).step,
        integers.codes,
        gain,
        offset,
        bias,
    )


def _sum_of_inputs(
    layer: nn.Module, integers: IntegerWeight | SplitWeight, of_input: tuple[Tensor, float, int]
) -> SecondProduct:
    """Build a kernel that sums the inputs: one output channel, or all of them if grouped."""
    grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
    ones = torch.ones_like(integers.codes if grouped else integers.codes[:1])
    one = torch.ones(len(ones), dtype=torch.float64)
    factor = (integers.gain * integers.offset).float().flatten()
    shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
    return SecondProduct(_kernel(layer, ones, one, 0 * one, *of_input), factor.view(shape))


def _kernel(
    layer: nn.Module,
    integers: Tensor,
    gain: Tensor,
    bias: Tensor,
    a: Tensor,
    step: float,
    zero: int,
) -> Conv2d | Linear:
    if not isinstance(layer, nn.Conv2d):
        return Linear(integers, gain.float(), bias.float(), a.shape, step)
    padding: Any = (0, 0) if zero else layer.padding
    how = (layer.stride, padding, layer.dilation, layer.groups)
    return Conv2d(integers, gain.float(), bias.float(), a.shape, *how, step)


def pad_input(layer: nn.Module, a: Tensor, zero: int) -> Tensor:
    """Pad the input of a convolution with its zero point; the kernel itself pads with 0."""
    if not zero or not isinstance(layer, nn.Conv2d) or not any(layer.padding):
        return a
    padding: Any = layer.padding
    vertical, horizontal = padding
    return F.pad(a, (horizontal, horizontal, vertical, vertical), value=zero)
