"""Layers of a model that run on integers, the codes that they read, and why others do not."""

from torch import nn

from tq_lightning.quant.activation_ranges import activation_ranges, quantized_layers
from tq_lightning.quant.bit_width import Width, width_of
from tq_lightning.quant.integer_activations import CalibratedCodes
from tq_lightning.quant.integer_layer import refusal, stored_weight

NOT_QUANTIZED = "not quantized"
NO_RANGE = "no activation range"


class IntegerPlan:
    """Layers of a model that run on integers.

    Args:
        model: A prepared or packed model.
        exact_sums: See `integer_codes.activation_top`.

    Attributes:
        width: The model's shared `Width`.
        modules: {name: module}, of the whole model.
        layers: {name: "integer", or why the layer stays in float}, for all layers with weights.
    """

    def __init__(self, model: nn.Module, exact_sums: bool) -> None:
        self.model, self.exact_sums = model, exact_sums
        self.width: Width = width_of(model)
        self.modules = dict(model.named_modules())
        self.ranges = activation_ranges(model)
        self.layers: dict[str, str] = {}
        quantized = quantized_layers(model)
        for name, module in self.modules.items():
            if name in quantized or (name == "" and "(root)" in quantized):
                self.layers[name] = refusal(module) or "integer"
            elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                self.layers[name] = NOT_QUANTIZED

    def calibrated(self, name: str) -> CalibratedCodes | None:
        """Return the codes of the calibrated range of a layer's input, or None without a range."""
        if name not in self.ranges:
            return None
        level = stored_weight(self.modules[name]).level
        return CalibratedCodes(self.ranges[name], level, self.exact_sums)
