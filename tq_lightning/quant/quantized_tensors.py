"""Lists of the quantized weights and layers of a model."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tq_lightning.quant.bit_width import Width, walk_modules
from tq_lightning.quant.weight import WeightQuantizer


class QuantizedTensor(NamedTuple):
    """A weight with its quantizer.

    Attributes:
        name: full name of the tensor in the model.
        module: the layer that owns it.
        tensor: its name in `module`.
        quantizer: the parametrization.
    """

    name: str
    module: nn.Module
    tensor: str
    quantizer: WeightQuantizer

    @property
    def original(self) -> Tensor:
        """The float parameter behind the tensor."""
        return original(self.module, self.tensor)


def weight_quantizers(model: nn.Module) -> list[QuantizedTensor]:
    """List all weights with a quantizer, in model order."""
    return weight_quantizers_of(walk_modules(model))


def weight_quantizers_of(modules: list[tuple[str, nn.Module]]) -> list[QuantizedTensor]:
    """List all weights with a quantizer of modules that `walk_modules` listed."""
    return [
        QuantizedTensor(f"{name}.{tensor}" if name else tensor, module, tensor, quantizer)
        for name, module in modules
        # not `is_parametrized`, which is slow for modules that are not
        if isinstance(chains := module.__dict__["_modules"].get("parametrizations"), nn.ModuleDict)
        for tensor, chain in chains.items()
        for quantizer in chain  # type: ignore[attr-defined]
        if isinstance(quantizer, WeightQuantizer)
    ]


def original(module: nn.Module, tensor: str) -> Tensor:
    """Return the float parameter behind a quantized tensor of a layer."""
    return module.parametrizations[tensor].original  # type: ignore[index,union-attr]


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """List the layers of a prepared or packed model that have quantized weights, by name."""
    return {
        name or "(root)": module
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        and any(
            isinstance(getattr(quantizer, "width", None), Width)
            for chain in module.parametrizations.values()  # type: ignore[union-attr,operator]
            for quantizer in chain
        )
    }
