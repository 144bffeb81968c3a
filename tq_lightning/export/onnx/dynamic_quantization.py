"""Integer linear layers without calibration: activation ranges are computed at run time.

Each layer is DynamicQuantizeLinear -> MatMulInteger -> scale, with one step for the whole input
tensor. DynamicQuantizeLinear uses codes up to 255. If their products with the weights could
exceed the 16 bits in which x86 processors without VNNI add them, the same computation is written as
separate nodes, with codes up to 127.
"""

import numpy as np

from tq_lightning.export.onnx.edit import GraphEditor
from tq_lightning.export.onnx.integer_layers import GraphLayer
from tq_lightning.export.onnx.qdq import add_sum


def put_dynamic_layers(editor: GraphEditor, layers: list[GraphLayer], top: int) -> None:
    """Add linear layers to the graph from which `take_layers` removed them.

    Args:
        editor: the graph.
        layers: linear layers.
        top: largest activation code, 255 or 127.
    """
    quantized: dict[str, tuple[str, str, str]] = {}
    for layer in layers:
        if layer.x not in quantized:
            quantized[layer.x] = _quantize(editor, layer.x, top)
        codes, step, zero = quantized[layer.x]
        name = layer.name
        gain = editor.set(f"{name}.weight/scale", layer.gain)
        bias = editor.set(f"{name}.bias", layer.bias.astype(np.float32))
        total = add_sum(editor, layer, codes, zero)
        total = editor.add("Cast", [total], f"{name}/float_sum", to=1)
        scale = editor.add("Mul", [step, gain], f"{name}/step")
        scaled = editor.add("Mul", [total, scale], f"{name}/scaled")
        editor.add("Add", [scaled, bias], layer.y)


def _quantize(editor: GraphEditor, x: str, top: int) -> tuple[str, str, str]:
    """Quantize a tensor by its minimum and maximum; return (codes, step, zero point)."""
    codes, step, zero = (f"{x}/{key}" for key in ("codes", "step", "zero"))
    if top == 255:
        editor.add("DynamicQuantizeLinear", [x], codes)
        editor.nodes[-1].output.extend([step, zero])
        return codes, step, zero
    none = editor.set("dynamic/zero", np.asarray(0.0, np.float32))
    low = editor.add("ReduceMin", [x], f"{x}/least", keepdims=0)
    high = editor.add("ReduceMax", [x], f"{x}/most", keepdims=0)
    low = editor.add("Min", [low, none], f"{x}/low")
    high = editor.add("Max", [high, none], f"{x}/high")
    span = editor.add("Sub", [high, low], f"{x}/span")
    by = editor.set(f"dynamic/{top}", np.asarray(1.0 / top, np.float32))
    wide = editor.add("Mul", [span, by], f"{x}/wide")
    least = editor.set("dynamic/least", np.asarray(np.finfo(np.float32).tiny, np.float32))
    editor.add("Max", [wide, least], step)
    below = editor.add("Div", [low, step], f"{x}/below")
    up = editor.add("Neg", [below], f"{x}/up")
    rounded = editor.add("Round", [up], f"{x}/rounded")
    editor.add("Cast", [rounded], zero, to=2)
    editor.add("QuantizeLinear", [x, step, zero], codes)
    return codes, step, zero
