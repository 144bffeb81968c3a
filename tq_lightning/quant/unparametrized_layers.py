"""Layers that read their fused weights like float weights, without calling parametrizations."""

from collections.abc import Sequence

import torch
from torch import nn

from tq_lightning.quant.quantized_tensors import QuantizedTensor


class UnparametrizedLayers:
    """Layers that read their fused weights like float weights.

    Parametrization gives a layer a new class, in which each weight is a property that calls two
    modules. While the weights are fused, the layer has its original class, and the weight is an
    attribute. Layers with other parametrizations, with a class that was derived later, or with
    weights in another dtype than float32, keep their class.
    """

    def __init__(self, weights: Sequence[QuantizedTensor]) -> None:
        own: dict[nn.Module, list[QuantizedTensor]] = {}
        for w in weights:
            own.setdefault(w.module, []).append(w)
        self._layers = [
            (layer, type(layer), found)
            for layer, found in own.items()
            if len(layer.parametrizations) == len(found)  # type: ignore[arg-type]
            and all(len(chain) == 1 for chain in layer.parametrizations.values())  # type: ignore[union-attr,operator]
            and all(w.original.dtype == torch.float32 for w in found)
            and all(w.tensor in vars(type(layer)) for w in found)
            and len(type(layer).__bases__) == 1
        ]
        self._bypassed = False

    def bypass(self) -> None:
        """Give the layers their original class, and the fused weights as attributes."""
        if self._bypassed:
            return
        self._bypassed = True
        for layer, parametrized, weights in self._layers:
            object.__setattr__(layer, "__class__", parametrized.__bases__[0])
            for w in weights:
                layer.__dict__[w.tensor] = w.quantizer.fused_weight

    def restore(self) -> None:
        """Give the layers back their properties."""
        if not self._bypassed:
            return
        self._bypassed = False
        for layer, parametrized, weights in self._layers:
            object.__setattr__(layer, "__class__", parametrized)
            for w in weights:
                del layer.__dict__[w.tensor]
