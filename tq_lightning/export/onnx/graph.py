"""Trace a packed model to an ONNX graph, and write a graph.

Logits equal those of PyTorch up to the order of float32 sums, a relative error of about 1e-4.
Top-1 predictions are the same except for ties.
"""

import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxscript  # noqa: F401  # PyTorch's exporter imports it late, within its own errors
import torch
from onnx import helper
from torch import Tensor, nn

from tq_lightning.errors import UserError, message_of
from tq_lightning.export.onnx.width_modules import WidthTables, replace_activations
from tq_lightning.export.packed.optional_fields import input_size
from tq_lightning.export.packed.weight import PackedTensor, packed_weights, replace_parametrized
from tq_lightning.files import atomic_write
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.input_spec import example_inputs

# first opset whose DequantizeLinear supports 4-bit integers, and first one with 2-bit integers
OPSETS = (21, 25)


def graph_inputs(model: nn.Module) -> dict[str, Tensor | None]:
    """Return example inputs of a packed model: "images", or those that its file names.

    Raises:
        UserError: the packed file names neither.
    """
    rows = model.tq_file.get("inputs")  # type: ignore[operator,union-attr]
    if rows:
        return example_inputs(model, rows)
    return {"images": torch.zeros(2, *input_size(model.tq_file))}  # type: ignore[arg-type]


def batch_shapes(inputs: Mapping[str, Tensor | None]) -> tuple[Any, ...]:
    """Return the dynamic shapes of inputs that share their batch size."""
    batch = torch.export.Dim("batch")
    return tuple(None if value is None else {0: batch} for value in inputs.values())


def trace(
    model: nn.Module, args: tuple[Any, ...], inputs: list[str], shapes: Any, opset: int = OPSETS[0]
) -> tuple[onnx.ModelProto, set[str]]:
    """Export a model to a graph without optimizing it.

    Args:
        model: module to export. It is put into evaluation mode.
        args: example inputs.
        inputs: names of the inputs.
        shapes: dynamic shapes, as `torch.onnx.export` takes them.
        opset: opset of the graph.

    Returns:
        (graph with the output "logits", names of the parameters and buffers that the network does
        not read).

    Raises:
        UserError: PyTorch can't export the model.
    """
    types = {p.dtype for p in model.parameters()} - {torch.float32}
    hook = model.register_forward_hook(_logits_first)
    try:
        if types:  # the exporter accepts products of two types, which runtimes do not
            model.eval()(*args)
        with warnings.catch_warnings():
            # WidthTables.select assigns attributes during the trace on purpose
            warnings.filterwarnings(
                "ignore", "The tensor attributes? .* assigned during export", UserWarning
            )
            # of PyTorch's own tracing of recurrent layers
            warnings.filterwarnings("ignore", "_check_is_size will be removed", FutureWarning)
            # inputs that share the name of their batch dimension
            warnings.filterwarnings("ignore", "# The axis name: .* will not be used", UserWarning)
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
    except Exception as error:  # torch.export and the translation to ONNX raise many types
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter wraps the error in advice to developers
            cause = cause.__cause__
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
        hint = f"; its parameters are {names}, pass model.float() to save_packed" if names else ""
        raise UserError(
            "PyTorch can't export this network to ONNX "
            f"({type(cause).__name__}: {message_of(cause, 200)}){hint}"
        ) from error
    finally:
        hook.remove()
    assert program is not None and program.exported_program is not None
    signature = program.exported_program.graph_signature
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    unused = {
        tensors[node.name]
        for node in program.exported_program.graph.nodes
        if node.name in tensors and not node.users
    }
    buffer = io.BytesIO()
    program.save(buffer)  # type: ignore[arg-type]
    return onnx.load_model_from_string(buffer.getvalue()), unused


def _logits_first(model: nn.Module, args: Any, out: Any) -> Any:
    """Move the logits to the front of a mapping: the first output of a graph has their name."""
    has_logits = isinstance(out, Mapping) and "logits" in out
    return {"logits": out["logits"], **out} if has_logits else out


def float_graph(model: nn.Module, opset: int = OPSETS[0]) -> onnx.ModelProto:
    """Export a packed model at its width, with float weights under their full tensor names.

    Args:
        model: packed model. Its packed weights are replaced by float parameters.
        opset: opset of the graph.

    Returns:
        Graph with input "images" (batch, channels, height, width), or the inputs that the file
        names, and output "logits". It lacks the weights of layers that the network does not call.

    Raises:
        UserError: PyTorch can't export the model, or the exported graph lacks a weight.
    """
    width = width_of(model)
    tables = WidthTables(width.max_bits, width.max_bits, [])
    tables.select(torch.tensor(width.bits))
    replace_activations(model, tables)
    names = []
    for name, module, tensor, _ in packed_weights(model):
        value = getattr(module, tensor).detach().clone()
        replace_parametrized(module, tensor, nn.Parameter(value, requires_grad=False))
        names.append(name)
    inputs = graph_inputs(model)
    given = [name for name, value in inputs.items() if value is not None]
    graph, unused = trace(model, tuple(inputs.values()), given, batch_shapes(inputs), opset)
    _use_first_names(graph, model)
    present = {initializer.name for initializer in graph.graph.initializer}
    missing = [name for name in names if name not in present | unused]
    if missing:
        raise UserError(
            f"the exported graph has no weight {missing[0]}; ONNX export does not support this "
            "kind of layer"
        )
    return graph


def weights_of(
    graph: onnx.ModelProto, weights: Sequence[PackedTensor]
) -> tuple[list[PackedTensor], list[str]]:
    """Return the weights that a graph of `float_graph` has, and the names of the others."""
    present = {initializer.name for initializer in graph.graph.initializer}
    used = [weight for weight in weights if weight.name in present]
    return used, [weight.name for weight in weights if weight.name not in present]


def _use_first_names(graph: onnx.ModelProto, model: nn.Module) -> None:
    """Name the parameters of a layer with several names by its first name, as packed files do."""
    first = {id(module): name for name, module in model.named_modules()}
    new = {
        f"{name}.{leaf}": f"{first[id(module)]}.{leaf}"
        for name, module in model.named_modules(remove_duplicate=False)
        for leaf in module._parameters
        if name != first[id(module)]
    }
    present = {initializer.name for initializer in graph.graph.initializer}
    new = {old: name for old, name in new.items() if old in present and name not in present}
    for initializer in graph.graph.initializer:
        initializer.name = new.get(initializer.name, initializer.name)
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = new.get(name, name)


def write_graph(
    graph: onnx.ModelProto, model: nn.Module, widths: Sequence[int], out: str | Path
) -> None:
    """Check a graph and write it atomically, with the metadata of the model.

    The metadata of the exporter is removed. The new metadata maps names to strings, in JSON except
    for `model` and `quantizer`: `widths`, `stored_bits`, `quantizer`, and, if the packed file has
    them, `model`, `class_names`, `input_size` (channels, height, width), `mean`, `std`,
    `interpolation`, `crop_pct` and `crop_mode`.

    Args:
        graph: graph to write.
        model: packed model that the graph was made from.
        widths: widths that the graph runs at.
        out: target file.
    """
    for node in graph.graph.node:  # the exporter stores stack traces with paths of Python files
        del node.metadata_props[:]
    header: dict[str, Any] = model.tq_file  # type: ignore[assignment]
    values = {
        "model": header["model"].get("name"),
        "quantizer": header["prepare"]["quantizer"],
        "widths": list(widths),
        "stored_bits": header["stored_bits"],
        "class_names": header["class_names"],
        **(header["preprocessing"] or {}),
    }
    del graph.graph.metadata_props[:]
    del graph.metadata_props[:]
    text = {
        k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items() if v is not None
    }
    helper.set_model_props(graph, text)
    onnx.checker.check_model(graph)
    with atomic_write(out) as temporary:
        temporary.write_bytes(graph.SerializeToString())
