"""Packed file -> QONNX: stored codes behind the Trunc operator, for FPGA tools.

Trunc of QONNX (domain `qonnx.custom_op.general`, version 1) on x with scale 1 and zero point 0 is
floor(round(x) / 2^(input bits - output bits)), which is the right shift of a code. Codes lie in the graph as floats that hold
whole numbers, as QONNX keeps all its tensors; weight = (a code + b) scale follows as Mul, Add, Mul.
"""

from pathlib import Path

import numpy as np
from onnx import helper, numpy_helper

from tq_lightning.errors import UserError
from tq_lightning.export.onnx.graph import (
    affine_nodes,
    float_graph,
    levels_affine,
    put_nodes,
    write_graph,
)
from tq_lightning.export.packed.module import packed_weights
from tq_lightning.export.packed.reader import load_packed
from tq_lightning.quant.bit_width import bit_width

DOMAIN = "qonnx.custom_op.general"
TRUNC_VERSION = 1  # version 2 takes an output scale and a sign besides


def export_qonnx(path: str | Path, out: str | Path, bits: int) -> None:
    """Writes the graph of a packed file at one width, its weights at the stored width behind Trunc.

    Raises:
        UserError: as `load_packed`; a width that is not stored; a network that PyTorch cannot export.
    """
    model = load_packed(path)
    weights = packed_weights(model)
    stored, widths = weights[0].packed.stored, weights[0].packed.widths
    if bits not in widths:
        raise UserError(
            f"{path} runs at widths {', '.join(map(str, widths))}, not {bits}; pass one as --bits"
        )
    codes = {weight.name: weight.codes.numpy() for weight in weights}
    with bit_width(model, bits):
        graph = float_graph(model)
    shared = {"one": 1.0, "zero": 0.0, "stored_bits": stored, "bits": bits}
    graph.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v, np.float32), f"trunc/{k}") for k, v in shared.items()
    )
    nodes = []
    for weight in weights:
        name, packed = weight.name, weight.packed
        graph.graph.initializer.append(
            numpy_helper.from_array(codes[name].astype(np.float32), f"{name}/codes")
        )
        inputs = [f"{name}/codes", *(f"trunc/{key}" for key in shared)]
        nodes.append(
            helper.make_node(
                "Trunc",
                inputs,
                [f"{name}/short"],
                name=f"{name}/trunc",
                domain=DOMAIN,
                rounding_mode="FLOOR",
            )
        )
        a, b = levels_affine(bits, packed.level)
        nodes += affine_nodes(graph, name, f"{name}/short", a, b, packed.scale)
    put_nodes(graph, nodes)
    graph.opset_import.append(helper.make_opsetid(DOMAIN, TRUNC_VERSION))
    write_graph(graph, out)
