"""List the quantized weights of a model, and measure how often their codes disagree."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tq_lightning.quant.bit_width import walk_modules, width_of
from tq_lightning.quant.codes import QUANTIZERS, truncate_codes
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


@torch.no_grad()
def code_disagreement(model: nn.Module) -> dict[int, float]:
    """Return {width: share of the weight codes that differ between quantize and truncate}."""
    differ = dict.fromkeys(range(1, width_of(model).max_bits + 1), 0)
    total = 0
    for weight in weight_quantizers(model):
        q = weight.quantizer
        u, quantizer = q.normalize(weight.original).u, QUANTIZERS[q.quantizer]
        stored = quantizer.codes(u, q.width.max_bits)
        total += stored.numel()
        for bits in differ:
            shifted = truncate_codes(stored, q.width.max_bits, bits)
            differ[bits] += int((quantizer.codes(u, bits) != shifted).sum())
    return {bits: count / total for bits, count in differ.items()}
