"""TODO export/onnx/dynamic.py."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tq_lightning.export.onnx.graph import _trace, example_size, write_graph
from tq_lightning.export.onnx.width_modules import (
    TensorActivation,
    TensorNorm,
    TensorWeight,
    WidthTables,
    swap,
)
from tq_lightning.export.packed.module import packed_weights
from tq_lightning.export.packed.reader import load_packed
from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.switchable_norm import PerWidthNorm, per_width_norms


class _Dynamic(nn.Module):
    def __init__(self, model: nn.Module, now: WidthTables) -> None:
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
    write_graph(
        _trace(graph, (torch.zeros(2, *size), torch.tensor(4)), ["images", "bits"], shapes), out
    )


def dynamic_model(model: nn.Module) -> _Dynamic:
    """A loaded packed model with the width as a tensor, which a graph can take as an input. `model` is spent."""
    weights = packed_weights(model)
    first = weights[0].packed
    widths = list(first.widths)
    now = WidthTables(first.stored, first.width.max_bits, widths)
    for weight in weights:
        module, tensor, codes = weight.module, weight.tensor, weight.codes
        replacement = TensorWeight(now, weight.packed.scale, weight.packed.level)
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
        delattr(module, tensor)
        module.register_buffer(tensor, codes)
        parametrize.register_parametrization(module, tensor, replacement, unsafe=True)
    for norm in per_width_norms(model):
        for layer in norm.sets.values():
            swap(
                layer,
                lambda m: TensorActivation(now, m) if isinstance(m, ActivationQuantizer) else None,
            )
    swap(model, lambda m: TensorNorm(now, m, widths) if isinstance(m, PerWidthNorm) else None)
    swap(model, lambda m: TensorActivation(now, m) if isinstance(m, ActivationQuantizer) else None)
    return _Dynamic(model, now).eval()
