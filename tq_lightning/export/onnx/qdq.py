"""Quantize and dequantize nodes (QDQ) around the integer layers of a graph.

Runtimes recognize a layer between DequantizeLinear and QuantizeLinear and compute it in integers.
Activations are uint8, weights int8 with zero point 0, biases int32.

ONNX Runtime fuses an integer convolution (QLinearConv) only if its output is quantized too. If the
output goes elsewhere, such as to a residual add, a quantizer is added with a range from beta and
gamma of the batch norm, or the convolution becomes ConvInteger, which is exact but slow. OpenVINO
needs neither.
"""

from typing import NamedTuple

import numpy as np
import onnx

from tq_lightning.export.onnx.edit import GraphEditor
from tq_lightning.export.onnx.integer_layers import IntegerLayer, bias_codes
from tq_lightning.quant.activation_ranges import ActivationRange
from tq_lightning.quant.integer.saturation import SPLIT

RUNTIMES = ("onnxruntime", "openvino")
RESIDUALS = ("int8", "float")

# operators that move values without changing them, so that codes remain codes
_MOVES = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")


class Codes(NamedTuple):
    """An activation tensor as codes.

    Attributes:
        float_name: name of the dequantized tensor.
        step: step of the codes.
        zero: zero point.
    """

    float_name: str
    step: float
    zero: int


def codes_of(editor: GraphEditor, name: str) -> Codes | None:
    """Return the codes of a tensor that DequantizeLinear produces, through moves; else None."""
    at = name
    while (node := editor.producer(at)) is not None:
        if node.op_type == "DequantizeLinear":
            step, zero = (editor.constant(n) for n in node.input[1:3])
            assert step is not None and zero is not None
            return Codes(name, float(step), int(zero))
        if node.op_type not in _MOVES:
            return None
        at = node.input[0]
    return None


def add_codes(
    editor: GraphEditor, name: str, chosen: ActivationRange, top: int, runtime: str
) -> Codes:
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
    return Codes(f"{name}/dequantized", step, zero)


def put_layers(
    editor: GraphEditor,
    layers: list[IntegerLayer],
    ranges: dict[str, ActivationRange],
    top: int,
    runtime: str,
    residual: str,
) -> None:
    """Add integer layers to the graph from which `take_layers` removed them.

    Args:
        editor: the graph.
        layers: layers whose inputs have a range or are codes already.
        ranges: input ranges of the layers.
        top: largest activation code, 255 or 127.
        runtime: one of `RUNTIMES`.
        residual: one of `RESIDUALS`: the output of convolutions that no quantizer follows.
    """
    pending = []
    for layer in layers:
        pending.append(_placeholder(editor, layer))
    inputs = {}
    for layer in layers:
        x = editor.producer(layer.y).input[0]  # type: ignore[union-attr]
        inputs[layer.name] = codes_of(editor, x) or add_codes(
            editor, x, ranges[layer.name], top, runtime
        )
    for layer, node in zip(layers, pending, strict=True):
        editor.remove(node)
        codes = inputs[layer.name]._replace(float_name=node.input[0])
        if layer.low is not None and runtime != "onnxruntime":
            _put_two_layers(editor, layer, codes)
        elif layer.low is not None:
            _put_integer_product(editor, layer, codes)
        elif layer.op == "MatMul" and runtime == "onnxruntime":
            # ONNX Runtime would fuse a Gemm with its ReLU in float before it looks for QDQ nodes
            _put_integer_product(editor, layer, codes)
        elif layer.op == "MatMul":
            _put_linear(editor, layer, codes)
        elif runtime == "onnxruntime" and not _is_quantized(editor, layer.y):
            if residual == "int8" and layer.spread is not None:
                _put_conv(editor, layer, codes)
                end = _activated(editor, layer.y)
                low = 0.0 if end != layer.y else layer.spread[0]
                add_codes(editor, end, ActivationRange(low, layer.spread[1]), 255, runtime)
            else:
                _put_integer_product(editor, layer, codes)
        else:
            _put_conv(editor, layer, codes)


def _placeholder(editor: GraphEditor, layer: IntegerLayer) -> onnx.NodeProto:
    editor.add("IntegerLayer", [layer.x], layer.y)
    return editor.nodes[-1]


def _activated(editor: GraphEditor, y: str) -> str:
    """Return the output of the ReLU that follows y, or y if there is none."""
    relu = editor.only_consumer(y, "Relu")
    return y if relu is None else relu.output[0]


def _is_quantized(editor: GraphEditor, y: str) -> bool:
    """Return True if all consumers of y, or of the ReLU that follows it, are quantizers."""
    end = _activated(editor, y)
    readers = editor.consumers(end)
    return end not in editor.outputs and all(n.op_type == "QuantizeLinear" for n in readers)


def _dequantized(
    editor: GraphEditor, name: str, codes: np.ndarray, scale: np.ndarray, axis: int
) -> str:
    """Add DequantizeLinear of constant codes with a scale for each output channel."""
    inputs = [editor.set(f"{name}/codes", codes), editor.set(f"{name}/scale", scale)]
    return editor.add("DequantizeLinear", inputs, f"{name}/dequantized", axis=axis)


def _put_conv(editor: GraphEditor, layer: IntegerLayer, x: Codes) -> None:
    layer, bias = bias_codes(layer, x.step)
    weight = _dequantized(editor, f"{layer.name}.weight", layer.codes, layer.gain, 0)
    step = np.float32(x.step) * layer.gain
    shift = _dequantized(editor, f"{layer.name}.bias", bias, step, 0)
    node = editor.add("Conv", [x.float_name, weight, shift], layer.y)
    editor.producer(node).attribute.extend(layer.node.attribute)  # type: ignore[union-attr]


def _put_integer_product(editor: GraphEditor, layer: IntegerLayer, x: Codes) -> None:
    """ConvInteger or MatMulInteger, then the scale and the bias in float."""
    if layer.low is None:
        layer, _ = bias_codes(layer, x.step)
    name = layer.name
    scale = editor.set(f"{name}.in/step", np.asarray(x.step, np.float32))
    point = editor.set(f"{name}.in/zero", np.asarray(x.zero, np.uint8))
    codes = editor.add("QuantizeLinear", [x.float_name, scale, point], f"{name}.in/codes")
    total = add_sum(editor, layer, codes, point)
    shape: tuple[int, ...] = (-1,)
    if layer.op == "Conv":
        shape = (-1, *[1] * (layer.codes.ndim - 2))
    by = editor.set(f"{name}/step", (np.float32(x.step) * layer.gain).reshape(shape))
    shift = editor.set(f"{name}.bias", layer.bias.astype(np.float32).reshape(shape))
    total = editor.add("Cast", [total], f"{name}/float_sum", to=1)
    scaled = editor.add("Mul", [total, by], f"{name}/scaled")
    editor.add("Add", [scaled, shift], layer.y)


def add_sum(editor: GraphEditor, layer: IntegerLayer, codes: str, zero: str) -> str:
    """ConvInteger or MatMulInteger of a layer, or the sum of two; returns the int32 tensor.

    Args:
        editor: the graph.
        layer: the layer.
        codes: its input codes.
        zero: their zero point.
    """
    sums: list[str] = []
    for key, weight in (("sum", layer.codes), ("low_sum", layer.low)):
        if weight is None:
            return sums[0]
        name = f"{layer.name}.weight/{'codes' if key == 'sum' else 'low_codes'}"
        inputs = [codes, editor.set(name, weight), zero]
        sums.append(editor.add(f"{layer.op}Integer", inputs, f"{layer.name}/{key}"))
        if layer.op == "Conv":
            editor.producer(sums[-1]).attribute.extend(layer.node.attribute)  # type: ignore[union-attr]
    four = editor.set("split", np.asarray(SPLIT, np.int32))
    high = editor.add("Mul", [sums[0], four], f"{layer.name}/high_sum")
    return editor.add("Add", [high, sums[1]], f"{layer.name}/whole_sum")


def _put_two_layers(editor: GraphEditor, layer: IntegerLayer, x: Codes) -> None:
    """Two layers between DequantizeLinear nodes, added in float: an exact 8-bit weight."""
    assert layer.low is not None
    name, axis = layer.name, 1
    shape: tuple[int, ...] = (-1,)
    if layer.op == "Conv":
        axis, shape = 0, (-1, *[1] * (layer.codes.ndim - 2))
    made = []
    for key, codes, gain in (
        ("weight", layer.codes, SPLIT * layer.gain),
        ("low_weight", layer.low, layer.gain),
    ):
        weight = _dequantized(editor, f"{name}.{key}", codes, gain, axis)
        made.append(editor.add(layer.op, [x.float_name, weight], f"{name}/{key}_product"))
        if layer.op == "Conv":
            editor.producer(made[-1]).attribute.extend(layer.node.attribute)  # type: ignore[union-attr]
    product = editor.add("Add", made, f"{name}/product")
    shift = editor.set(f"{name}.bias", layer.bias.astype(np.float32).reshape(shape))
    editor.add("Add", [product, shift], layer.y)


def _put_linear(editor: GraphEditor, layer: IntegerLayer, x: Codes) -> None:
    layer, _ = bias_codes(layer, x.step)
    weight = _dequantized(editor, f"{layer.name}.weight", layer.codes, layer.gain, 1)
    product = editor.add("MatMul", [x.float_name, weight], f"{layer.name}/product")
    shift = editor.set(f"{layer.name}.bias", layer.bias.astype(np.float32))
    editor.add("Add", [product, shift], layer.y)
