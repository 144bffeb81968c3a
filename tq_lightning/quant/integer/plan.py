"""Select the layers of a model that run on integers, with reasons for the others."""

from torch import nn
from torch.nn.utils import parametrize

from tq_lightning.quant.activation_ranges import activation_ranges
from tq_lightning.quant.bit_width import Width, width_of
from tq_lightning.quant.integer.activations import (
    ActivationCodes,
    CalibratedCodes,
    TrainedCodes,
)
from tq_lightning.quant.integer.arithmetic import signed_level
from tq_lightning.quant.integer.stored_weight import stored_weight
from tq_lightning.quant.integer.trace import has_hooks
from tq_lightning.quant.quantized_tensors import quantized_layers

NOT_QUANTIZED = "not quantized"
NO_RANGE = "no activation range"
NOT_CALLED = "is not called as a module"
SINGLE = "it is the whole model; put it into nn.Sequential"


class IntegerPlan:
    """Layers of a model that run on integers.

    Args:
        model: a prepared or packed model.
        exact_sums: see `saturation.activation_top`.
        exact: use exact weights at 8 bits; None = only with trained activation codes.

    Attributes:
        width: the model's shared `Width`.
        modules: {name: module} of the model.
        layers: {name: "integer", or the reason why it stays in float}, for layers with weights.
    """

    def __init__(self, model: nn.Module, exact_sums: bool, exact: bool | None = None) -> None:
        self.model, self.exact_sums, self.exact = model, exact_sums, exact
        self.width: Width = width_of(model)
        self.modules = dict(model.named_modules())
        self.ranges = activation_ranges(model)
        self.layers: dict[str, str] = {}
        quantized = quantized_layers(model)
        for name, module in self.modules.items():
            if name == "" and "(root)" in quantized:
                self.layers["(root)"] = reason_in_float(module) or SINGLE
            elif name in quantized:
                self.layers[name] = reason_in_float(module) or "integer"
            elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                self.layers[name] = NOT_QUANTIZED

    def calibrated(self, name: str) -> CalibratedCodes | None:
        """Return the codes of a layer's calibrated input range, or None without a range."""
        if name not in self.ranges:
            return None
        level = stored_weight(self.modules[name]).level
        return CalibratedCodes(self.ranges[name], level, self.exact_sums)

    def exact_weights(self, codes: ActivationCodes) -> bool:
        """Return True if a layer that reads these codes uses exact weights at 8 bits."""
        return isinstance(codes, TrainedCodes) if self.exact is None else self.exact


def reason_in_float(layer: nn.Module) -> str | None:
    """Return the reason why a quantized layer cannot run on integers, or None if it can."""
    kind = type(layer).__name__.removeprefix("Parametrized")
    forward = type(layer).forward
    if not (isinstance(layer, (nn.Conv2d, nn.Linear))):
        return f"{kind} has no integer kernel"
    if forward not in (nn.Conv2d.forward, nn.Linear.forward):
        return f"{kind} overrides forward"
    if isinstance(layer, nn.Conv2d) and (
        layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return f"its padding is {layer.padding_mode}, {layer.padding}"
    if has_hooks(layer):
        return "has forward hooks"
    if not parametrize.is_parametrized(layer, "weight"):
        return "its weight is not quantized"
    weight = stored_weight(layer)
    try:
        signed_level(weight.stored, weight.level)
    except ValueError as error:
        return str(error)
    shape = weight.codes.shape
    if weight.scale.numel() != 1 and weight.scale.shape != (shape[0], *(1,) * (len(shape) - 1)):
        return f"its scale has shape {tuple(weight.scale.shape)}, not one per output channel"
    return None
