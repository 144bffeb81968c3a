"""Quantize and dequantize nodes of the activations of a graph."""

from typing import NamedTuple

import numpy as np

from tq_lightning.export.onnx.edit import GraphEditor
from tq_lightning.quant.activation_ranges import ActivationRange

RUNTIMES = ("onnxruntime", "openvino")

# operators that move values without changing them, so that codes remain codes
_MOVES = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")


class DequantizedTensor(NamedTuple):
    """A dequantized activation tensor of a graph.

    Attributes:
        float_name: name of the tensor.
        step: step of its codes.
        zero: their zero point.
    """

    float_name: str
    step: float
    zero: int


def codes_of(editor: GraphEditor, name: str) -> DequantizedTensor | None:
    """Return the codes of a tensor that DequantizeLinear produces, through moves; else None."""
    at = name
    while (node := editor.producer(at)) is not None:
        if node.op_type == "DequantizeLinear":
            step, zero = (editor.constant(n) for n in node.input[1:3])
            assert step is not None and zero is not None
            return DequantizedTensor(name, float(step), int(zero))
        if node.op_type not in _MOVES:
            return None
        at = node.input[0]
    return None


def add_codes(
    editor: GraphEditor, name: str, chosen: ActivationRange, top: int, runtime: str
) -> DequantizedTensor:
    """Quantize a tensor to uint8 codes in [0, top]; all its consumers read the dequantized codes.

    Args:
        editor: the graph.
        name: the tensor.
        chosen: its range.
        top: largest code.
        runtime: where to clip to `top`. For ONNX Runtime, codes are clipped after the quantizer,
            because it fuses a convolution only with a quantizer that directly follows. For
            OpenVINO, which needs the dequantizer directly after the quantizer, values are clipped
            before it. After a pooling, values are clipped first for both: ONNX Runtime would move
            the quantizer before the pooling, and pools codes ten times slower than floats.
    """
    step, zero = chosen.step(top)
    step = float(np.float32(step))
    readers = {id(node) for node in editor.nodes if name in node.input}
    source = editor.producer(name)
    pooled = source is not None and source.op_type == "MaxPool"
    before = pooled or (top < 255 and runtime == "openvino")
    at = name
    if before:
        # a quarter of a step from the last code keeps every code, and stops the runtime from
        # dropping the clip as redundant with the range of uint8
        limits = [
            editor.set(f"{name}/{key}", np.asarray(value * step, np.float32))
            for key, value in (("low", -zero), ("high", top - zero - 0.25))
        ]
        at = editor.add("Clip", [at, *limits], f"{name}/clipped")
    scale = editor.set(f"{name}/step", np.asarray(step, np.float32))
    point = editor.set(f"{name}/zero", np.asarray(zero, np.uint8))
    at = editor.add("QuantizeLinear", [at, scale, point], f"{name}/codes")
    if top < 255 and not before:
        limits = [editor.set(f"codes/{value}", np.asarray(value, np.uint8)) for value in (0, top)]
        at = editor.add("Clip", [at, *limits], f"{name}/top_codes")
    editor.add("DequantizeLinear", [at, scale, point], f"{name}/dequantized")
    new = tuple(node for node in editor.nodes if id(node) not in readers)
    editor.redirect(name, f"{name}/dequantized", keep=new)
    return DequantizedTensor(f"{name}/dequantized", step, zero)
