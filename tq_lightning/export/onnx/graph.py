"""Packed file -> ONNX: a static graph of one width, or one dynamic graph that takes the width as an input.

Static: every packed weight is an initializer of the smallest unsigned integer type that holds its codes and that ONNX
Runtime takes behind DequantizeLinear: uint2 for 1 and 2 bits (opset 25), uint4 for 3 and 4, uint8 for 5 to 8 (opset 21;
ONNX has no type in between). A runtime that knows no opset 25 is served by opset 21, where 1 and 2 bits lie in uint4.
Dynamic: every packed weight is its uint8 codes behind BitShift, levels are computed in the graph, norm sets of all widths
lie in tables that Gather picks from. A width that the file does not hold is an index out of range, hence an error of the
runtime: no shift of 8 or more, and no wrong model, can happen.

Logits equal those of PyTorch up to the order of float32 sums, about 1e-4 of their size; top-1 is the same but for ties.

ONNX Runtime keeps DequantizeLinear of a constant in the graph, so a static graph holds integers and makes its weights at
every run, as "lean" does in PyTorch. With the session option `session.disable_quant_qdq` = "1" it folds them once, at load,
into the float weights of that width, as "resident" does: then a run costs what the float graph costs. The dynamic graph
makes its weights at every run. DequantizeLinear is kept apart from MatMul by the Add of the level, since ONNX Runtime fuses
the two into MatMulNBits, which quantizes the activations to 8 bits unless told otherwise.
"""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tq_lightning.errors import UserError
from tq_lightning.export.onnx.width_modules import TensorActivation, WidthTables, swap
from tq_lightning.export.packed.module import packed_weights
from tq_lightning.files import atomic_write
from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.codes import codes_to_levels

OPSETS = (
    21,
    25,
)  # the first whose DequantizeLinear takes 4-bit integers, and the first where it takes 2-bit ones


def levels_affine(bits: int, level: str) -> tuple[float, float]:
    """(a, b) with 2 level - 1 = a k + b for codes k of width `bits`: read off the levels of the first two codes."""
    zero, one = codes_to_levels(torch.arange(2, dtype=torch.uint8), bits, level).tolist()
    return 2.0 * (one - zero), 2.0 * zero - 1.0


def affine_nodes(
    graph: onnx.ModelProto, name: str, source: str, a: float | None, b: float, scale: Tensor
) -> list[onnx.NodeProto]:
    """Nodes of weight = (a source + b) scale, whose output has the weight's name; their constants go into the graph."""
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


def float_graph(model: nn.Module, opset: int = OPSETS[0]) -> onnx.ModelProto:
    """The network at its width as a graph whose weights are float initializers, each with its full tensor name.

    The packed weights of `model` are replaced by float parameters: it is spent.
    """
    names = []
    _fix_activations(model)
    for weight in packed_weights(model):
        module, tensor = weight.module, weight.tensor
        value = getattr(module, tensor).detach().clone()
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
        delattr(module, tensor)
        module.register_parameter(tensor, nn.Parameter(value, requires_grad=False))
        names.append(weight.name)
    size = example_size(model)
    graph = _trace(
        model, (torch.zeros(2, *size),), ["images"], ({0: torch.export.Dim("batch")},), opset
    )
    have = {i.name for i in graph.graph.initializer}
    missing = [name for name in names if name not in have]
    if missing:
        raise UserError(
            f"the exported graph has no weight {missing[0]}; ONNX export does not know this kind of layer"
        )
    return graph


def _fix_activations(model: nn.Module) -> None:
    """Activation quantizers at the width in use, in the form whose shift is one BitShift node."""
    width = width_of(model)
    now = WidthTables(width.max_bits, width.max_bits, [])
    now.set(torch.tensor(width.bits))
    swap(model, lambda m: TensorActivation(now, m) if isinstance(m, ActivationQuantizer) else None)


def put_nodes(graph: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Puts `nodes` first in the graph; initializers that they now produce go, uses of them stay as they are."""
    produced = {name for node in nodes for name in node.output}
    kept = [i for i in graph.graph.initializer if i.name not in produced]
    info = [v for v in graph.graph.value_info if v.name not in produced]
    body = [*nodes, *graph.graph.node]
    for field, values in (("initializer", kept), ("value_info", info), ("node", body)):
        del getattr(graph.graph, field)[:]
        getattr(graph.graph, field).extend(values)


def example_size(model: nn.Module) -> tuple[int, ...]:
    how = model.tq_file["preprocessing"] or {}  # type: ignore[index]
    size = how.get("input_size") if isinstance(how, Mapping) else None
    if not isinstance(size, list) or len(size) != 3:
        raise UserError(
            "the packed file does not say the size of its images; export it with preprocessing={'input_size': ...}"
        )
    return tuple(size)


def _trace(
    model: nn.Module, args: tuple[Any, ...], inputs: list[str], shapes: Any, opset: int = OPSETS[0]
) -> onnx.ModelProto:
    try:
        with (
            warnings.catch_warnings()
        ):  # of the width's numbers, which are looked up inside the graph on purpose
            warnings.filterwarnings(
                "ignore", "The tensor attributes? .* assigned during export", UserWarning
            )
            program = torch.onnx.export(
                model.eval(),
                args,
                input_names=inputs,
                output_names=["logits"],
                opset_version=opset,
                dynamic_shapes=shapes,
                dynamo=True,
                optimize=False,  # would fold norms into weights and codes into floats
                verbose=False,
            )
    except Exception as error:  # whatever torch.export and the translation to ONNX raise
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"PyTorch cannot export this network to ONNX ({type(error).__name__}: {said})"
        ) from error
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)  # type: ignore[arg-type]
    return onnx.load_model_from_string(buffer.getvalue())


def write_graph(graph: onnx.ModelProto, out: str | Path) -> None:
    del graph.graph.metadata_props[:]
    for node in graph.graph.node:  # stack traces and names of Python files
        del node.metadata_props[:]
    onnx.checker.check_model(graph)
    with atomic_write(out) as temporary:
        temporary.write_bytes(graph.SerializeToString())
