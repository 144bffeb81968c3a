"""The runtime of a packed model: weights are integers of one stored width, narrowed by a shift when a layer asks.

`PackedWeight` takes the place of the float parameter and its `WeightQuantizer`: `layer.weight` stays a float tensor to
whoever reads it, but behind it stand uint8 codes and a scale. The weight comes from the same `truncate_codes` and
`dequantize` as in training, hence equals the trained model truncated to that width, bit for bit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tq_lightning.errors import UserError
from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import dequantize, truncate_codes

MODES = ("resident", "lean")
CHUNK = (
    1 << 18
)  # codes worked on at a time: few enough for a core's caches, enough to hide the cost of a call


class PackedWeight(nn.Module):
    """Parametrization whose original is the uint8 codes: codes -> shift -> level -> weight.

    Args:
        name: full tensor name, for messages.
        width: the model's shared `Width`.
        stored: width of the codes held.
        widths: those that were loaded, with their norm sets.
        level: a key of `codes.LEVELS`.
        scale: float32, broadcastable to the weight.
        dtype: of the weight it stands for.
        mode: "resident" keeps the weight of the width last used, and overwrites it in place when the width changes;
            "lean" makes the weight anew at every use and keeps nothing.
    """

    scale: Tensor

    def __init__(
        self,
        name: str,
        width: Width,
        stored: int,
        widths: Sequence[int],
        level: str,
        scale: Tensor,
        dtype: torch.dtype = torch.float32,
        mode: str = "resident",
    ) -> None:
        super().__init__()
        self.name, self.width, self.stored, self.level = name, width, stored, level
        self.widths, self.dtype, self.resident = tuple(widths), dtype, mode == "resident"
        self.register_buffer("scale", scale)
        self._weight: Tensor | None = None
        self._bits: int | None = None  # width of `_weight`

    def forward(self, codes: Tensor) -> Tensor:
        """uint8 codes of width `stored` -> weight at the width in use, same shape."""
        bits = self.width.bits
        assert bits is not None, "a packed model has no float width"  # bit_width refuses it
        if torch.compiler.is_compiling():
            # a graph takes the weight where it is at hand, else makes it from the codes; it never writes it
            if (
                self._bits == bits
                and self._weight is not None
                and not torch.compiler.is_exporting()
            ):
                return self._weight
            return self._make(codes, bits)
        if not self.resident:
            return self._make(codes, bits)
        if self._bits != bits or self._weight is None:
            self._fill(codes, bits)
        return self._weight  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        """The model goes to another device: the kept weight, which is made from what moves, stays behind."""
        self._weight = self._bits = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Other codes and scales come in: the kept weight is not theirs."""
        self._weight = self._bits = None
        super()._load_from_state_dict(*args, **kwargs)

    def _make(self, codes: Tensor, bits: int) -> Tensor:
        narrow = truncate_codes(codes, self.stored, bits)
        return dequantize(narrow, bits, self.scale.float(), self.level).to(self.dtype)

    @torch.no_grad()
    def _fill(self, codes: Tensor, bits: int) -> None:
        """Overwrites the kept weight, a few rows at a time so that the steps in between never leave the cache."""
        if self._weight is None:
            with torch.inference_mode(
                False
            ):  # so that a weight first made under inference_mode serves elsewhere too
                self._weight = torch.empty_like(codes, dtype=self.dtype)  # and its layout in memory
        self._bits = None  # should the work be cut short, nothing stale is served
        scale = self.scale.float()
        rows = max(1, CHUNK * codes.shape[0] // max(1, codes.numel()))
        for start in range(0, codes.shape[0], rows):
            part = slice(start, start + rows)
            narrow = truncate_codes(codes[part], self.stored, bits)
            factor = scale[part] if scale.dim() == codes.dim() and scale.shape[0] > 1 else scale
            target = self._weight[part]
            if self.dtype == torch.float32:
                dequantize(narrow, bits, factor, self.level, out=target)
            else:
                target.copy_(dequantize(narrow, bits, factor, self.level))
        self._bits = bits

    def check_width(self, bits: int | None) -> None:
        """Called by `bit_width` before it changes the width: UserError where that width was not loaded."""
        if (
            bits is None or bits in self.widths
        ):  # None is refused by `bit_width` in words of its own
            return
        if bits > self.stored:
            hint = "load the file with more bits, or bring it to more with `export FILE --add REST`"
        elif len(self.widths) == 1:
            hint = "load it with bits=None to switch widths"
        else:
            hint = "its file has no norm statistics for it; calibrate before exporting"
        raise UserError(
            f"this model was loaded for widths {', '.join(map(str, self.widths))}, not {bits}; {hint}"
        )

    def extra_repr(self) -> str:
        return f"{self.stored} bits stored, level={self.level}, {'resident' if self.resident else 'lean'}"


def attach(module: nn.Module, tensor_name: str, codes: Tensor, packed: PackedWeight) -> None:
    """Puts `codes` (uint8, shape of the weight) and `packed` where a parametrized float weight stands, which is dropped.

    The name `tensor_name` may have only its `WeightQuantizer` on it.
    """
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=False)
    delattr(module, tensor_name)
    module.register_buffer(tensor_name, codes)
    parametrize.register_parametrization(module, tensor_name, packed, unsafe=True)
    kind: type = type(module)  # a class of this module alone, with torch's property for the tensor
    made: property = getattr(kind, tensor_name)
    setattr(kind, tensor_name, property(_at_hand(tensor_name, made.fget), made.fset))  # type: ignore[arg-type]


def _at_hand(
    tensor_name: str, make: Callable[[nn.Module], Tensor]
) -> Callable[[nn.Module], Tensor]:
    """How a layer reads its weight: the resident one where it stands, else `make`.

    torch reads a parametrized tensor through three modules and their hooks, which adds up to 3 % of a small transformer's pass.
    """

    def read(module: nn.Module) -> Tensor:
        if not torch.compiler.is_compiling():
            chain: nn.Module = module._modules["parametrizations"]._modules[tensor_name]  # type: ignore[union-attr,assignment]
            packed: PackedWeight = chain._modules["0"]  # type: ignore[assignment]
            if packed._weight is not None and packed._bits == packed.width.bits:
                return packed._weight
        return make(module)

    return read


class PackedTensor(NamedTuple):
    """A packed weight of a loaded model.

    Attributes:
        name: Full name of the tensor in the model.
        module: The layer that owns it.
        tensor: Its name in `module`.
        packed: The parametrization.
    """

    name: str
    module: nn.Module
    tensor: str
    packed: PackedWeight

    @property
    def codes(self) -> Tensor:
        """The uint8 codes behind the tensor, of width `packed.stored`."""
        return self.module.parametrizations[self.tensor].original  # type: ignore[index,union-attr]


def packed_weights(model: nn.Module) -> list[PackedTensor]:
    """List all packed weights, in model order."""
    return [
        PackedTensor(f"{name}.{tensor}" if name else tensor, module, tensor, chain[0])
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for tensor, chain in module.parametrizations.items()  # type: ignore[union-attr]
        if isinstance(chain[0], PackedWeight)
    ]
