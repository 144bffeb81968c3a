"""IntegerLayer: a quantized convolution or linear layer that runs on integers.

It reads uint8 activation codes. What follows the layer in the network is part of it: the batch norm
of the width in use is folded into gain and bias, and a sum with a shortcut, a ReLU and the
quantization of the result happen in the kernel.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tq_lightning.errors import UserError
from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import truncate_codes
from tq_lightning.quant.integer.activations import ActivationCodes, Codes
from tq_lightning.quant.integer.arithmetic import activation_top, integer_weight
from tq_lightning.quant.integer.exact import exact_codes, exact_value, finish
from tq_lightning.quant.integer.kernels import NO_ACT, Act, Conv2d, Linear, Requantization
from tq_lightning.quant.integer.norms import folded_norm
from tq_lightning.quant.integer.stored_weight import stored_weight


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
        layer: `nn.Conv2d` or `nn.Linear` with quantized weights, not refused by `plan.refusal`.
        width: The model's shared `Width`.
        into: Codes of the input.
        norm: Batch norm after the layer, per width or not.
        act: Activation that the kernel applies; only `RELU` after a shortcut.
        out: Codes of the output; None returns float32.
        residual: Codes of a shortcut that is added after the norm; None if it is float32.
        exact_sums: See `arithmetic.activation_top`.
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
        self.simulated = False  # see `oracle.simulated`
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
