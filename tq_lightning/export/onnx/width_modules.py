"""The parts of a packed model with the width as a tensor, which a graph can take as an input.

Weights, norm sets and activations as in `PackedWeight`, `PerWidthNorm` and `ActivationQuantizer`; what a width means in
numbers is looked up once at the beginning of the graph, and read by all of them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.quant.activation import PACT_LEAST, ActivationQuantizer
from tq_lightning.quant.switchable_norm import PerWidthNorm

BEYOND = 1 << 20  # an index no table has


class WidthTables(nn.Module):
    """What the width in use means in numbers, all tensors of the graph: made once at its beginning, read by all layers."""

    def __init__(self, stored: int, max_bits: int, widths: list[int]) -> None:
        super().__init__()
        rows = [widths.index(n) if n in widths else BEYOND for n in range(1, max_bits + 1)]
        self.register_buffer("rows", torch.tensor(rows))
        self.register_buffer(
            "shifts", torch.tensor([stored - n for n in range(1, stored + 1)], dtype=torch.uint8)
        )
        self.register_buffer(
            "down", torch.tensor([max_bits - n for n in range(1, max_bits + 1)], dtype=torch.uint8)
        )
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
        self.now, self.level = [now], level  # in a list: a part of the whole, not of each weight
        self.register_buffer("scale", scale)

    def forward(self, codes: Tensor) -> Tensor:
        now = self.now[0]
        k = _shift(codes, now.shifts_now).float()  # type: ignore[arg-type]
        k = k + 0.5 if self.level == "centre" else k
        level = k / now.tops_now if self.level == "endpoint" else k * now.steps_now  # type: ignore[operator]
        return (level * 2.0 - 1.0) * self.scale  # type: ignore[operator]


class TensorNorm(nn.Module):
    """`PerWidthNorm` with the width as a tensor: rows of all sets, one taken by Gather."""

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
            n: torch.index_select(getattr(self, f"table{i}"), 0, row)[0]
            for i, n in enumerate(self.names)
        }  # type: ignore[arg-type]
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
        tops, whole = now.tops_now, float(2**now.max_bits - 1)
        top: Any = whole if self.truncated else tops
        k = torch.floor(u * (top + 1.0)) if self.quantizer == "floor" else torch.round(u * top)
        k = torch.minimum(k, torch.as_tensor(top))
        if self.truncated:
            k = _shift(k.to(torch.uint8), now.down_now).float()  # type: ignore[arg-type]
        return k / tops * clip  # type: ignore[operator]


def swap(model: nn.Module, make: Any) -> None:
    made: dict[int, nn.Module | None] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) not in made:
                made[id(child)] = make(child)
            if child is not None and made[id(child)] is not None:
                parent._modules[name] = made[id(child)]
