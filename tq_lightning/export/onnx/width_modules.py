"""The parts of a packed model with the width as a tensor, which a graph can take as an input.

They mirror `PackedWeight`, `PerWidthNorm` and `ActivationQuantizer`, with the formulas of
`quant/codes.py`. The numbers that depend on the width are looked up once, at the start of the graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.quant.activation import PACT_LEAST, ActivationQuantizer
from tq_lightning.quant.codes import LEVELS, QUANTIZERS, levels_to_weights
from tq_lightning.quant.switchable_norm import PerWidthNorm

BEYOND = 1 << 20  # out of range of every table


class WidthTables(nn.Module):
    """Numbers that depend on the width, as tensors of the graph; all layers read the current ones.

    Args:
        stored: Width of the stored codes.
        max_bits: Stored width of the prepared model, that of truncated activations.
        widths: Widths of the norm tables, in their order.

    Attributes:
        rows_now: int64 (1,), row of the norm tables. All attributes are set by `set`.
        shifts_now: uint8 (1,), shift of the stored codes.
        down_now: uint8 (1,), shift of truncated activations.
        tops_now: float32 (1,), the largest code.
        max_top: float32 (1,), the largest code at the stored width.
    """

    def __init__(self, stored: int, max_bits: int, widths: list[int]) -> None:
        super().__init__()
        every = range(1, max_bits + 1)
        tables = {
            "rows": torch.tensor([widths.index(n) if n in widths else BEYOND for n in every]),
            "shifts": torch.tensor([stored - n for n in range(1, stored + 1)], dtype=torch.uint8),
            "down": torch.tensor([max_bits - n for n in every], dtype=torch.uint8),
            "tops": torch.tensor([2.0**n - 1 for n in every]),
        }
        self.names = tuple(tables)
        for name, table in tables.items():
            self.register_buffer(name, table)
        self.register_buffer("max_top", torch.tensor([2.0**max_bits - 1]))

    def set(self, bits: Tensor) -> None:
        """Look up the numbers of a width (int64, no dimension); an unknown one is out of range."""
        at = torch.where(bits < 1, BEYOND, bits - 1).reshape(1)
        for name in self.names:
            setattr(self, f"{name}_now", torch.index_select(getattr(self, name), 0, at))


def _shift(codes: Tensor, by: Tensor) -> Tensor:
    """Shift codes right in one BitShift node; PyTorch's translation of a shift treats uint8 as int8."""
    done = torch.onnx.ops.symbolic(
        "BitShift",
        (codes, by),
        {"direction": "RIGHT"},
        dtype=torch.uint8,
        shape=codes.shape,
        version=11,
    )
    assert isinstance(done, Tensor)
    return done


class TensorWeight(nn.Module):
    """`PackedWeight` with the width as a tensor: codes -> BitShift -> level -> weight."""

    def __init__(self, now: WidthTables, scale: Tensor, level: str) -> None:
        super().__init__()
        self.now, self.level = [now], level  # in a list, so that it is not a child of every weight
        self.register_buffer("scale", scale)

    def forward(self, codes: Tensor) -> Tensor:
        now = self.now[0]
        k = _shift(codes, now.shifts_now).float()  # type: ignore[arg-type]
        return levels_to_weights(LEVELS[self.level](k, now.tops_now), self.scale)  # type: ignore[arg-type]


class TensorNorm(nn.Module):
    """`PerWidthNorm` with the width as a tensor: the norms of all widths as tables, read by Gather."""

    def __init__(self, now: WidthTables, norm: PerWidthNorm, widths: list[int]) -> None:
        super().__init__()
        self.now = [now]
        states = [dict(norm.sets[str(n)].state_dict()) for n in widths]
        self.names = [name for name in states[0] if not name.endswith("num_batches_tracked")]
        for i, name in enumerate(self.names):
            self.register_buffer(f"table{i}", torch.stack([state[name] for state in states]))
        self.body = [norm.sets[str(widths[0])]]

    def forward(self, *args: Any) -> Tensor:
        row = self.now[0].rows_now
        state = {
            n: torch.index_select(getattr(self, f"table{i}"), 0, row)[0]  # type: ignore[arg-type]
            for i, n in enumerate(self.names)
        }
        return torch.func.functional_call(self.body[0], state, args)


class TensorActivation(nn.Module):
    """`ActivationQuantizer` with the width as a tensor."""

    def __init__(self, now: WidthTables, layer: ActivationQuantizer) -> None:
        super().__init__()
        self.now, self.quantizer, self.truncated = [now], layer.quantizer, layer.truncated
        self.register_buffer("clip", layer.clip.detach().clone().float().clamp_min(PACT_LEAST))

    def forward(self, x: Tensor) -> Tensor:
        now = self.now[0]
        clip: Tensor = self.clip  # type: ignore[assignment]
        u = torch.minimum(x.clamp_min(0.0), clip) / clip
        tops: Tensor = now.tops_now  # type: ignore[assignment]
        top: Tensor = now.max_top if self.truncated else tops  # type: ignore[assignment]
        k = torch.minimum(QUANTIZERS[self.quantizer].steps(u, top), top)
        if self.truncated:
            k = _shift(k.to(torch.uint8), now.down_now).float()  # type: ignore[arg-type]
        return LEVELS["endpoint"](k, tops) * clip


def swap(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> None:
    """Replace every module for which `make` returns one, once if it is used in several places."""
    made: dict[int, nn.Module | None] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if id(child) not in made:
                made[id(child)] = make(child)
            if made[id(child)] is not None:
                parent._modules[name] = made[id(child)]
