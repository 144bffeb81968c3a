"""integer_model(): a prepared or packed model -> a model whose quantized layers run on integers.

The model is traced (torch.fx). A tensor that only integer layers read is passed as uint8 codes,
which the kernel of the preceding layer computes. In a model that cannot be traced, each integer
layer takes and returns float32.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from tq_lightning.errors import UserError
from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.activation_ranges import activation_ranges
from tq_lightning.quant.integer.activations import Quantize
from tq_lightning.quant.integer.kernels import missing_kernels, sums_are_exact
from tq_lightning.quant.integer.layer import IntegerLayer
from tq_lightning.quant.integer.plan import NO_RANGE, NOT_CALLED, NOT_QUANTIZED, IntegerPlan
from tq_lightning.quant.integer.rewrite import rewrite
from tq_lightning.quant.integer.trace import in_leaf


class IntegerModel(nn.Module):
    """A model in integer mode.

    Attributes:
        network: the layers, in evaluation mode.
        layers: {name: "integer", or the reason why it stays in float}, for layers with weights.
        tq: the arguments of `prepare`.
    """

    def __init__(self, network: nn.Module, layers: dict[str, str], model: nn.Module) -> None:
        super().__init__()
        self.network, self.layers = network, layers
        for name in ("tq", "tq_file", "tq_ranges", "num_classes", "pretrained_cfg"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Return float32 logits of images (batch, channels, height, width), or of other inputs."""
        inputs = tuple(_to_float32(value) for value in inputs)
        named = {name: _to_float32(value) for name, value in named.items()}
        traced = isinstance(self.network, fx.GraphModule)
        if traced and inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() == 4:
            inputs = (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
        return self.network(*inputs, **named)

    def summary(self) -> str:
        """Return one line with the number of integer layers and the layers in float."""
        rest = [f"{name} ({why})" for name, why in self.layers.items() if why != "integer"]
        count = len(self.layers) - len(rest)
        text = f"{count} of {len(self.layers)} layers run on integers"
        return f"{text}; in float: {', '.join(rest)}" if rest else text


def _to_float32(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if floating else value


def integer_layers(model: nn.Module) -> list[IntegerLayer]:
    """List the integer layers of a model, in model order."""
    return [m for m in model.modules() if isinstance(m, IntegerLayer)]


def integer_model(
    model: nn.Module, exact_sums: bool | None = None, exact: bool | None = None
) -> IntegerModel:
    """Create a model that runs its quantized layers on integers, on CPU.

    Args:
        model: a prepared or packed model with activation ranges: trained with `activations=`, or
            calibrated with `calibrate_activations`. Its modules become part of the result, in
            float32.
        exact_sums: use 8-bit activation codes at all widths of the weights. None decides by the
            processor, see `kernels.sums_are_exact`; without VNNI, some widths then use 7-bit codes.
        exact: use the exact weights at 8 bits too, which takes a second product with `endpoint` and
            `centre` levels. False uses the nearest int8. None is exact where a layer reads trained
            activation codes, so that such a model equals its own simulation.

    Returns:
        The model in evaluation mode. `bit_width` switches its width.

    Raises:
        UserError: the model has no ranges, no layer can run on integers, or this PyTorch has no
            integer kernels.
    """
    reason = missing_kernels()
    if reason is not None:
        raise UserError(f"integer mode is not available: {reason}; pass mode='resident'")
    exact_sums = sums_are_exact() if exact_sums is None else exact_sums
    model = model.eval().float()
    if not activation_ranges(model):
        raise UserError(
            "the model has no activation ranges, which integer mode needs; call "
            "calibrate_activations(model, batches), or export it with --calibrate"
        )
    plan = IntegerPlan(model, exact_sums, exact)
    network: nn.Module = rewrite(plan) or _replace_layers(plan)
    if all(why != "integer" for why in plan.layers.values()):
        name, why = next(
            (item for item in plan.layers.items() if item[1] != NOT_QUANTIZED),
            ("none", "there are no quantized layers"),
        )
        raise UserError(
            f"no layer can run on integers (first layer {name}: {why}); pass mode='resident'"
        )
    return IntegerModel(network, plan.layers, model).eval().requires_grad_(False)


def _replace_layers(plan: IntegerPlan) -> nn.Module:
    """Replace layers one by one, in place; for models that cannot be traced."""
    if any(isinstance(m, ActivationQuantizer) for m in plan.modules.values()):
        raise UserError(
            f"{type(plan.model).__name__} cannot be traced, so its trained activation codes "
            "cannot be passed on; load it with mode='resident'"
        )
    for name, why in plan.layers.items():
        if why != "integer":
            continue
        codes = plan.calibrated(name)
        if codes is None or in_leaf(plan.modules, name):
            plan.layers[name] = NO_RANGE if codes is None else NOT_CALLED
            continue
        layer = plan.modules[name]
        made = nn.Sequential(
            Quantize(codes, plan.width),
            IntegerLayer(
                name,
                layer,
                plan.width,
                codes,
                exact_sums=plan.exact_sums,
                exact=plan.exact_weights(codes),
            ),
            Contiguous(),
        )
        for holder in plan.modules.values():  # a shared layer has several parents
            for child, module in list(holder._modules.items()):
                if module is layer and holder is not made[1]:
                    holder._modules[child] = made
    return plan.model


class Contiguous(nn.Module):
    """Undo the memory format of a kernel, for code that is not traced and calls `view`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, contiguous."""
        return x.contiguous()
