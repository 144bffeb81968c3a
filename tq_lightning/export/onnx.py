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
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tq_lightning.errors import UserError
from tq_lightning.export.container import write_atomically
from tq_lightning.export.load import load_packed
from tq_lightning.export.onnx_width import Now, TensorActivation, TensorNorm, TensorWeight, swap
from tq_lightning.export.packed import packed_weights
from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.codes import codes_to_levels
from tq_lightning.quant.norm import PerWidthNorm, per_width_norms
from tq_lightning.quant.width import width_of

OPSETS = (21, 25)  # the first whose DequantizeLinear takes 4-bit integers, and the first where it takes 2-bit ones
# (widest width, type, codes a byte, first opset)
TYPES = ((2, TensorProto.UINT2, 4, 25), (4, TensorProto.UINT4, 2, 21), (8, TensorProto.UINT8, 1, 21))


def levels_affine(bits: int, level: str) -> tuple[float, float]:
    """(a, b) with 2 level - 1 = a k + b for codes k of width `bits`: read off the levels of the first two codes."""
    zero, one = codes_to_levels(torch.arange(2, dtype=torch.uint8), bits, level).tolist()
    return 2.0 * (one - zero), 2.0 * zero - 1.0


def smallest_type(bits: int, opset: int | None = None) -> tuple[int, int, int]:
    """(type, codes a byte, opset) of codes of a width; `opset` None = the lowest that has the smallest type of all.

    Raises:
        UserError: an opset that no graph is written for.
    """
    if opset not in (None, *OPSETS):
        raise UserError(f"no graph of opset {opset!r} is written; pass {' or '.join(map(str, OPSETS))}")
    kind, per_byte, first = next(row[1:] for row in TYPES if bits <= row[0] and (opset is None or row[3] <= opset))
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
    weights = {name: (module, tensor, packed) for name, module, tensor, packed in packed_weights(model)}
    codes = {name: module.parametrizations[tensor].original for name, (module, tensor, _) in weights.items()}  # type: ignore[index,union-attr]
    graph = float_graph(model, opset)
    nodes: list[onnx.NodeProto] = []
    for name, (_, _, packed) in weights.items():
        a, b = levels_affine(bits, packed.level)
        array = codes[name].numpy()
        stored = helper.make_tensor(f"{name}/codes", kind, array.shape, dense(array, per_byte), raw=True)
        step = numpy_helper.from_array(np.asarray(a, np.float32), f"{name}/step")
        made = helper.make_node("DequantizeLinear", [stored.name, step.name], [f"{name}/levels"], name=f"{name}/dequantize")
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
        nodes.append(helper.make_node(op, [source, constant.name], [result], name=f"{name}/{label}_node"))
        source = result
    return nodes


def float_graph(model: nn.Module, opset: int = OPSETS[0]) -> onnx.ModelProto:
    """The network at its width as a graph whose weights are float initializers, each with its full tensor name.

    The packed weights of `model` are replaced by float parameters: it is spent.
    """
    names = []
    _fix_activations(model)
    for name, module, tensor, _ in packed_weights(model):
        value = getattr(module, tensor).detach().clone()
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
        delattr(module, tensor)
        module.register_parameter(tensor, nn.Parameter(value, requires_grad=False))
        names.append(name)
    size = example_size(model)
    graph = _trace(model, (torch.zeros(2, *size),), ["images"], ({0: torch.export.Dim("batch")},), opset)
    have = {i.name for i in graph.graph.initializer}
    missing = [name for name in names if name not in have]
    if missing:
        raise UserError(f"the exported graph has no weight {missing[0]}; ONNX export does not know this kind of layer")
    return graph


def _fix_activations(model: nn.Module) -> None:
    """Activation quantizers at the width in use, in the form whose shift is one BitShift node."""
    width = width_of(model)
    now = Now(width.max_bits, width.max_bits, [])
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
        raise UserError("the packed file does not say the size of its images; export it with preprocessing={'input_size': ...}")
    return tuple(size)


def _trace(model: nn.Module, args: tuple[Any, ...], inputs: list[str], shapes: Any, opset: int = OPSETS[0]) -> onnx.ModelProto:
    try:
        with warnings.catch_warnings():  # of the width's numbers, which are looked up inside the graph on purpose
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export", UserWarning)
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
        raise UserError(f"PyTorch cannot export this network to ONNX ({type(error).__name__}: {said})") from error
    assert program is not None
    buffer = io.BytesIO()
    program.save(buffer)  # type: ignore[arg-type]
    return onnx.load_model_from_string(buffer.getvalue())


def write_graph(graph: onnx.ModelProto, out: str | Path) -> None:
    del graph.graph.metadata_props[:]
    for node in graph.graph.node:  # stack traces and names of Python files
        del node.metadata_props[:]
    onnx.checker.check_model(graph)
    write_atomically(Path(out), [graph.SerializeToString()])


class _Dynamic(nn.Module):
    def __init__(self, model: nn.Module, now: Now) -> None:
        super().__init__()
        self.now, self.model = now, model

    def forward(self, images: Tensor, bits: Tensor) -> Tensor:
        self.now.set(bits)
        return self.model(images)


def export_dynamic(path: str | Path, out: str | Path) -> None:
    """Writes the graph of all widths of a packed file: inputs "images" (batch, c, h, w) and "bits" (int64, no dimension).

    Raises:
        UserError: as `export_static`.
    """
    graph = dynamic_model(load_packed(path))
    size = example_size(graph.model)
    shapes = {"images": {0: torch.export.Dim("batch")}, "bits": None}
    write_graph(_trace(graph, (torch.zeros(2, *size), torch.tensor(4)), ["images", "bits"], shapes), out)


def dynamic_model(model: nn.Module) -> _Dynamic:
    """A loaded packed model with the width as a tensor, which a graph can take as an input. `model` is spent."""
    weights = packed_weights(model)
    widths = list(weights[0][3].widths)
    now = Now(weights[0][3].stored, weights[0][3].width.max_bits, widths)
    for _, module, tensor, packed in weights:
        codes = module.parametrizations[tensor].original  # type: ignore[index,union-attr]
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
        delattr(module, tensor)
        module.register_buffer(tensor, codes)
        parametrize.register_parametrization(module, tensor, TensorWeight(now, packed.scale, packed.level), unsafe=True)
    for norm in per_width_norms(model):
        for layer in norm.sets.values():
            swap(layer, lambda m: TensorActivation(now, m) if isinstance(m, ActivationQuantizer) else None)
    swap(model, lambda m: TensorNorm(now, m, widths) if isinstance(m, PerWidthNorm) else None)
    swap(model, lambda m: TensorActivation(now, m) if isinstance(m, ActivationQuantizer) else None)
    return _Dynamic(model, now).eval()
