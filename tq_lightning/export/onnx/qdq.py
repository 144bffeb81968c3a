"""Integer layers of a graph between quantize and dequantize nodes (QDQ), in a runtime's form.

Runtimes recognize a layer between DequantizeLinear and QuantizeLinear and compute it in integers.
Activations are uint8, weights int8 with zero point 0, biases int32.

ONNX Runtime fuses an integer convolution (QLinearConv) only if its output is quantized too. If the
output goes elsewhere, such as to a residual add, a quantizer is added with a range from beta and
gamma of the batch norm, or the convolution becomes ConvInteger, which is exact but slow. OpenVINO
needs neither.
"""

import numpy as np
import onnx

from tq_lightning.export.onnx.activation_nodes import DequantizedTensor, add_codes, codes_of
from tq_lightning.export.onnx.edit import GraphEditor
from tq_lightning.export.onnx.integer_layers import GraphLayer, bias_codes
from tq_lightning.quant.activation_ranges import ActivationRange
from tq_lightning.quant.integer.saturation import SPLIT

RESIDUALS = ("int8", "float")


def put_layers(
    editor: GraphEditor,
    layers: list[GraphLayer],
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


def _placeholder(editor: GraphEditor, layer: GraphLayer) -> onnx.NodeProto:
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


def _put_conv(editor: GraphEditor, layer: GraphLayer, x: DequantizedTensor) -> None:
    layer, bias = bias_codes(layer, x.step)
    weight = _dequantized(editor, f"{layer.name}.weight", layer.codes, layer.gain, 0)
    step = np.float32(x.step) * layer.gain
    shift = _dequantized(editor, f"{layer.name}.bias", bias, step, 0)
    node = editor.add("Conv", [x.float_name, weight, shift], layer.y)
    editor.producer(node).attribute.extend(layer.node.attribute)  # type: ignore[union-attr]


def _put_integer_product(editor: GraphEditor, layer: GraphLayer, x: DequantizedTensor) -> None:
    """Add ConvInteger or MatMulInteger, then the scale and the bias in float."""
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


def add_sum(editor: GraphEditor, layer: GraphLayer, codes: str, zero: str) -> str:
    """Add ConvInteger or MatMulInteger of a layer, or the sum of two. Return the int32 tensor.

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


def _put_two_layers(editor: GraphEditor, layer: GraphLayer, x: DequantizedTensor) -> None:
    """Add two layers between DequantizeLinear nodes, summed in float, for an exact 8-bit weight."""
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


def _put_linear(editor: GraphEditor, layer: GraphLayer, x: DequantizedTensor) -> None:
    layer, _ = bias_codes(layer, x.step)
    weight = _dequantized(editor, f"{layer.name}.weight", layer.codes, layer.gain, 1)
    product = editor.add("MatMul", [x.float_name, weight], f"{layer.name}/product")
    shift = editor.set(f"{layer.name}.bias", layer.bias.astype(np.float32))
    editor.add("Add", [product, shift], layer.y)
