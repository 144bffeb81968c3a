"""Packed file -> ONNX: a static graph of one width, or one dynamic graph that takes the width as an input.

Static: every packed weight is an initializer of the smallest unsigned integer type that ONNX Runtime takes at its opset
(4 bits to width 4, 8 bits above) behind DequantizeLinear. Dynamic: every packed weight is its uint8 codes behind BitShift,
levels are computed in the graph, norm sets of all widths lie in tables that Gather picks from. A width that the file does
not hold is an index out of range, hence an error of the runtime: no shift of 8 or more, and no wrong model, can happen.

Logits equal those of PyTorch up to the order of float32 sums, about 1e-4 of their size; top-1 is the same but for ties.
"""

import io
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
from tq_lightning.export.packed import packed_weights
from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.norm import PerWidthNorm, per_width_norms
from tq_lightning.quant.width import width_of

OPSET = 21  # the first with 4-bit integers and int16 in DequantizeLinear
BEYOND = 1 << 20  # an index no table has


def levels_affine(bits: int, level: str) -> tuple[float, float]:
    """(a, b) with 2 level - 1 = a k + b for codes k of width `bits`."""
    step = 2.0 / (2**bits - 1) if level == "endpoint" else 2.0 ** (1 - bits)
    return step, -1.0 + (step / 2 if level == "centre" else 0.0)


def export_static(path: str | Path, out: str | Path, bits: int) -> None:
    """Writes the graph of a packed file at one width: input "images" (batch, c, h, w), output "logits".

    Raises:
        UserError: as `load_packed`; a network that PyTorch cannot export; a file that cannot be written.
    """
    model = load_packed(path, bits=bits)
    weights = {name: (module, tensor, packed) for name, module, tensor, packed in packed_weights(model)}
    codes = {name: module.parametrizations[tensor].original for name, (module, tensor, _) in weights.items()}  # type: ignore[index,union-attr]
    graph = float_graph(model)
    kind = TensorProto.UINT4 if bits <= 4 else TensorProto.UINT8
    nodes: list[onnx.NodeProto] = []
    for name, (_, _, packed) in weights.items():
        a, b = levels_affine(bits, packed.level)
        array = codes[name].numpy()
        raw = _nibbles(array) if kind == TensorProto.UINT4 else array.tobytes()
        stored = helper.make_tensor(f"{name}/codes", kind, array.shape, raw, raw=True)
        step = numpy_helper.from_array(np.asarray(a, np.float32), f"{name}/step")
        made = helper.make_node("DequantizeLinear", [stored.name, step.name], [f"{name}/levels"], name=f"{name}/dequantize")
        graph.graph.initializer.extend([stored, step])
        nodes += [made, *affine_nodes(graph, name, f"{name}/levels", None, b, packed.scale)]
    put_nodes(graph, nodes)
    write_graph(graph, out)


def _nibbles(codes: np.ndarray) -> bytes:
    """Codes below 16 -> two a byte, the first in the low half, as ONNX lays out 4-bit tensors."""
    flat = np.pad(codes.reshape(-1), (0, codes.size % 2))
    return (flat[0::2] | flat[1::2] << 4).astype(np.uint8).tobytes()


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


def float_graph(model: nn.Module) -> onnx.ModelProto:
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
    graph = _trace(model, (torch.zeros(2, *size),), ["images"], ({0: torch.export.Dim("batch")},))
    have = {i.name for i in graph.graph.initializer}
    missing = [name for name in names if name not in have]
    if missing:
        raise UserError(f"the exported graph has no weight {missing[0]}; ONNX export does not know this kind of layer")
    return graph


def _fix_activations(model: nn.Module) -> None:
    """Activation quantizers at the width in use, in the form whose shift is one BitShift node."""
    width = width_of(model)
    now = _Now(width.max_bits, width.max_bits, [])
    now.set(torch.tensor(width.bits))
    _swap(model, lambda m: _Activation(now, m) if isinstance(m, ActivationQuantizer) else None)


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


def _trace(model: nn.Module, args: tuple[Any, ...], inputs: list[str], shapes: Any) -> onnx.ModelProto:
    try:
        program = torch.onnx.export(
            model.eval(),
            args,
            input_names=inputs,
            output_names=["logits"],
            opset_version=OPSET,
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


class _Now(nn.Module):
    """What the width in use means in numbers, all tensors of the graph: made once at its beginning, read by all layers."""

    def __init__(self, stored: int, max_bits: int, widths: list[int]) -> None:
        super().__init__()
        rows = [widths.index(n) if n in widths else BEYOND for n in range(1, max_bits + 1)]
        self.register_buffer("rows", torch.tensor(rows))
        self.register_buffer("shifts", torch.tensor([stored - n for n in range(1, stored + 1)], dtype=torch.uint8))
        self.register_buffer("down", torch.tensor([max_bits - n for n in range(1, max_bits + 1)], dtype=torch.uint8))
        self.register_buffer("tops", torch.tensor([2.0**n - 1 for n in range(1, max_bits + 1)]))
        self.register_buffer("steps", torch.tensor([2.0**-n for n in range(1, max_bits + 1)]))
        self.max_bits = max_bits

    def set(self, bits: Tensor) -> None:
        at = torch.where(bits < 1, BEYOND, bits - 1).reshape(1)
        for name in ("rows", "shifts", "down", "tops", "steps"):
            setattr(self, f"{name}_now", torch.index_select(getattr(self, name), 0, at))


def _shift(codes: Tensor, by: Tensor) -> Tensor:
    """codes >> by as one BitShift node; PyTorch's own translation of a shift takes uint8 for int8."""
    done = torch.onnx.ops.symbolic(
        "BitShift", (codes, by), {"direction": "RIGHT"}, dtype=torch.uint8, shape=codes.shape, version=11
    )
    assert isinstance(done, Tensor)
    return done


class _Weight(nn.Module):
    """`PackedWeight` with the width as a tensor: codes -> BitShift -> level -> weight."""

    def __init__(self, now: _Now, scale: Tensor, level: str) -> None:
        super().__init__()
        self.now, self.level = [now], level  # in a list: a part of the whole, not of each weight
        self.register_buffer("scale", scale)

    def forward(self, codes: Tensor) -> Tensor:
        now = self.now[0]
        k = _shift(codes, now.shifts_now).float()  # type: ignore[arg-type]
        k = k + 0.5 if self.level == "centre" else k
        level = k / now.tops_now if self.level == "endpoint" else k * now.steps_now  # type: ignore[operator]
        return (level * 2.0 - 1.0) * self.scale  # type: ignore[operator]


class _Norm(nn.Module):
    """`PerWidthNorm` with the width as a tensor: rows of all sets, one taken by Gather."""

    def __init__(self, now: _Now, norm: PerWidthNorm, widths: list[int]) -> None:
        super().__init__()
        self.now = [now]
        states = [dict(norm.sets[str(n)].state_dict()) for n in widths]
        self.names = [name for name in states[0] if not name.endswith("num_batches_tracked")]
        for i, name in enumerate(self.names):
            self.register_buffer(f"table{i}", torch.stack([state[name] for state in states]))
        self.body = [norm.sets[str(widths[0])]]

    def forward(self, *args: Any) -> Tensor:
        row = self.now[0].rows_now
        state = {n: torch.index_select(getattr(self, f"table{i}"), 0, row)[0] for i, n in enumerate(self.names)}  # type: ignore[arg-type]
        return torch.func.functional_call(self.body[0], state, args)


class _Activation(nn.Module):
    """`ActivationQuantizer` with the width as a tensor."""

    def __init__(self, now: _Now, layer: ActivationQuantizer) -> None:
        super().__init__()
        self.now, self.quantizer, self.truncated = [now], layer.quantizer, layer.truncated
        self.register_buffer("clip", layer.clip.detach().clone().float())

    def forward(self, x: Tensor) -> Tensor:
        now = self.now[0]
        clip: Tensor = self.clip  # type: ignore[assignment]
        u = torch.minimum(x.clamp_min(0.0), clip) / clip
        tops, whole = now.tops_now, float(2**now.max_bits - 1)
        top: Any = whole if self.truncated else tops
        k = torch.floor(u * (top + 1.0)) if self.quantizer == "floor" else torch.round(u * top)
        k = torch.minimum(k, torch.as_tensor(top))
        if self.truncated:
            k = _shift(k.to(torch.uint8), now.down_now).float()  # type: ignore[arg-type]
        return k / tops * clip  # type: ignore[operator]


class _Dynamic(nn.Module):
    def __init__(self, model: nn.Module, now: _Now) -> None:
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
    now = _Now(weights[0][3].stored, weights[0][3].width.max_bits, widths)
    for _, module, tensor, packed in weights:
        codes = module.parametrizations[tensor].original  # type: ignore[index,union-attr]
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
        delattr(module, tensor)
        module.register_buffer(tensor, codes)
        parametrize.register_parametrization(module, tensor, _Weight(now, packed.scale, packed.level), unsafe=True)
    for norm in per_width_norms(model):
        for layer in norm.sets.values():
            _swap(layer, lambda m: _Activation(now, m) if isinstance(m, ActivationQuantizer) else None)
    _swap(model, lambda m: _Norm(now, m, widths) if isinstance(m, PerWidthNorm) else None)
    _swap(model, lambda m: _Activation(now, m) if isinstance(m, ActivationQuantizer) else None)
    return _Dynamic(model, now).eval()


def _swap(model: nn.Module, make: Any) -> None:
    made: dict[int, nn.Module | None] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) not in made:
                made[id(child)] = make(child)
            if child is not None and made[id(child)] is not None:
                parent._modules[name] = made[id(child)]
