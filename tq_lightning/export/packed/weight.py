"""Weights of a packed model: codes of the stored width, shifted right when a layer reads them.

`PackedWeight` replaces the float parameter and its `WeightQuantizer`. `layer.weight` is still a
float tensor, computed from uint8 codes and a scale. It uses the same `truncate_codes` and
`dequantize` as training, so it is bit-identical to the trained weight truncated to that width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tq_lightning.errors import UserError
from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import dequantize, truncate_codes

MODES = ("resident", "lean", "integer")
# codes processed at a time: few enough for the caches of a core, many enough to hide call overhead
CHUNK = 1 << 18


class PackedWeight(nn.Module):
    """Parametrization of uint8 codes: codes -> shift -> level -> weight.

    Args:
        name: full tensor name, for messages.
        width: the model's shared `Width`.
        stored: width of the codes.
        widths: loaded widths, those with planes and norm sets.
        level: a key of `codes.LEVELS`, or of `level_tables.LEVEL_TABLES` with `tables`.
        scale: float32, broadcastable to the weight.
        dtype: type of the weight.
        mode: "resident" keeps the weight of the last used width and overwrites it in place when
            the width changes. "lean" computes the weight at every use and keeps nothing.
        tables: {n: level of each n-bit code, float32 (2^n,)} for each loaded width n; empty if
            `level` is a formula.
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
        tables: Mapping[int, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.width, self.stored, self.level = name, width, stored, level
        self.widths, self.dtype, self.resident = tuple(widths), dtype, mode == "resident"
        self.register_buffer("scale", scale)
        for bits, table in (tables or {}).items():
            self.register_buffer(f"levels{bits}", table)
        self._weight: Tensor | None = None
        self._bits: int | None = None  # width of `_weight`

    def forward(self, codes: Tensor) -> Tensor:
        """Compute the weight at the width in use from uint8 codes of width `stored`."""
        bits = self.width.bits
        assert bits is not None, "a packed model has no float width"  # bit_width refuses it
        if torch.compiler.is_compiling():
            # a graph reads the kept weight if there is one, but never writes it
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
        """Follow the model to another device or dtype.

        The kept weight is dropped and computed again on its next use. The weight takes the new
        dtype, but the scale and the levels stay in float32, so that the weight is rounded once.
        """
        self._weight = self._bits = None
        before = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        self.dtype = fn(torch.zeros(1, dtype=self.dtype, device=before["scale"].device)).dtype
        for name, value in before.items():
            moved: Tensor = self._buffers[name]  # type: ignore[assignment]
            self._buffers[name] = value.to(moved.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Drop the kept weight when other codes and scales are loaded."""
        self._weight = self._bits = None
        super()._load_from_state_dict(*args, **kwargs)

    def _make(self, codes: Tensor, bits: int) -> Tensor:
        narrow = truncate_codes(codes, self.stored, bits)
        scale, table = self.scale.float(), self.table(bits)
        return dequantize(narrow, bits, scale, self.level, table=table).to(self.dtype)

    def table(self, bits: int) -> Tensor | None:
        """Return the level of each code of a width, float32 (2^bits,); None if it is a formula."""
        return self._buffers.get(f"levels{bits}")

    @torch.no_grad()
    def _fill(self, codes: Tensor, bits: int) -> None:
        """Overwrite the kept weight, a few rows at a time so that intermediates stay in cache."""
        if self._weight is None:
            # a weight first computed under inference_mode must be usable outside of it
            with torch.inference_mode(False):
                self._weight = torch.empty_like(codes, dtype=self.dtype)
        self._bits = None  # an interrupt must not leave a partly written weight in use
        scale, table = self.scale.float(), self.table(bits)
        rows = max(1, CHUNK * codes.shape[0] // max(1, codes.numel()))
        for start in range(0, codes.shape[0], rows):
            part = slice(start, start + rows)
            narrow = truncate_codes(codes[part], self.stored, bits)
            factor = scale[part] if scale.dim() == codes.dim() and scale.shape[0] > 1 else scale
            target = self._weight[part]
            if self.dtype == torch.float32:
                dequantize(narrow, bits, factor, self.level, out=target, table=table)
            else:
                target.copy_(dequantize(narrow, bits, factor, self.level, table=table))
        self._bits = bits

    def check_width(self, bits: int | None) -> None:
        """Raise `UserError` if a width was not loaded. Called by `bit_width`."""
        if bits is None or bits in self.widths:  # `bit_width` itself refuses None
            return
        if bits > self.stored:
            hint = "load the file with more bits, or add planes with `export FILE --add REST`"
        elif len(self.widths) == 1:
            hint = "load it with bits=None to switch widths"
        else:
            hint = "its file has no norm statistics for it; calibrate before exporting"
        widths = ", ".join(map(str, self.widths))
        raise UserError(f"this model was loaded for widths {widths}, not {bits}; {hint}")

    def extra_repr(self) -> str:
        """Describe the stored bits, level and mode in the printed model."""
        mode = "resident" if self.resident else "lean"
        return f"{self.stored} bits stored, level={self.level}, {mode}"


def replace_parametrized(module: nn.Module, tensor_name: str, value: Tensor) -> None:
    """Replace a parametrized tensor of a layer by a plain one, under the same name.

    Args:
        module: owner of the tensor.
        tensor_name: its name. All its parametrizations are removed.
        value: registered as a parameter if it is an `nn.Parameter`, else as a buffer.
    """
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=False)
    delattr(module, tensor_name)
    if isinstance(value, nn.Parameter):
        module.register_parameter(tensor_name, value)
    else:
        module.register_buffer(tensor_name, value)


def attach_packed_weight(
    module: nn.Module, tensor_name: str, codes: Tensor, packed: PackedWeight
) -> None:
    """Replace a quantized float weight by its codes.

    Args:
        module: owner of the weight.
        tensor_name: name of the weight. Its only parametrization is a `WeightQuantizer`.
        codes: uint8, shape of the weight.
        packed: parametrization of the codes.
    """
    replace_parametrized(module, tensor_name, codes)
    parametrize.register_parametrization(module, tensor_name, packed, unsafe=True)
    # torch.nn.utils.parametrize gave this module its own class, with a property for the tensor
    kind: type = type(module)
    slow: property = getattr(kind, tensor_name)
    setattr(kind, tensor_name, property(_resident_or(tensor_name, slow.fget), slow.fset))  # type: ignore[arg-type]


def _resident_or(
    tensor_name: str, slow: Callable[[nn.Module], Tensor]
) -> Callable[[nn.Module], Tensor]:
    """Create a property getter that returns the resident weight if current, else calls `slow`.

    torch reads a parametrized tensor through three modules and their hooks, which takes up to 3 %
    of the forward pass of a small transformer.
    """

    def read(module: nn.Module) -> Tensor:
        if not torch.compiler.is_compiling():
            chain: nn.Module = module._modules["parametrizations"]._modules[tensor_name]  # type: ignore[union-attr,assignment]
            packed: PackedWeight = chain._modules["0"]  # type: ignore[assignment]
            if packed._weight is not None and packed._bits == packed.width.bits:
                return packed._weight
        return slow(module)

    return read


class PackedTensor(NamedTuple):
    """A packed weight of a loaded model.

    Attributes:
        name: full name of the tensor in the model.
        module: layer that owns it.
        tensor: its name in `module`.
        packed: parametrization that computes it.
    """

    name: str
    module: nn.Module
    tensor: str
    packed: PackedWeight

    @property
    def codes(self) -> Tensor:
        """Stored codes, uint8, shape of the weight."""
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
