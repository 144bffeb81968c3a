"""Test oracle of integer mode: compare layers with exact sums in float64, on equal input codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tq_lightning.quant.integer.exact import exact_value, finish
from tq_lightning.quant.integer.layer import IntegerLayer
from tq_lightning.quant.integer.model import integer_layers

NEAR_HALF = 1e-3


class Agreement(NamedTuple):
    """Outputs of one layer compared with exact integers.

    Attributes:
        outputs: number of compared values.
        off_by_one: number of codes that differ by 1 where the exact value is within `NEAR_HALF` of
            a rounding boundary.
        wrong: number of other differences; for a float output, of relative errors above 1e-4.
    """

    outputs: int
    off_by_one: int
    wrong: int


@contextmanager
def simulated(model: nn.Module) -> Iterator[nn.Module]:
    """Run the integer layers of a model on exact sums instead of kernels."""
    layers = integer_layers(model)
    for layer in layers:
        layer.simulated = True
    try:
        yield model
    finally:
        for layer in layers:
            layer.simulated = False


@torch.inference_mode()
def compare(model: nn.Module, images: Tensor) -> dict[str, Agreement]:
    """Compare every integer layer with exact integers, on the input codes of the real forward pass.

    Args:
        model: a model in integer mode, at any width.
        images: (batch, channels, height, width).

    Returns:
        {name of the layer: agreement}.
    """
    found: dict[str, Agreement] = {}
    inputs: dict[int, tuple[Any, ...]] = {}

    def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[id(layer)] = tuple(arg.clone() for arg in args)  # a shortcut is overwritten

    def after(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(layer, IntegerLayer)
        a, *rest = inputs.pop(id(layer))
        value = exact_value(layer, a, rest[0] if rest else None)
        out = layer.prepacked(a).out
        if out is None:
            error = (output.double() - value).abs()
            wrong = error > 1e-4 * value.abs().clamp_min(value.abs().mean())
            found[layer.name] = Agreement(value.numel(), 0, int(wrong.sum()))
            return
        gap = (output.int() - finish(value, out).int()).abs()
        near = ((value - value.floor()) - 0.5).abs() < NEAR_HALF
        off = (gap == 1) & near
        found[layer.name] = Agreement(value.numel(), int(off.sum()), int(((gap > 0) & ~off).sum()))

    hooks = [
        hook
        for layer in integer_layers(model)
        for hook in (layer.register_forward_pre_hook(before), layer.register_forward_hook(after))
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found
