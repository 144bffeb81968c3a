"""Static graph: a packed file at one width, with integer weights.

Every packed weight is an initializer of the smallest unsigned integer type that fits its codes and
that DequantizeLinear supports in ONNX Runtime: uint2 for 1 and 2 bits (opset 25), uint4 for
3 and 4, uint8 for 5 to 8 (opset 21). For runtimes without opset 25, opset 21 stores 1- and 2-bit
codes as uint4.

By default a weight is (Cast(codes) - zero) * scale. ONNX Runtime folds this into float weights at
load, like mode "resident" in PyTorch, and runs as fast as the float graph. OpenVINO keeps the
stored codes of linear layers. OpenVINO has no uint2: pass opset 21 for it.

The lean form is DequantizeLinear. ONNX Runtime does not fold it, so it computes the weights in
every run, like mode "lean" in PyTorch (the session option `session.disable_quant_qdq` = "1" makes
it fold). The Add of the level separates DequantizeLinear from MatMul: ONNX Runtime would fuse the
two into MatMulNBits, which by default quantizes the activations to 8 bits.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tq_lightning.errors import UserError
from tq_lightning.export.onnx.graph import OPSETS, float_graph, weights_of, write_graph
from tq_lightning.export.onnx.weight_nodes import (
    affine_nodes,
    levels_affine,
    put_nodes,
    table_nodes,
)
from tq_lightning.export.packed.reader import load_packed
from tq_lightning.export.packed.weight import packed_weights

# (largest width, type, codes per byte, first opset)
TYPES = (
    (2, TensorProto.UINT2, 4, 25),
    (4, TensorProto.UINT4, 2, 21),
    (8, TensorProto.UINT8, 1, 21),
)


def export_static(
    path: str | Path,
    out: str | Path,
    bits: int,
    opset: int | None = None,
    lean: bool = False,
    model: nn.Module | str | None = None,
) -> list[str]:
    """Write the graph of a packed file at one width.

    The input is "images" (batch, channels, height, width), or the inputs that the file names; the
    output is "logits".

    Args:
        path: packed file.
        out: target file, written atomically.
        bits: width, 1 to the stored one.
        opset: 21 or 25. None takes the lowest that has the smallest type for the width.
        lean: write DequantizeLinear nodes, which ONNX Runtime computes in every run.
        model: see `load_packed`.

    Returns:
        Names of the packed weights that the network does not read, which the graph lacks.

    Raises:
        UserError: see `load_packed`; an unsupported opset; PyTorch can't export the network, or
            the file can't be written.
    """
    model = load_packed(path, bits=bits, model=model)
    kind, per_byte, opset = smallest_type(bits, opset)
    weights = packed_weights(model)
    codes = {weight.name: weight.codes.numpy() for weight in weights}
    graph = float_graph(model, opset)
    weights, left_out = weights_of(graph, weights)
    nodes: list[onnx.NodeProto] = []
    for name, _, _, packed in weights:
        stored = helper.make_tensor(
            f"{name}/codes", kind, codes[name].shape, dense(codes[name], per_byte), raw=True
        )
        table = packed.table(bits)
        if table is not None:
            graph.graph.initializer.append(stored)
            nodes += table_nodes(graph, name, stored.name, table, packed.scale)
            continue
        a, b = levels_affine(bits, packed.level)
        if not lean:
            graph.graph.initializer.append(stored)
            nodes += _cast_nodes(graph, name, -b / a, a * packed.scale.double())
            continue
        step = numpy_helper.from_array(np.asarray(a, np.float32), f"{name}/step")
        graph.graph.initializer.extend([stored, step])
        nodes.append(
            helper.make_node(
                "DequantizeLinear",
                [stored.name, step.name],
                [f"{name}/levels"],
                name=f"{name}/dequantize",
            )
        )
        nodes += affine_nodes(graph, name, f"{name}/levels", None, b, packed.scale)
    put_nodes(graph, nodes)
    write_graph(graph, model, [bits], out)
    return left_out


def _cast_nodes(
    graph: onnx.ModelProto, name: str, zero: float, scale: Tensor
) -> list[onnx.NodeProto]:
    """Create the nodes of weight = (Cast(codes) - zero) scale, and add their constants."""
    constants = {"zero": np.asarray(zero, np.float32), "scale": scale.float().numpy()}
    for key, value in constants.items():
        graph.graph.initializer.append(numpy_helper.from_array(value, f"{name}/{key}"))
    cast, signed = f"{name}/cast", f"{name}/signed"
    return [
        helper.make_node("Cast", [f"{name}/codes"], [cast], f"{cast}_node", to=TensorProto.FLOAT),
        helper.make_node("Sub", [cast, f"{name}/zero"], [signed], f"{signed}_node"),
        helper.make_node("Mul", [signed, f"{name}/scale"], [name], f"{name}/weight_node"),
    ]


def smallest_type(bits: int, opset: int | None = None) -> tuple[int, int, int]:
    """Return the smallest integer type for the codes of a width.

    Args:
        bits: width, 1..8.
        opset: opset of the graph. None takes the lowest that has the smallest type of all.

    Returns:
        (ONNX type, codes per byte, opset).

    Raises:
        UserError: an unsupported opset.
    """
    if opset not in (None, *OPSETS):
        raise UserError(f"opset {opset!r} is not supported; pass {' or '.join(map(str, OPSETS))}")
    kind, per_byte, first = next(
        row[1:] for row in TYPES if bits <= row[0] and (opset is None or row[3] <= opset)
    )
    return kind, per_byte, opset or first


def dense(codes: np.ndarray, per_byte: int) -> bytes:
    """Pack uint8 codes, 1, 2 or 4 per byte, with the first in the lowest bits, as in ONNX."""
    flat = np.pad(codes.reshape(-1), (0, -codes.size % per_byte)).reshape(-1, per_byte)
    packed = np.zeros(len(flat), np.uint8)
    for i in range(per_byte):
        packed |= flat[:, i] << np.uint8(8 // per_byte * i)
    return packed.tobytes()
