"""Modules with the width as a tensor, so that it can be an input of a graph.

They mirror `PackedWeight`, `PerWidthNorm` and `ActivationQuantizer`, and use the formulas of
quant/codes.py. Values that depend on the width are looked up once, at the
start of the graph.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.codes import LEVELS, QUANTIZERS, levels_to_weights
from tq_lightning.quant.layers import replace_modules
from tq_lightning.quant.switchable_norm import PerWidthNorm

OUT_OF_RANGE = 1 << 20  # an index beyond every table, which the runtime reports as an error


class WidthTables(nn.Module):
    """Tables of values that depend on the width, and the current values, which all layers read.

    Args:
        stored: width of the stored codes.
        max_bits: stored width of the prepared model, at which truncated activations are quantized.
        widths: width of each row of the norm tables.

    Attributes:
        rows_now: int64 (1,), row of the norm tables. `select` sets all attributes in _now.
        shifts_now: uint8 (1,), shift of the stored codes.
        down_now: uint8 (1,), shift of truncated activations.
        tops_now: float32 (1,), the largest code.
        max_top: float32 (1,), the largest code at the stored width.
    """

    def __init__(self, stored: int, max_bits: int, widths: list[int]) -> None:
        super().__init__()
        every = range(1, max_bits + 1)
        rows = [widths.index(n) if n in widths else OUT_OF_RANGE for n in every]
        tables = {
            "rows": torch.tensor(rows),
            "shifts": torch.tensor([stored - n for n in range(1, stored + 1)], dtype=torch.uint8),
            "down": torch.tensor([max_bits - n for n in every], dtype=torch.uint8),
            "tops": torch.tensor([2.0**n - 1 for n in every]),
        }
        self.names = tuple(tables)
        for name, table in tables.items():
            self.register_buffer(name, table)
        self.register_buffer("max_top", torch.tensor([2.0**max_bits - 1]))

    def select(self, bits: Tensor) -> None:
        """Look up the values of a width (int64 scalar); an unknown width is out of range."""
        at = torch.where(bits < 1, OUT_OF_RANGE, bits - 1).reshape(1)
        for name in self.names:
            setattr(self, f"{name}_now", torch.index_select(getattr(self, name), 0, at))


def _shift_right(codes: Tensor, by: Tensor) -> Tensor:
    """Shift uint8 codes right with one BitShift node. PyTorch would export an int8 shift."""
    shifted = torch.onnx.ops.symbolic(
        "BitShift",
        (codes, by),
        {"direction": "RIGHT"},
        dtype=torch.uint8,
        shape=codes.shape,
        version=11,
    )
    assert isinstance(shifted, Tensor)
    return shifted


class TensorWeight(nn.Module):
    """`PackedWeight` with the width as a tensor: codes -> BitShift -> level -> weight.

    Args:
        tables: tables of the model.
        scale: float32, broadcastable to the weight.
        level: a key of `codes.LEVELS`, or the name of a table.
        table: levels of all widths, n bits starting at 2^n - 2; None if `level` is a formula.
    """

    def __init__(
        self, tables: WidthTables, scale: Tensor, level: str, table: Tensor | None = None
    ) -> None:
        super().__init__()
        self.tables = [tables]  # a list hides the tables, which are a submodule of the model
        self.level = level
        self.register_buffer("scale", scale)
        self.register_buffer("table", table)

    def forward(self, codes: Tensor) -> Tensor:
        """Compute the weight from stored uint8 codes."""
        now = self.tables[0]
        k = _shift_right(codes, now.shifts_now).float()  # type: ignore[arg-type]
        scale, top, table = self.scale, now.tops_now, self.table
        if table is None:
            return levels_to_weights(LEVELS[self.level](k, top), scale)  # type: ignore[arg-type]
        index = (k + (top - 1.0)).to(torch.int64).flatten()  # type: ignore[operator]
        levels = torch.index_select(table, 0, index).view(codes.shape)  # type: ignore[arg-type]
        return levels_to_weights(levels, scale)  # type: ignore[arg-type]


class TensorNorm(nn.Module):
    """`PerWidthNorm` with the width as a tensor: tables of all norm sets, read by Gather.

    Args:
        tables: tables of the model.
        norm: the norm to replace.
        widths: widths of the rows.
    """

    def __init__(self, tables: WidthTables, norm: PerWidthNorm, widths: list[int]) -> None:
        super().__init__()
        self.tables = [tables]
        states = [dict(norm.sets[str(n)].state_dict()) for n in widths]
        self.names = [name for name in states[0] if not name.endswith("num_batches_tracked")]
        for i, name in enumerate(self.names):
            self.register_buffer(f"table{i}", torch.stack([state[name] for state in states]))
        self.body = [norm.sets[str(widths[0])]]

    def forward(self, *args: Any) -> Tensor:
        """Normalize with the set of the width in use."""
        row = self.tables[0].rows_now
        state = {
            name: torch.index_select(getattr(self, f"table{i}"), 0, row)[0]  # type: ignore[arg-type]
            for i, name in enumerate(self.names)
        }
        return torch.func.functional_call(self.body[0], state, args)


class TensorActivation(nn.Module):
    """`ActivationQuantizer` with the width as a tensor.

    Args:
        tables: tables of the model.
        layer: the quantizer to replace.
    """

    def __init__(self, tables: WidthTables, layer: ActivationQuantizer) -> None:
        super().__init__()
        self.tables, self.quantizer, self.truncated = [tables], layer.quantizer, layer.truncated
        self.register_buffer("clip", layer.effective_clip.clone())

    def forward(self, input: Tensor) -> Tensor:  # named as in `nn.ReLU`, which it replaces
        """Clip and quantize activations of any shape."""
        now = self.tables[0]
        clip: Tensor = self.clip  # type: ignore[assignment]
        u = torch.minimum(input.clamp_min(0.0), clip) / clip
        tops: Tensor = now.tops_now  # type: ignore[assignment]
        top: Tensor = now.max_top if self.truncated else tops  # type: ignore[assignment]
        k = QUANTIZERS[self.quantizer].float_codes(u, top)
        if self.truncated:
            k = _shift_right(k.to(torch.uint8), now.down_now).float()  # type: ignore[arg-type]
        return LEVELS["endpoint"](k, tops) * clip


def replace_activations(model: nn.Module, tables: WidthTables) -> None:
    """Replace every `ActivationQuantizer` of a model by a `TensorActivation`."""
    replace_modules(model, ActivationQuantizer, lambda layer: TensorActivation(tables, layer))
