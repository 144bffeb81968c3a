"""Layers of an ExecuTorch program: integer weights between quantize and dequantize operations.

XNNPACK recognizes a layer between these operations and computes it in integers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tq_lightning.quant.integer.arithmetic import IntegerWeight, integer_weight


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
