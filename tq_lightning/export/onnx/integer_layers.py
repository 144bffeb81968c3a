"""Integer layers of a graph: the nodes that multiply by packed weights, with folded norms.

A quantized convolution or linear layer, together with the batch norm that follows it, computes

    y = sum_i x_i gain_o codes_oi + bias_o

with int8 codes of zero point 0 and one positive gain for each output channel o. Exact 8-bit weights
consist of two tensors of codes, see `split_weight`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from tq_lightning.export.onnx.edit import GraphEditor
from tq_lightning.export.packed.weight import PackedTensor
from tq_lightning.quant.integer.arithmetic import (
    MOST_BIAS_STEPS,
    IntegerWeight,
    bias_factors,
    integer_weight,
)
from tq_lightning.quant.integer.norms import norm_spread
from tq_lightning.quant.integer.saturation import INT16_MAX, SplitWeight, split_weight


class GraphLayer(NamedTuple):
    """An integer layer of a graph.

    Attributes:
        name: name of the layer in the model.
        op: "Conv" or "MatMul".
        node: node of the float graph; provides the attributes of a "Conv".
        x: name of the input tensor.
        y: name of the output tensor, after the folded norm.
        codes: int8; (out, in / groups, kh, kw) for "Conv", (in, out) for "MatMul".
        gain: float32 (out,), positive.
        bias: float64 (out,).
        spread: (low, high), range of y estimated from beta and gamma of its norm; None without a
            norm.
        low: int8 codes of a second product, or None; the weight is then gain * (SPLIT * codes +
            low).
        exact: True if gain and codes give the dequantized weight exactly.
    """

    name: str
    op: str
    node: onnx.NodeProto
    x: str
    y: str
    codes: np.ndarray
    gain: np.ndarray
    bias: np.ndarray
    spread: tuple[float, float] | None
    low: np.ndarray | None
    exact: bool


def take_layers(
    editor: GraphEditor,
    weights: Sequence[PackedTensor],
    codes_by_name: Mapping[str, Tensor],
    bits: int,
    refuse: Callable[[str, str], str | None],
    split: bool = False,
) -> tuple[list[GraphLayer], dict[str, str]]:
    """Remove the layers of packed weights from a float graph and return them as integer layers.

    Args:
        editor: graph with every weight as a float initializer under its full name. The nodes of
            the returned layers are removed, so their outputs have no producer.
        weights: packed weights of the model.
        codes_by_name: codes at the width of the graph, by tensor name.
        bits: width of the graph.
        refuse: (name of a layer, name of its input) -> reason to keep it in float, or None.
        split: write each weight as two tensors of codes, see `split_weight`.

    Returns:
        (layers in order of the model, {name of a layer that stays in float: reason}).
    """
    layers, in_float = [], {}
    for weight in weights:
        name = weight.name[: -len(weight.tensor) - 1] or "(root)"
        found = _find(editor, weight.name)
        if isinstance(found, str):
            in_float[name] = found
            continue
        node, x, y, used, bias = found
        if (reason := refuse(name, x)) is not None:
            in_float[name] = reason
            continue
        stored = codes_by_name[weight.name]
        outputs = stored.shape[0]
        factor, spread = np.ones(outputs), None
        # the product of a MatMul may have tokens as channels of the norm: (batch, tokens, out)
        by_channel = node.op_type in ("Conv", "Gemm")
        norm = editor.only_consumer(y, "BatchNormalization") if by_channel else None
        if norm is not None:
            gamma, beta, mean, var = (
                editor.constant(n).astype(np.float64)  # type: ignore[union-attr]
                for n in norm.input[1:5]
            )
            factor = gamma / np.sqrt(var + _attribute(norm, "epsilon", 1e-5))
            bias = beta + (bias - mean) * factor
            spread = norm_spread(torch.from_numpy(beta), torch.from_numpy(gamma))
            y, used = norm.output[0], [*used, norm]
        packed = weight.packed
        scale = packed.scale.double() * torch.from_numpy(factor).reshape(
            -1, *[1] * (stored.dim() - 1)
        )
        op = "Conv" if node.op_type == "Conv" else "MatMul"
        integers: SplitWeight | IntegerWeight
        if split:
            integers = split_weight(stored, bits, scale, packed.level)
            exact = True
            parts: tuple[Tensor, ...] = integers.parts
        else:
            integers = integer_weight(stored, bits, scale, packed.level)
            parts, exact = (integers.codes,), integers.exact
        gain = integers.gain.expand(outputs, *[1] * (stored.dim() - 1)).reshape(-1).numpy()
        for old in used:
            editor.remove(old)
        codes = [part.numpy() for part in parts]
        if op == "MatMul":
            codes = [np.ascontiguousarray(part.T) for part in codes]
        layers.append(
            GraphLayer(
                name,
                op,
                node,
                x,
                y,
                codes[0],
                gain.astype(np.float32),
                np.broadcast_to(bias, outputs).astype(np.float64),
                spread,
                codes[1] if split else None,
                exact,
            )
        )
    return layers, in_float


def bias_codes(layer: GraphLayer, step: float) -> tuple[GraphLayer, np.ndarray]:
    """Quantize the bias of a layer to int32, in steps of (activation step) x (gain).

    The integers of a convolution are multiplied by `bias_factors`, which make these steps finer. If
    the bias of a channel does not fit, or its codes are all 0 (a norm with gamma = 0), the channel
    outputs only its bias: its codes become 0, and its gain resolves the bias to 2^-20.

    Args:
        layer: the layer.
        step: step of its input.

    Returns:
        (layer with the gains and codes to use, bias int32 (out,)).
    """
    out_axis = 0 if layer.op == "Conv" else 1
    others = tuple(i for i in range(layer.codes.ndim) if i != out_axis)
    steps = layer.bias / (np.float64(layer.gain) * step)
    if layer.op == "Conv":
        weight = torch.from_numpy(layer.codes)
        factors = bias_factors(weight, torch.from_numpy(steps), INT16_MAX // (2 * 255))
        weight = weight * factors.to(torch.int8).view(-1, *[1] * (weight.dim() - 1))
        gain = (layer.gain / factors.numpy()).astype(np.float32)
        layer = layer._replace(codes=weight.numpy(), gain=gain)
        steps = layer.bias / (np.float64(gain) * step)
    only_bias = (np.abs(steps) > MOST_BIAS_STEPS) | ~layer.codes.any(axis=others)
    if only_bias.any():
        codes, gain = layer.codes.copy(), layer.gain.copy()
        np.moveaxis(codes, out_axis, 0)[only_bias] = 0
        size = np.abs(layer.bias[only_bias]) / step
        gain[only_bias] = np.where(size > 0, np.maximum(size * 2.0**-20, _TINY), 1.0)
        layer = layer._replace(codes=codes, gain=gain)
        steps = layer.bias / (np.float64(gain) * step)
    return layer, np.round(steps).astype(np.int32)


_TINY = 1e-30


def _find(
    editor: GraphEditor, weight: str
) -> tuple[onnx.NodeProto, str, str, list[onnx.NodeProto], np.ndarray] | str:
    """Find the layer of a weight.

    Returns:
        (node, its input, its output, nodes to remove, bias), or the reason why the weight does not
        belong to a supported layer.
    """
    readers = editor.consumers(weight)
    if not readers:
        return "the network does not call it"
    if len(readers) != 1:
        calls = {reader.op_type for reader in readers} <= {"Conv", "Gemm", "Transpose"}
        if len(readers) > 1 and calls:
            return f"the network calls it {len(readers)} times, with inputs of different ranges"
        uses = ", ".join(reader.op_type for reader in readers)
        return f"its weight is read by {len(readers)} nodes{uses and f' ({uses})'}"
    node = readers[0]
    if node.op_type == "Conv" and node.input[1] == weight:
        bias = np.zeros(1)
        if len(node.input) > 2 and node.input[2]:
            value = editor.constant(node.input[2])
            if value is None:
                return "its bias is computed"
            bias = value.astype(np.float64)
        return node, node.input[0], node.output[0], [node], bias
    if node.op_type == "Gemm" and node.input[1] == weight and _attribute(node, "transB", 0) == 1:
        value = editor.constant(node.input[2]) if len(node.input) > 2 else np.zeros(1)
        plain = all(_attribute(node, key, 1.0) == 1.0 for key in ("alpha", "beta"))
        if value is not None and plain and not _attribute(node, "transA", 0):
            return node, node.input[0], node.output[0], [node], value.astype(np.float64)
    if node.op_type == "Transpose":
        product = editor.only_consumer(node.output[0], "MatMul")
        if product is not None and product.input[1] == node.output[0]:
            y, used, bias = product.output[0], [node, product], np.zeros(1)
            added = editor.only_consumer(y, "Add")
            if added is not None:
                other = added.input[1] if added.input[0] == y else added.input[0]
                value = editor.constant(other)
                outputs = len(editor.constant(weight))  # type: ignore[arg-type]
                # a longer constant is not a bias: it broadcasts the only output
                if value is not None and value.ndim <= 1 and value.size in (1, outputs):
                    bias, y, used = value.astype(np.float64), added.output[0], [*used, added]
            return product, product.input[0], y, used, bias
    return f"its weight is an input of {node.op_type}"


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default
