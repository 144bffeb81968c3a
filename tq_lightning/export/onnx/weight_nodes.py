"""Nodes that compute a weight of a graph from its codes."""

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from tq_lightning.quant.codes import codes_to_levels, levels_to_weights


def levels_affine(bits: int, level: str) -> tuple[float, float]:
    """Return (a, b) with 2 level - 1 = a k + b for the codes k of a width."""
    zero, one = codes_to_levels(torch.arange(2, dtype=torch.uint8), bits, level).tolist()
    return 2.0 * (one - zero), 2.0 * zero - 1.0


def affine_nodes(
    graph: onnx.ModelProto, name: str, source: str, a: float | None, b: float, scale: Tensor
) -> list[onnx.NodeProto]:
    """Create the nodes of weight = (a source + b) scale, and add their constants to the graph.

    Args:
        graph: graph to add the constants to.
        name: full tensor name of the weight; the output has the same name.
        source: name of the input.
        a: factor, None for 1.
        b: offset.
        scale: float32, broadcastable to the weight.

    Returns:
        The nodes in order, not yet in the graph.
    """
    nodes = []
    steps = [("Mul", a, "level"), ("Add", b, "signed"), ("Mul", scale.float().numpy(), "weight")]
    for op, value, label in steps:
        if value is None:
            continue
        constant = numpy_helper.from_array(np.asarray(value, np.float32), f"{name}/{label}_by")
        graph.graph.initializer.append(constant)
        result = name if label == "weight" else f"{name}/{label}"
        nodes.append(
            helper.make_node(op, [source, constant.name], [result], name=f"{name}/{label}_node")
        )
        source = result
    return nodes


def table_nodes(
    graph: onnx.ModelProto, name: str, source: str, table: Tensor, scale: Tensor
) -> list[onnx.NodeProto]:
    """Create the nodes of weight = (2 table[codes] - 1) scale, a Gather of 2^n values.

    Args:
        graph: graph to add the constants to.
        name: full tensor name of the weight; the output has the same name.
        source: name of the codes, of any number type.
        table: the level of each code, float32 (2^n,).
        scale: float32, broadcastable to the weight.

    Returns:
        The nodes in order, not yet in the graph.
    """
    constants = {"table": levels_to_weights(table.clone(), torch.tensor(1.0)), "scale": scale}
    for key, value in constants.items():
        array = value.float().numpy()
        graph.graph.initializer.append(numpy_helper.from_array(array, f"{name}/{key}"))
    index, signed, number = f"{name}/index", f"{name}/signed", onnx.TensorProto.INT32
    return [
        helper.make_node("Cast", [source], [index], name=f"{index}_node", to=number),
        helper.make_node("Gather", [f"{name}/table", index], [signed], name=f"{signed}_node"),
        helper.make_node("Mul", [signed, f"{name}/scale"], [name], name=f"{name}/weight_node"),
    ]


def put_nodes(graph: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Insert nodes at the start of a graph and remove the initializers that they compute."""
    computed = {name for node in nodes for name in node.output}
    kept = [i for i in graph.graph.initializer if i.name not in computed]
    info = [v for v in graph.graph.value_info if v.name not in computed]
    body = [*nodes, *graph.graph.node]
    for field, values in (("initializer", kept), ("value_info", info), ("node", body)):
        del getattr(graph.graph, field)[:]
        getattr(graph.graph, field).extend(values)
