"""Dynamic graph: a packed file at all its widths, with the width as an input.

Every packed weight is an initializer of uint8 codes followed by BitShift; the graph computes the
levels and the weight in every run. The norm sets of all widths are tables that Gather reads. A
width that the file does not have is an index out of range, which every runtime reports as an error.

With `codes_as_inputs`, the codes are inputs instead of initializers. A caller can then run a narrow
width before all planes are loaded: codes from n planes have zeros as their lower bits, which the
shift to n bits drops.
"""

from pathlib import Path

import onnx
import torch
from onnx import helper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tq_lightning.errors import UserError
from tq_lightning.export.onnx.graph import batch_shapes, graph_inputs, trace, write_graph
from tq_lightning.export.onnx.width_modules import (
    TensorNorm,
    TensorWeight,
    WidthTables,
    replace_activations,
)
from tq_lightning.export.packed.reader import load_packed
from tq_lightning.export.packed.weight import (
    PackedTensor,
    PackedWeight,
    packed_weights,
    replace_parametrized,
)
from tq_lightning.quant.layers import replace_modules
from tq_lightning.quant.switchable_norm import PerWidthNorm, per_width_norms


def export_dynamic(
    path: str | Path,
    out: str | Path,
    codes_as_inputs: bool = False,
    model: nn.Module | str | None = None,
) -> list[str]:
    """Write the graph of all widths of a packed file.

    The inputs are "images" (batch, channels, height, width), or those that the file names, and
    "bits" (int64 scalar); the output is "logits".

    Args:
        path: packed file.
        out: target file, written atomically.
        codes_as_inputs: instead of storing the codes in the graph, add one uint8 input per
            quantized tensor, with its name and shape. Tied tensors share the input of the first
            one.
        model: see `load_packed`.

    Returns:
        Names of the packed weights that the network does not read, which the graph lacks.

    Raises:
        UserError: see `export_static`.
    """
    packed = load_packed(path, model=model)
    weights = packed_weights(packed)
    widths = weights[0].packed.widths
    switched = DynamicModel(packed)
    inputs = graph_inputs(packed)
    given = [name for name, value in inputs.items() if value is not None]
    shapes = ((*batch_shapes(inputs), None),)
    graph, unused = trace(switched, (*inputs.values(), torch.tensor(4)), [*given, "bits"], shapes)
    if codes_as_inputs:
        _take_codes_as_inputs(graph, weights)
    write_graph(graph, packed, widths, out)
    return [weight.name for weight in weights if _codes_of(weight) in unused]


def _codes_of(weight: PackedTensor) -> str:
    """Return the name of the codes of a weight in the graph."""
    owner = weight.name.removesuffix(weight.tensor)
    return f"model.{owner}parametrizations.{weight.tensor}.original"


def _take_codes_as_inputs(graph: onnx.ModelProto, weights: list[PackedTensor]) -> None:
    """Replace the initializers of codes by inputs, named after the quantized tensors."""
    body = graph.graph
    stored = {initializer.name: initializer for initializer in body.initializer}
    new: dict[str, str] = {}
    for weight in weights:
        old = _codes_of(weight)
        if old in stored:
            new[old] = weight.name
            body.initializer.remove(stored[old])
            body.input.append(
                helper.make_tensor_value_info(weight.name, stored[old].data_type, stored[old].dims)
            )
    if not new:
        raise UserError(
            "the exported graph has no codes; ONNX export does not support this network"
        )
    for node in body.node:
        for i, name in enumerate(node.input):
            node.input[i] = new.get(name, name)


def joined_table(packed: PackedWeight) -> Tensor | None:
    """Join the levels of all widths of a packed weight in one table; n bits start at 2^n - 2.

    Widths that are not loaded are filled with zeros. Return None if the levels are a formula.
    """
    tables = {bits: packed.table(bits) for bits in packed.widths}
    if tables[packed.widths[0]] is None:
        return None
    widths = range(1, packed.stored + 1)
    return torch.cat([t if (t := tables.get(n)) is not None else torch.zeros(2**n) for n in widths])


class DynamicModel(nn.Module):
    """Packed model with the width as a second input.

    Args:
        model: loaded packed model. Its weights, norms and activations are replaced in place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        weights = packed_weights(model)
        first = weights[0].packed
        widths = list(first.widths)
        self.tables = WidthTables(first.stored, first.width.max_bits, widths)
        for weight in weights:
            _, module, tensor, packed = weight
            codes = weight.codes
            replace_parametrized(module, tensor, codes)
            computed = TensorWeight(self.tables, packed.scale, packed.level, joined_table(packed))
            parametrize.register_parametrization(module, tensor, computed, unsafe=True)
        for norm in per_width_norms(model):
            for layer in norm.sets.values():
                replace_activations(layer, self.tables)
        replace_modules(model, PerWidthNorm, lambda norm: TensorNorm(self.tables, norm, widths))
        replace_activations(model, self.tables)
        self.model = model
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute logits (batch, classes) of the inputs of the model; the last one is the width."""
        self.tables.select(inputs[-1])
        return self.model(*inputs[:-1])
