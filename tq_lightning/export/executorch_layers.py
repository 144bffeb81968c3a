"""Layers of an ExecuTorch program: integer weights between quantize and dequantize operations.

XNNPACK recognizes a layer between these operations and computes it in integers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tq_lightning.quant.integer.activations import CodeParams
from tq_lightning.quant.integer.arithmetic import (
    MOST_BIAS_STEPS,
    IntegerWeight,
    bias_factors,
    integer_weight,
)
from tq_lightning.quant.integer.kernels import Act


class DynamicLayer(nn.Module):
    """Convolution or linear layer with int8 weights that quantizes its input at run time.

    Args:
        layer: layer to replace, not grouped; provides bias, stride, padding and dilation.
        weight: integer weight of the layer.
    """

    bias: Tensor | None
    offset: Tensor

    def __init__(self, layer: nn.Module, weight: IntegerWeight) -> None:
        super().__init__()
        codes, gain = weight.codes, by_channel(weight.gain, weight.codes)
        bias: Any = layer.bias
        offset = gain * by_channel(weight.offset, codes)
        self.sum_channel = bool(offset.any())
        if self.sum_channel:
            codes = torch.cat([codes, torch.ones_like(codes[:1])])
            gain = F.pad(gain, (0, 1), value=1.0)
            bias = None if bias is None else F.pad(bias.detach(), (0, 1))
        self.register_buffer("codes", codes)
        self.register_buffer("gain", gain.float())
        self.register_buffer("zero", torch.zeros(len(codes), dtype=torch.int64))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("offset", offset.float())
        small = takes_int4(codes) and int(codes.min()) >= -8 and int(codes.max()) <= 7
        self.bounds = (-8, 7) if small else (-128, 127)
        self.options: Any = (
            (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the input, and compute the layer on integers."""
        ops = torch.ops.quantized_decomposed
        low, high = self.bounds
        weight = ops.dequantize_per_channel(
            self.codes, self.gain, self.zero, 0, low, high, torch.int8
        )
        if self.options is not None:
            step, zero = ops.choose_qparams.tensor(x, -128, 127, 1e-12, torch.int8)
            q = ops.quantize_per_tensor.tensor(x, step, zero, -128, 127, torch.int8)
            x = ops.dequantize_per_tensor.tensor(q, step, zero, -128, 127, torch.int8)
            y = F.conv2d(x, weight, self.bias, *self.options)
            offset = self.offset.view(-1, 1, 1)
            return y[:, :-1] + offset * y[:, -1:] if self.sum_channel else y
        step, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
        q = ops.quantize_per_token(x, step, zero, -128, 127, torch.int8)
        x = ops.dequantize_per_token(q, step, zero, -128, 127, torch.int8, torch.float32)
        y = F.linear(x, weight, self.bias)
        return y[..., :-1] + self.offset * y[..., -1:] if self.sum_channel else y


def takes_int4(codes: Tensor) -> bool:
    """Return True if XNNPACK can pack a weight as int4: linear, in pairs along the input."""
    return codes.dim() == 2 and codes.shape[1] % 2 == 0


def by_channel(values: Tensor, codes: Tensor) -> Tensor:
    """Reduce a tensor that broadcasts to `codes` to one value per output channel, (out,)."""
    return values.expand(codes.shape).flatten(1)[:, 0]


def linear_or_conv_weight(codes: Tensor, bits: int, scale: Tensor, level: str) -> IntegerWeight:
    """Return the exact integer weight of a `DynamicLayer`, in the range of int4 if possible."""
    largest = 7 if bits <= 4 and takes_int4(codes) else 127
    return integer_weight(codes, bits, scale, level, exact=True, largest=largest)


class FixedCodes(nn.Module):
    """Quantize to int8 codes of a fixed range, and dequantize.

    Args:
        codes: uint8 codes of the range; the int8 codes are smaller by 128.
    """

    def __init__(self, codes: CodeParams) -> None:
        super().__init__()
        self.how = (codes.step, codes.zero - 128, -128, 127, torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        """Return the dequantized codes of `x`, same shape."""
        ops = torch.ops.quantized_decomposed
        return ops.dequantize_per_tensor.default(
            ops.quantize_per_tensor.default(x, *self.how), *self.how
        )


class StaticConv(nn.Module):
    """Convolution with int8 weights and fixed ranges of input and output.

    Args:
        conv: layer to replace.
        weight: integer weight of the layer, with the norm folded.
        bias: float64 (out,).
        step: step of the input codes.
    """

    def __init__(self, conv: nn.Conv2d, weight: IntegerWeight, bias: Tensor, step: float) -> None:
        super().__init__()
        gain = by_channel(weight.gain, weight.codes)
        factors = bias_factors(weight.codes, bias / (step * gain))
        codes = weight.codes * factors.to(torch.int8).view(-1, 1, 1, 1)
        gain = gain / factors
        # if the bias exceeds 32 bits, the products are negligible and are set to 0
        alone = bias.abs() > MOST_BIAS_STEPS * step * gain
        codes[alone] = 0
        gain[alone] = bias[alone].abs() / step * 2.0**-20
        self.register_buffer("codes", codes)
        self.register_buffer("gain", gain.float())
        self.register_buffer("zero", torch.zeros(len(codes), dtype=torch.int64))
        self.register_buffer("bias", bias.float())
        self.options: Any = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve dequantized codes, (batch, in, height, width)."""
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.gain, self.zero, 0, -128, 127, torch.int8
        )
        return F.conv2d(x, weight, self.bias, *self.options)  # type: ignore[arg-type]


class QuantizedChain(nn.Module):
    """A layer with the operations that follow: quantizer, shortcut, activation, quantizer.

    Args:
        layer: the layer.
        between: codes of the output of the layer; None for no quantizer.
        act: activation.
        out: codes of the result; None for no quantizer.
    """

    def __init__(
        self, layer: nn.Module, between: CodeParams | None, act: Act, out: CodeParams | None
    ) -> None:
        super().__init__()
        self.layer, self.act = layer, act
        self.between = nn.Identity() if between is None else FixedCodes(between)
        self.out = nn.Identity() if out is None else FixedCodes(out)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Run the layer and the operations on dequantized codes."""
        y = self.between(self.layer(x))
        if shortcut is not None:
            y = y + shortcut
        if self.act.name == "hardtanh":
            low, high = self.act.args
            y = F.hardtanh(y, low, high)
        else:
            y = self.act.exact(y)
        return self.out(y)
