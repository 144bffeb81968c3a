"""IntegerLayer: a quantized convolution or linear layer that runs on integers.

It reads uint8 activation codes and includes the operations that follow: the batch norm of the width
in use is folded into gain and bias, and the kernel adds a shortcut, applies an activation and
quantizes the result.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tq_lightning.errors import UserError
from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import truncate_codes
from tq_lightning.quant.integer.activations import ActivationCodes, Codes
from tq_lightning.quant.integer.arithmetic import (
    SPLIT,
    IntegerWeight,
    SplitWeight,
    activation_top,
    integer_weight,
    split_weight,
)
from tq_lightning.quant.integer.exact import exact_codes, exact_value, finish
from tq_lightning.quant.integer.kernels import NO_ACT, Act, Conv2d, Linear, Requantization
from tq_lightning.quant.integer.norms import folded_norm
from tq_lightning.quant.integer.stored_weight import stored_weight


class Built(NamedTuple):
    """The kernel of a layer at one width.

    Attributes:
        key: Width and source.
        kernel: Prepacked kernel.
        rest: Second kernel, without bias, whose result is added; see `IntegerLayer.in_parts`.
        into: Codes of the input.
        out: Codes of the output.
        requantize: Step and zero point of the codes `out`.
        residual_step: Step of the shortcut.
        integers: int8 weights; with a second kernel, their exact sum in int16.
        gain: float64 (out,), weight per integer step of each output channel.
        offset: float64 (out,), added to the integers of each output channel.
        bias: float64 (out,).
    """

    key: tuple[Any, ...]
    kernel: Conv2d | Linear
    rest: "Rest | None"
    into: Codes
    out: Codes | None
    requantize: Requantization | None
    residual_step: float
    integers: Tensor
    gain: Tensor
    offset: Tensor
    bias: Tensor


class Rest(NamedTuple):
    """A second product that is added to the first.

    Attributes:
        kernel: Prepacked kernel.
        factor: float32, multiplies the product; broadcastable to the output.
    """

    kernel: Conv2d | Linear
    factor: Tensor


class IntegerLayer(nn.Module):
    """Run a quantized layer and the operations that follow on integers. Shapes do not change.

    Args:
        name: Name of the layer in the model.
        layer: `nn.Conv2d` or `nn.Linear` with quantized weights that `plan.refusal` accepts.
        width: The model's shared `Width`.
        into: Codes of the input.
        norm: Batch norm after the layer, per width or not.
        act: Activation that the kernel applies; only `RELU` after a shortcut.
        out: Codes of the output; None returns float32.
        residual: Codes of a shortcut that is added after the norm; None if it is float32.
        exact_sums: See `arithmetic.activation_top`.
        exact: Use exact weights at every width; see `arithmetic.integer_weight`. At 8 bits this may
            take a second kernel.
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
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.width = name, width
        self.layer, self.norm = layer, norm
        self.into, self.out, self.residual, self.act = into, out, residual, act
        self.exact_sums, self.exact = exact_sums, exact
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
            residual: Shortcut, uint8 codes if the output is uint8, else float32. Overwritten.

        Returns:
            uint8 codes of `out`, or float32.

        Raises:
            UserError: The model was moved off the CPU.
        """
        built = self.built(a)
        if self.simulated:
            return finish(exact_value(self, a, residual), built.out)
        if built.rest is not None:
            return self.in_parts(built, a, residual)
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

    def in_parts(self, built: Built, a: Tensor, residual: Tensor | None) -> Tensor:
        """Add the products of two kernels whose integers sum to the weight.

        They are k' and ones, whose product is the sum of the inputs, or, on processors that add
        products in 16 bits, the upper bits and the two lowest bits of the weight.
        """
        assert built.rest is not None
        inputs = self.pad(a, built.into.zero)
        y = built.kernel(inputs, None).addcmul_(built.rest.kernel(inputs, None), built.rest.factor)
        if residual is not None:
            y.add_(residual, alpha=built.residual_step)
        return finish(exact_codes(self.act.exact(y), built.out), built.out)

    def pad(self, a: Tensor, zero: int) -> Tensor:
        """Pad the input of a convolution with its zero point; the kernel itself pads with 0."""
        if not zero or not isinstance(self.layer, nn.Conv2d) or not any(self.layer.padding):
            return a
        padding: Any = self.layer.padding
        vertical, horizontal = padding
        return F.pad(a, (horizontal, horizontal, vertical, vertical), value=zero)

    def built(self, a: Tensor) -> Built:
        """Return the kernel of the width in use; build it if the width has changed."""
        key = (self.width.bits, self.width.source)
        if self._built is None or self._built.key != key:
            if a.device.type != "cpu":
                raise UserError(
                    f"integer mode runs on CPU, got a tensor on {a.device}; "
                    "load the model with mode='resident' for other devices"
                )
            self._built = None  # free the kernel of the other width first
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
        into = self.into.at(self.width)
        out = None if self.out is None else self.out.at(self.width)
        scale = weight.scale.double() * factor.view(per_channel)
        safe = self.exact_sums or into.top <= activation_top(bits, weight.level, False)
        split = None if safe else split_weight(narrow, bits, scale, weight.level)
        integers = split or integer_weight(narrow, bits, scale, weight.level, self.exact)
        gain, offset = integers.gain.reshape(channels), integers.offset.reshape(channels)
        bias = shift.clone()
        if layer.bias is not None:
            bias += layer.bias.detach().double() * factor  # type: ignore[operator,union-attr]
        sums = integers.codes.flatten(1).sum(1, dtype=torch.int64)
        sums = sums + offset * narrow[0].numel()
        bias -= gain * into.step * into.zero * sums
        if out is not None:
            bias += out.make_offset * out.make_step
        padded = self.pad(a, into.zero)
        how = (padded, into.step, into.zero)
        rest = None
        if split is not None:
            high, low = split.parts
            kernel = self._kernel(high, SPLIT * gain, bias, *how)
            rest = Rest(self._kernel(low, gain, 0 * bias, *how), torch.ones(()))
        else:
            kernel = self._kernel(integers.codes, gain, bias, *how)
            if offset.any():
                rest = self._sum_of_inputs(integers, how)
        return Built(
            key,
            kernel,
            rest,
            into,
            out,
            None if out is None else Requantization(out.make_step, out.zero),
            1.0 if self.residual is None else self.residual.at(self.width).step,
            integers.codes,
            gain,
            offset,
            bias,
        )

    def _sum_of_inputs(
        self, integers: IntegerWeight | SplitWeight, how: tuple[Tensor, float, int]
    ) -> Rest:
        """Build a kernel that sums the inputs: one output channel, or all of them if grouped."""
        grouped = isinstance(self.layer, nn.Conv2d) and self.layer.groups > 1
        ones = torch.ones_like(integers.codes if grouped else integers.codes[:1])
        one = torch.ones(len(ones), dtype=torch.float64)
        factor = (integers.gain * integers.offset).float().flatten()
        shape = (-1, 1, 1) if isinstance(self.layer, nn.Conv2d) else (-1,)
        return Rest(self._kernel(ones, one, 0 * one, *how), factor.view(shape))

    def _kernel(
        self,
        integers: Tensor,
        gain: Tensor,
        bias: Tensor,
        a: Tensor,
        step: float,
        zero: int,
    ) -> Conv2d | Linear:
        layer = self.layer
        if not isinstance(layer, nn.Conv2d):
            return Linear(integers, gain.float(), bias.float(), a.shape, step)
        padding: Any = (0, 0) if zero else layer.padding
        how = (layer.stride, padding, layer.dilation, layer.groups)
        return Conv2d(integers, gain.float(), bias.float(), a.shape, *how, step)

    def extra_repr(self) -> str:
        """Describe the operations of the kernel in the printed model."""
        parts = [self.act.name] if self.act != NO_ACT else []
        parts += ["sum"] if self.residual is not None else []
        return ", ".join([self.name, *parts, "float out" if self.out is None else "codes out"])
