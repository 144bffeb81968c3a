"""TODO export/onnx/static.py."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tq_lightning.errors import UserError
from tq_lightning.export.onnx.graph import (
    OPSETS,
    affine_nodes,
    float_graph,
    levels_affine,
    put_nodes,
    write_graph,
)
from tq_lightning.export.packed.module import packed_weights
from tq_lightning.export.packed.reader import load_packed

# (widest width, type, codes a byte, first opset)
TYPES = (
    (2, TensorProto.UINT2, 4, 25),
    (4, TensorProto.UINT4, 2, 21),
    (8, TensorProto.UINT8, 1, 21),
)


def smallest_type(bits: int, opset: int | None = None) -> tuple[int, int, int]:
    """(type, codes a byte, opset) of codes of a width; `opset` None = the lowest that has the smallest type of all.

    Raises:
        UserError: an opset that no graph is written for.
    """
    if opset not in (None, *OPSETS):
        raise UserError(
            f"no graph of opset {opset!r} is written; pass {' or '.join(map(str, OPSETS))}"
        )
    kind, per_byte, first = next(
        row[1:] for row in TYPES if bits <= row[0] and (opset is None or row[3] <= opset)
    )
    return kind, per_byte, opset or first


def export_static(path: str | Path, out: str | Path, bits: int, opset: int | None = None) -> None:
    """Writes the graph of a packed file at one width: input "images" (batch, c, h, w), output "logits".

    Args:
        path: a packed file.
        out: file to write, whole or not at all.
        bits: width, 1 to the stored one.
        opset: 21 or 25; None = the lowest that has the smallest type for the width.

    Raises:
        UserError: as `load_packed`; another opset; a network that PyTorch cannot export; a file that cannot be written.
    """
    model = load_packed(path, bits=bits)
    kind, per_byte, opset = smallest_type(bits, opset)
    weights = packed_weights(model)
    codes = {weight.name: weight.codes for weight in weights}
    graph = float_graph(model, opset)
    nodes: list[onnx.NodeProto] = []
    for weight in weights:
        name, packed = weight.name, weight.packed
        a, b = levels_affine(bits, packed.level)
        array = codes[name].numpy()
        stored = helper.make_tensor(
            f"{name}/codes", kind, array.shape, dense(array, per_byte), raw=True
        )
        step = numpy_helper.from_array(np.asarray(a, np.float32), f"{name}/step")
        made = helper.make_node(
            "DequantizeLinear",
            [stored.name, step.name],
            [f"{name}/levels"],
            name=f"{name}/dequantize",
        )
        graph.graph.initializer.extend([stored, step])
        nodes += [made, *affine_nodes(graph, name, f"{name}/levels", None, b, packed.scale)]
    put_nodes(graph, nodes)
    write_graph(graph, out)


def dense(codes: np.ndarray, per_byte: int) -> bytes:
    """uint8 codes -> 1, 2 or 4 of them a byte, the first in the lowest bits, as ONNX lays out its narrow integers."""
    flat = np.pad(codes.reshape(-1), (0, -codes.size % per_byte)).reshape(-1, per_byte)
    out = np.zeros(len(flat), np.uint8)
    for i in range(per_byte):
        out |= flat[:, i] << np.uint8(8 // per_byte * i)
    return out.tobytes()
