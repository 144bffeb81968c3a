"""IntegerLayer: a quantized convolution or linear layer that runs on integers.

It reads uint8 activation codes. What follows the layer in the network is part of it: the batch norm
of the width in use is folded into gain and bias, and a sum with a shortcut, a ReLU and the
quantization of the result happen in the kernel.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from tq_lightning.errors import UserError
from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import truncate_codes
from tq_lightning.quant.integer_activations import ActivationCodes, Codes
from tq_lightning.quant.integer_codes import activation_top, integer_weight, signed_level
from tq_lightning.quant.integer_kernels import NO_ACT, Act, Conv2d, Linear, Requantization
from tq_lightning.quant.switchable_norm import PerWidthNorm
from tq_lightning.quant.weight import WeightQuantizer


class StoredWeight(NamedTuple):
    """Stored codes of a weight.

    Attributes:
        codes: uint8, shape of the weight.
        stored: Their width.
        scale: float32, broadcastable to the weight.
        level: A key of `levels.LEVELS`.
    """

    codes: Tensor
    stored: int
    scale: Tensor
    level: str


def stored_weight(layer: nn.Module) -> StoredWeight:
    """Read the codes of a quantized layer of a prepared or packed model."""
    chain: Any = layer.parametrizations["weight"]  # type: ignore[index]
    rule = chain[0]
    if isinstance(rule, WeightQuantizer):
        codes, scale = rule.codes(chain.original)
        return StoredWeight(codes, rule.width.max_bits, scale, rule.level)
    return StoredWeight(chain.original, rule.stored, rule.scale.float(), rule.level)


def refusal(layer: nn.Module) -> str | None:
    """Reason why a quantized layer cannot run on integers; None if it can."""
    kind = type(layer).__name__.removeprefix("Parametrized")
    forward = type(layer).forward
    if not (isinstance(layer, (nn.Conv2d, nn.Linear))):
        return f"{kind} has no integer kernel"
    if forward not in (nn.Conv2d.forward, nn.Linear.forward):
        return f"{kind} computes its output in its own way"
    if isinstance(layer, nn.Conv2d) and (
        layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return f"its padding is {layer.padding_mode}, {layer.padding}"
    if not parametrize.is_parametrized(layer, "weight"):
        return "its weight is not quantized"
    weight = stored_weight(layer)
    try:
        signed_level(weight.stored, weight.level)
    except ValueError as error:
        return str(error)
    shape = weight.codes.shape
    if weight.scale.numel() != 1 and weight.scale.shape != (shape[0], *(1,) * (len(shape) - 1)):
        return f"its scale has shape {tuple(weight.scale.shape)}, not one per output channel"
    return None


def folded_norm(norm: nn.Module | None, channels: int) -> tuple[Tensor, Tensor]:
    """Factor and shift, float64 (channels,), that a batch norm applies in evaluation mode."""
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


class Built(NamedTuple):
    """A layer made for one width.

    Attributes:
        key: Width and source.
        kernel: Prepacked kernel; of the upper seven bits of the codes if there are `halves`.
        halves: Kernel of the lowest bit of the codes, without bias; see `IntegerLayer.in_halves`.
        into: Codes of the input.
        out: Codes of the output.
        requantize: What the kernel makes them with.
        residual_step: Step of the shortcut.
        integers: int8 weights.
        gain: float64, value of an integer weight of each output channel.
        bias: float64, per output channel.
    """

    key: tuple[Any, ...]
    kernel: Conv2d | Linear
    halves: Conv2d | Linear | None
    into: Codes
    out: Codes | None
    requantize: Requantization | None
    residual_step: float
    integers: Tensor
    gain: Tensor
    bias: Tensor


class IntegerLayer(nn.Module):
    """Run a quantized layer, and what follows it, on integers. Shapes are those of the layer.

    Args:
        name: Name of the layer in the model.
        layer: `nn.Conv2d` or `nn.Linear` with quantized weights, not refused by `refusal`.
        width: The model's shared `Width`.
        into: Codes of the input.
        norm: Batch norm after the layer, per width or not.
        act: Activation that the kernel applies; only `RELU` after a shortcut.
        out: Codes of the output; None returns float32.
        residual: Codes of a shortcut that is added after the norm; None if it is float32.
        exact_sums: See `integer_codes.activation_top`.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        width: Width,
        into: ActivationCodes,
        norm: nn.Module | None = None,
        act: Act = NO_ACT,
        out: ActivationCodes | None = None,
        residual: ActivationCodes | None = None,
        exact_sums: bool = True,
    ) -> None:
        super().__init__()
        self.name, self.width = name, width
        self.layer, self.norm = layer, norm
        self.into, self.out, self.residual, self.act = into, out, residual, act
        self.exact_sums = exact_sums
        self.simulated = False  # see integer_oracle
        self._built: Built | None = None

    def __getstate__(self) -> dict[str, Any]:
        # prepacked weights can be neither copied nor pickled
        return {**self.__dict__, "_built": None}

    def _apply(self, fn: Any, recurse: bool = True) -> "IntegerLayer":
        self._built = None
        return super()._apply(fn, recurse)

    def forward(self, a: Tensor, residual: Tensor | None = None) -> Tensor:
        """Apply the layer to codes.

        Args:
            a: uint8 codes of `into`.
            residual: Shortcut, uint8 codes if the output is, else float32. It is overwritten.

        Returns:
            uint8 codes of `out`, or float32.

        Raises:
            UserError: The model was moved off the CPU.
        """
        built = self.built(a)
        if self.simulated:
            return finish(exact_value(self, a, residual), built.out)
        if built.halves is not None:
            return self.in_halves(built, a, residual)
        inputs = self.pad(a, built.into.zero)
        if residual is None:
            y = built.kernel(inputs, built.requantize, self.act)
        else:
            assert isinstance(built.kernel, Conv2d)
            y = built.kernel(inputs, built.requantize, self.act, residual, built.residual_step)
        if built.out is not None:
            if built.out.make_top < 255:
                y.clamp_(max=built.out.make_top)
            if built.out.shift:
                y >>= built.out.shift
        return y

    def in_halves(self, built: Built, a: Tensor, residual: Tensor | None) -> Tensor:
        """Run the layer on a >> 1 and a & 1, whose products cannot saturate, and add the results.

        Trained 8-bit codes stay as they are on processors that add products in 16 bits.
        """
        assert built.halves is not None
        y = built.kernel(a >> 1, None).add_(built.halves(a & 1, None))
        if residual is not None:
            y.add_(residual, alpha=built.residual_step)
        return finish(exact_codes(self.act.exact(y), built.out), built.out)

    def pad(self, a: Tensor, zero: int) -> Tensor:
        """Pad the input of a convolution with its zero point; code 0 is left to the kernel."""
        if not zero or not isinstance(self.layer, nn.Conv2d) or not any(self.layer.padding):
            return a
        padding: Any = self.layer.padding
        vertical, horizontal = padding
        return F.pad(a, (horizontal, horizontal, vertical, vertical), value=zero)

    def built(self, a: Tensor) -> Built:
        """Return the kernel of the width in use; make it if another width was used before."""
        key = (self.width.bits, self.width.source)
        if self._built is None or self._built.key != key:
            if a.device.type != "cpu":
                raise UserError(
                    f"integer mode runs on CPU, got a tensor on {a.device}; "
                    "load the model with mode='resident' for other devices"
                )
            self._built = None  # the memory of the other width goes first
            with torch.inference_mode(False), torch.no_grad():
                self._built = self._build(key, a)
        return self._built

    def _build(self, key: tuple[Any, ...], a: Tensor) -> Built:
        bits, layer = self.width.bits, self.layer
        assert bits is not None
        weight = stored_weight(layer)
        narrow = truncate_codes(weight.codes, weight.stored, bits)
        channels = narrow.shape[0]
        factor, shift = folded_norm(self.norm, channels)
        per_channel = (channels, *(1,) * (narrow.dim() - 1))
        integers = integer_weight(
            narrow, bits, weight.scale.double() * factor.view(per_channel), weight.level
        )
        into = self.into.at(self.width)
        out = None if self.out is None else self.out.at(self.width)
        gain = integers.gain.reshape(channels)
        bias = shift.clone()
        if layer.bias is not None:
            bias += layer.bias.detach().double() * factor  # type: ignore[operator,union-attr]
        sums = integers.codes.flatten(1).sum(1, dtype=torch.int64)
        bias -= gain * into.step * into.zero * sums
        if out is not None:
            bias += out.make_offset * out.make_step
        safe = self.exact_sums or into.top <= activation_top(bits, weight.level, False)
        halves = None if safe else self._kernel(integers.codes, gain, 0 * bias, a, into.step)
        step = into.step if safe else 2 * into.step
        kernel = self._kernel(integers.codes, gain, bias, self.pad(a, into.zero), step, into.zero)
        return Built(
            key,
            kernel,
            halves,
            into,
            out,
            None if out is None else Requantization(out.make_step, out.zero),
            1.0 if self.residual is None else self.residual.at(self.width).step,
            integers.codes,
            gain,
            bias,
        )

    def _kernel(
        self,
        integers: Tensor,
        gain: Tensor,
        bias: Tensor,
        a: Tensor,
        step: float,
        zero: int = 0,
    ) -> Conv2d | Linear:
        layer = self.layer
        if not isinstance(layer, nn.Conv2d):
            return Linear(integers, gain.float(), bias.float(), a.shape, step)
        padding: Any = (0, 0) if zero else layer.padding
        how = (layer.stride, padding, layer.dilation, layer.groups)
        return Conv2d(integers, gain.float(), bias.float(), a.shape, *how, step)

    def extra_repr(self) -> str:
        """Describe what the kernel does besides the layer."""
        parts = [self.act.name] if self.act != NO_ACT else []
        parts += ["sum"] if self.residual is not None else []
        return ", ".join([self.name, *parts, "float out" if self.out is None else "codes out"])


def exact_value(layer: IntegerLayer, a: Tensor, residual: Tensor | None) -> Tensor:
    """Value of a layer before rounding, in float64 from exact integer sums.

    Args:
        layer: An integer layer.
        a: Its input codes.
        residual: Its shortcut, not overwritten.

    Returns:
        float64: real-valued codes of the output (before clamp and shift), or values.
    """
    built, inner = layer.built(a), layer.layer
    inputs, weight = layer.pad(a, built.into.zero).double(), built.integers.double()
    if isinstance(inner, nn.Conv2d):
        padding = (0, 0) if built.into.zero else inner.padding
        sums = F.conv2d(inputs, weight, None, inner.stride, padding, inner.dilation, inner.groups)
        shape: tuple[int, ...] = (-1, 1, 1)
    else:
        sums, shape = F.linear(inputs, weight), (-1,)
    y = sums * (built.gain * built.into.step).view(shape) + built.bias.view(shape)
    if residual is not None:
        y = y + residual.double() * built.residual_step
    return exact_codes(layer.act.exact(y), built.out)


def exact_codes(value: Tensor, out: Codes | None) -> Tensor:
    """Express values in real-valued codes; None leaves them."""
    return value if out is None else value / out.make_step + out.zero


def finish(value: Tensor, out: Codes | None) -> Tensor:
    """Round exact values to what the layer returns."""
    if out is None:
        return value.float()
    codes = value.round().clamp(0, out.make_top).to(torch.uint8)
    return codes >> out.shift if out.shift else codes
