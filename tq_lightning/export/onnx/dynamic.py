"""Dynamic graph: a packed file at all its widths, with the width as an input.

Every packed weight is its uint8 codes followed by BitShift; levels are computed in the graph. Norm
sets of all widths are tables that Gather reads. A width that the file does not hold is an index out
of range, which every runtime reports as an error, so no wrong shift is ever computed. The weights
are computed at every run.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tq_lightning.export.onnx.graph import image_size, trace, write_graph
from tq_lightning.export.onnx.width_modules import (
    TensorNorm,
    TensorWeight,
    WidthTables,
    replace_activations,
)
from tq_lightning.export.packed.module import packed_weights
from tq_lightning.export.packed.reader import load_packed
from tq_lightning.quant.layers import replace_modules
from tq_lightning.quant.switchable_norm import PerWidthNorm, per_width_norms


def export_dynamic(path: str | Path, out: str | Path) -> None:
    """Write the graph of all widths of a packed file.

    The inputs are "images" (batch, channels, height, width) and "bits" (int64 scalar), the output
    is "logits".

    Args:
        path: packed file.
        out: target file, written atomically.

    Raises:
        UserError: see `export_static`.
    """
    packed = load_packed(path)
    widths = packed_weights(packed)[0].packed.widths
    model = DynamicModel(packed)
    images = torch.zeros(2, *image_size(packed))
    shapes = {"images": {0: torch.export.Dim("batch")}, "bits": None}
    graph = trace(model, (images, torch.tensor(4)), ["images", "bits"], shapes)
    write_graph(graph, packed, widths, out)


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
            parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
            delattr(module, tensor)
            module.register_buffer(tensor, codes)
            computed = TensorWeight(self.tables, packed.scale, packed.level)
            parametrize.register_parametrization(module, tensor, computed, unsafe=True)
        for norm in per_width_norms(model):
            for layer in norm.sets.values():
                replace_activations(layer, self.tables)
        replace_modules(model, PerWidthNorm, lambda norm: TensorNorm(self.tables, norm, widths))
        replace_activations(model, self.tables)
        self.model = model
        self.eval()

    def forward(self, images: Tensor, bits: Tensor) -> Tensor:
        """Compute logits (batch, classes) of images (batch, channels, height, width)."""
        self.tables.select(bits)
        return self.model(images)
