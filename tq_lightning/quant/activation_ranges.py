"""Activation ranges: ranges of the inputs of quantized layers, for integer inference.

A network trained with `activations=` has trained ranges, [0, clip]. For other networks,
`calibrate_activations` observes the inputs of the quantized layers on a few batches. Ranges are
stored on the model and in packed files. Step sizes are computed where they are used, because the
largest activation code depends on the processor.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.batches import call_model, list_batches
from tq_lightning.quant.bit_width import Width, bit_width, width_of
from tq_lightning.quant.eval_mode import eval_mode
from tq_lightning.quant.quantized_tensors import quantized_layers

BINS = 4096
PERCENTILE = 99.99
CLIPS = 80  # clipped ranges that the observer "mse" tries
# layers with integer kernels in PyTorch or ONNX; attention and recurrent layers have none
_WITH_INPUT = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class ActivationRange(NamedTuple):
    """Range of an activation tensor; low <= 0 <= high, so that a code represents 0 exactly.

    Attributes:
        low: smallest value.
        high: largest value.
    """

    low: float
    high: float

    def step(self, top: int) -> tuple[float, int]:
        """Return step and zero point of uint8 codes in [0, top]: x = step * (code - zero_point).

        Args:
            top: largest code, 1..255.

        Returns:
            (step, zero point). The step is positive. The zero point is 0 if `low` is 0.
        """
        tiny = torch.finfo(torch.float32).tiny
        step = max((self.high - self.low) / top, tiny)
        return step, min(top, round(-self.low / step))


# -- observers: (histogram, its lowest value, its highest value) -> range --------------------------
def _percentile(counts: Tensor, low: float, high: float) -> ActivationRange:
    """Return the range without (100 - PERCENTILE) % of the values, at each nonzero end."""
    share = counts.cumsum(0) / counts.sum()
    width = (high - low) / len(counts)
    out = 1.0 - PERCENTILE / 100.0
    last = int((share >= 1.0 - out).nonzero()[0])
    first = int((share <= out).sum())
    return _with_zero(low + first * width if first else low, low + (last + 1) * width)


def _mse(counts: Tensor, low: float, high: float) -> ActivationRange:
    """Return the evenly clipped range with the smallest mean squared error of 8-bit codes."""
    centers = low + (torch.arange(len(counts), dtype=torch.float64) + 0.5) * (
        (high - low) / len(counts)
    )
    best = (float("inf"), _with_zero(low, high))
    for i in range(CLIPS):
        share = 1.0 - i / CLIPS
        tried = _with_zero(share * low, share * high)
        step, zero = tried.step(255)
        rebuilt = step * ((centers / step).round().add(zero).clamp(0, 255) - zero)
        error = ((rebuilt - centers).square() * counts).sum().item()
        best = min(best, (error, tried))
    return best[1]


Observer = Callable[[Tensor, float, float], ActivationRange]
OBSERVERS: dict[str, Observer] = {"percentile": _percentile, "mse": _mse}


def _with_zero(low: float, high: float) -> ActivationRange:
    return ActivationRange(min(low, 0.0), max(high, 0.0))


def activation_ranges(model: nn.Module) -> dict[str, ActivationRange]:
    """Return the ranges of a model: calibrated ones, and those of its activation quantizers.

    Args:
        model: a prepared or packed model.

    Returns:
        {name: range}: the range of the input of a quantized layer, or the range of the output of an
        activation quantizer (`prepare(activations=...)`), [0, clip].
    """
    found = {name: ActivationRange(*pair) for name, pair in getattr(model, "tq_ranges", {}).items()}
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            found[name] = ActivationRange(0.0, float(module.effective_clip))
    return found


@torch.no_grad()
def calibrate_activations(
    model: nn.Module,
    batches: Iterable[Any],
    observer: str = "percentile",
    widths: list[int] | None = None,
) -> dict[str, ActivationRange]:
    """Observe the inputs of the quantized layers, for integer inference.

    One range per layer serves all widths: the union of the ranges observed at each width. The model
    runs in evaluation mode with truncated weights. Modes, the width in use and all random states
    are restored.

    Args:
        model: a prepared or packed model. Norms of untrained widths are calibrated before, with
            `calibrate_norms`.
        batches: inputs on the model's device: images (batch, channels, height, width), or tuples or
            mappings of arguments. They are read twice.
        observer: "percentile" excludes the outermost 0.01 % of the values. "mse" chooses the
            clipped range with the smallest mean squared error of 8-bit codes.
        widths: widths to observe at; None = all widths that the model can run at.

    Returns:
        A dict from the name of a quantized convolution or linear layer to the range of its input.
        It has no entry for a layer that was not called as a module. The dict is also stored as
        `model.tq_ranges`, which `save_packed` writes.

    Raises:
        ValueError: the model is not prepared, an unknown observer or width, no batches, batches
            that the network does not take, or an input that contains NaN or infinity.
    """
    if observer not in OBSERVERS:
        raise ValueError(f"unknown observer {observer!r}; pass one of {', '.join(OBSERVERS)}")
    width = width_of(model)
    batches = list_batches(model, batches, "to observe activations on")
    layers: dict[str, nn.Module] = {
        n: m for n, m in quantized_layers(model).items() if isinstance(m, _WITH_INPUT)
    }
    extremes: dict[tuple[str, int], ActivationRange] = {}
    histograms: dict[tuple[str, int], Tensor] = {}

    def find_extremes(name: str, bits: int, x: Tensor) -> None:
        low, high = (v.item() for v in x.aminmax())
        if not abs(low) < float("inf") or not abs(high) < float("inf"):
            raise ValueError(
                f"the input of {name} contains NaN or infinity; check the images and the weights"
            )
        before = extremes.get((name, bits), ActivationRange(low, high))
        extremes[name, bits] = ActivationRange(min(before.low, low), max(before.high, high))

    def count(name: str, bits: int, x: Tensor) -> None:
        low, high = extremes[name, bits]
        counts = torch.histc(x, BINS, low, high) if low < high else x.new_tensor([x.numel()])
        counts = counts.double().cpu()
        key = name, bits
        histograms[key] = histograms[key] + counts if key in histograms else counts

    with eval_mode(model):
        widths = _usable_widths(model, width) if widths is None else widths
        for observe in (find_extremes, count):
            _run(model, layers, batches, widths, observe)
    ranges: dict[str, ActivationRange] = {}
    for (name, bits), counts in histograms.items():
        found = OBSERVERS[observer](counts, *extremes[name, bits])
        before = ranges.get(name, found)
        ranges[name] = ActivationRange(min(before.low, found.low), max(before.high, found.high))
    model.tq_ranges = {name: ranges[name] for name in layers if name in ranges}  # type: ignore[assignment]
    return dict(model.tq_ranges)  # type: ignore[arg-type]


def _usable_widths(model: nn.Module, width: Width) -> list[int]:
    """Return the widths that are loaded and have norm statistics, widest first."""
    usable = []
    for bits in range(width.max_bits, 0, -1):
        try:
            with bit_width(model, bits, "truncate"):
                usable.append(bits)
        except ValueError:
            continue
    return usable


def _run(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: list[Any],
    widths: list[int],
    observe: Callable[[str, int, Tensor], None],
) -> None:
    """Call `observe` with name, width and input of every quantized layer, at every width."""
    width = width_of(model)

    def read(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(named.values()), None)
        if isinstance(x, Tensor):
            observe(name, width.bits or 0, x.float())

    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, named, name=name: read(name, args, named), with_kwargs=True
        )
        for name, module in layers.items()
    ]
    try:
        for bits in widths:
            with bit_width(model, bits, "truncate"):
                for batch in batches:
                    call_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
