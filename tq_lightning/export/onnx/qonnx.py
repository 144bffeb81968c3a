"""QONNX graph for FPGA tools: the stored codes of a packed file, followed by Trunc to one width.

The QONNX operator Trunc (domain `qonnx.custom_op.general`, version 1), with scale 1 and zero point
0, computes floor(round(x) / 2^(input bits - output bits)), which is the right shift of a code.
QONNX keeps all tensors in float, so codes are integers stored as floats. Mul, Add and Mul then
compute weight = (a code + b) scale.
"""

from pathlib import Path

import numpy as np
from onnx import helper, numpy_helper
from torch import nn

from tq_lightning.errors import UserError
from tq_lightning.export.onnx.graph import float_graph, weights_of, write_graph
from tq_lightning.export.onnx.weight_nodes import (
    affine_nodes,
    levels_affine,
    put_nodes,
    table_nodes,
)
from tq_lightning.export.packed.reader import load_packed
from tq_lightning.export.packed.weight import packed_weights
from tq_lightning.quant.bit_width import bit_width

DOMAIN = "qonnx.custom_op.general"
TRUNC_VERSION = 1  # version 2 also takes an output scale and a sign


def export_qonnx(
    path: str | Path, out: str | Path, bits: int, model: nn.Module | str | None = None
) -> list[str]:
    """Write the graph of a packed file at one width, with weights at the stored width and Trunc.

    Args:
        path: packed file.
        out: target file, written atomically.
        bits: width, one of those that the file supports.
        model: see `load_packed`.

    Returns:
        Names of the packed weights that the network does not read, which the graph lacks.

    Raises:
        UserError: see `load_packed`; the width is not available; PyTorch can't export the network.
    """
    model = load_packed(path, model=model)
    weights = packed_weights(model)
    first = weights[0].packed
    if bits not in first.widths:
        raise UserError(
            f"{path} supports widths {', '.join(map(str, first.widths))}, got {bits}; "
            "pass one of them as --bits"
        )
    codes = {weight.name: weight.codes.numpy().astype(np.float32) for weight in weights}
    with bit_width(model, bits):
        graph = float_graph(model)
    weights, left_out = weights_of(graph, weights)
    constants = {"one": 1.0, "zero": 0.0, "stored_bits": first.stored, "bits": bits}
    graph.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value, np.float32), f"trunc/{key}")
        for key, value in constants.items()
    )
    nodes = []
    for name, _, _, packed in weights:
        graph.graph.initializer.append(numpy_helper.from_array(codes[name], f"{name}/codes"))
        nodes.append(
            helper.make_node(
                "Trunc",
                [f"{name}/codes", *(f"trunc/{key}" for key in constants)],
                [f"{name}/short"],
                name=f"{name}/trunc",
                domain=DOMAIN,
                rounding_mode="FLOOR",
            )
        )
        table = packed.table(bits)
        if table is not None:
            nodes += table_nodes(graph, name, f"{name}/short", table, packed.scale)
            continue
        a, b = levels_affine(bits, packed.level)
        nodes += affine_nodes(graph, name, f"{name}/short", a, b, packed.scale)
    put_nodes(graph, nodes)
    graph.opset_import.append(helper.make_opsetid(DOMAIN, TRUNC_VERSION))
    write_graph(graph, model, [bits], out)
    return left_out
