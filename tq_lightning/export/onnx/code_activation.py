"""Activations that were trained with codes, as quantize and dequantize nodes of a graph."""

from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.integer.activations import TrainedCodes
from tq_lightning.quant.layers import replace_modules


class CodeActivation(nn.Module):
    """`ActivationQuantizer` at one width as QuantizeLinear and DequantizeLinear.

    Its codes stay in [0, M_n], as in training. `floor` subtracts half a step before rounding.
    Truncated codes are made at the stored width and shifted.

    Args:
        layer: the quantizer to replace.
        width: the shared `Width` of the model.
        runtime: one of `activation_nodes.RUNTIMES`; decides where to clip, as in `add_codes` there.
    """

    def __init__(self, layer: ActivationQuantizer, width: Width, runtime: str) -> None:
        super().__init__()
        codes = TrainedCodes(layer).at(width)
        self.shift, self.top, self.runtime = codes.shift, codes.make_top, runtime
        self.less = -codes.make_offset * codes.make_step
        self.limit = codes.make_top * codes.make_step
        for name, value in (
            ("step", codes.make_step),
            ("out_step", codes.step),
            ("one", 1.0),
            ("divisor", 2.0**self.shift),
        ):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        for name, value in (("zero", 0), ("by", self.shift), ("top_code", self.top)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.uint8))

    def forward(self, input: Tensor) -> Tensor:  # named as in `nn.ReLU`, which it replaces
        """Quantize activations of any shape to codes, and dequantize them."""
        x = input - self.less if self.less else input
        if self.top < 255 and self.runtime == "openvino":
            x = x.clamp(0.0, self.limit)
        codes = _node("QuantizeLinear", x, torch.uint8, self.step, self.zero)
        if self.top < 255 and self.runtime != "openvino":
            codes = _node("Clip", codes, torch.uint8, self.zero, self.top_code)
        if self.shift and self.runtime == "openvino":
            # OpenVINO (2026.4) computes another network if a BitShift stands between quantized
            # layers. Rounding (k - (2^s - 1) / 2) / 2^s, which has no ties, gives k >> s as well.
            k = _node("DequantizeLinear", codes, torch.float32, self.one, self.zero)
            k = k - (2**self.shift - 1) / 2
            codes = _node("QuantizeLinear", k, torch.uint8, self.divisor, self.zero)
        elif self.shift:
            codes = _node("BitShift", codes, torch.uint8, self.by, direction="RIGHT")
        return _node("DequantizeLinear", codes, torch.float32, self.out_step, self.zero)


def _node(op: str, x: Tensor, dtype: torch.dtype, *constants: Any, **attributes: Any) -> Tensor:
    made = torch.onnx.ops.symbolic(
        op, (x, *constants), attributes, dtype=dtype, shape=x.shape, version=21
    )
    assert isinstance(made, Tensor)
    return made


def replace_activation_quantizers(model: nn.Module, width: Width, runtime: str) -> list[str]:
    """Replace every `ActivationQuantizer` by a `CodeActivation`. Return their names."""
    return replace_modules(
        model, ActivationQuantizer, lambda layer: CodeActivation(layer, width, runtime)
    )
