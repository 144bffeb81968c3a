"""WeightQuantizer: normalize -> code -> (truncate) -> level -> weight, as a torch parametrization.

The layer keeps reading `layer.weight` and gets a tensor on the grid of the width in use. Layers of
timm and any other code that reads the weight are therefore covered.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tq_lightning.quant.bit_width import Width, width_of
from tq_lightning.quant.codes import QUANTIZERS, truncate_codes
from tq_lightning.quant.config import QuantConfig
from tq_lightning.quant.fake_quantize import FakeQuantize, width_codes
from tq_lightning.quant.levels import dequantize
from tq_lightning.quant.normalize import Normalize
from tq_lightning.quant.normalizers import NORMALIZERS

TINY = torch.finfo(torch.float32).tiny
LEAST_RANGE = 1e-6  # a learned range at or below zero would never come back


def _channel_view(w: Tensor, channel_dim: int, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """View `w` so that one call reduces all but the output channels: (view, dims to reduce).

    A transposed convolution holds (in, out / groups, ...). Its output channel is (group, dim 1),
    hence the view (groups, in / groups, out / groups, ...).
    """
    if channel_dim == 0:
        return w, tuple(range(1, w.dim()))
    view = w.unflatten(0, (groups, w.shape[0] // groups))
    return view, (1, *range(3, view.dim()))


class Normalized(NamedTuple):
    """A normalized weight.

    Attributes:
        u: float32 in [0, 1], shape of the weight.
        scale: E = mean|w|, without gradient, or the learned range; float32, broadcastable to `u`.
        top: max|t| or the learned range; float32, broadcastable to `u`, without gradient.
    """

    u: Tensor
    scale: Tensor
    top: Tensor


class WeightQuantizer(nn.Module):
    """Parametrization that puts a weight on the grid of the width in use.

    Args:
        name: Full name of the tensor in the model, for messages.
        width: The model's shared `Width`.
        config: How the model is quantized.
        channel_dim: Dimension of the output channels: 0, or 1 for a transposed convolution.
        groups: Groups of a transposed convolution.

    Attributes:
        range: Learned range of t, broadcastable to the weight; None (the default) takes max|t|.
            It then also is the scale, u is clamped to [0, 1], and its gradient is the `scale_rule`
            of the STE.
    """

    range: nn.Parameter | None

    def __init__(
        self,
        name: str,
        width: Width,
        config: QuantConfig | None = None,
        channel_dim: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__()
        config = config or QuantConfig()
        self.name, self.width = name, width
        self.quantizer, self.ste = config.quantizer, config.resolved_ste
        self.level, self.normalizer = config.level, config.normalizer
        self.float_pass = config.float_pass
        self.channel_dim, self.groups = channel_dim, groups
        self.register_parameter("range", None)
        # the weight in use while `fused_weights` makes those of the whole model, else None
        self.made: Tensor | None = None

    def reduce(self, w: Tensor, how: str) -> Tensor:
        """Reduce a non-negative `w` to its "max" or "mean", per tensor or per output channel."""
        if not NORMALIZERS[self.normalizer].per_channel:
            return w.amax() if how == "max" else w.mean()
        view, dims = _channel_view(w, self.channel_dim, self.groups)
        out = view.amax(dims, keepdim=True) if how == "max" else view.mean(dims, keepdim=True)
        if self.channel_dim == 0:
            return out
        return out.expand(-1, view.shape[1], *(-1,) * (out.dim() - 2)).flatten(0, 1)

    def _scale(self, w: Tensor) -> Tensor:
        """Compute E = mean|w| and check the tensor: NaN and infinity show in the mean."""
        magnitude = w.detach().abs()
        scale = self.reduce(magnitude, "mean")
        if torch.compiler.is_compiling():
            # a graph cannot branch on values; NaN passes through and shows in the loss
            return torch.where(torch.isfinite(scale), scale, self.huge_mean(magnitude))
        if not torch.isfinite(scale).all():
            self.check_finite(magnitude)
            scale = self.huge_mean(magnitude)
        return scale

    def check_finite(self, w: Tensor) -> None:
        """Raise ValueError if `w` contains NaN or infinity; the message names the tensor."""
        learned = self.range
        if not torch.isfinite(w).all() or (learned is not None and not learned.isfinite().all()):
            raise ValueError(
                f"weight {self.name} contains NaN or infinity; "
                "lower the learning rate or repair the checkpoint"
            )

    def range_value(self, learned: Tensor) -> Tensor:
        """Return a learned range, at least `LEAST_RANGE`, in float32; its gradient passes on."""
        learned = learned.float()
        return torch.where(learned > LEAST_RANGE, learned, learned - learned.detach() + LEAST_RANGE)

    def huge_mean(self, magnitude: Tensor) -> Tensor:
        """Average a finite weight whose float32 sum overflows; scaling by a power of 2 is exact."""
        return self.reduce(magnitude * 2.0**-64, "mean") * 2.0**64

    def normalize(self, w: Tensor) -> Normalized:
        """Normalize a weight: u = t / (2 max|t|) + 1/2 with t = tanh(w) or w, and E = mean|w|.

        A learned range takes the place of the maximum and of E.

        Args:
            w: Float weight, any shape and dtype; computed in float32.

        Returns:
            The normalized weight. The gradient of `u` reaches `w` through t, not the maximum.

        Raises:
            ValueError: `w` contains NaN or infinity; the message names the tensor.
        """
        w = w.float()
        t = NORMALIZERS[self.normalizer].squash(w.detach())
        if self.range is not None:
            if not torch.compiler.is_compiling():
                self.check_finite(w)
            scale = self.range_value(self.range)
            top = scale.detach()
        else:
            scale = self._scale(w)
            top = self.reduce(t.abs(), "max").clamp_min(TINY)  # clamped for an all-zero weight
        u = Normalize.apply(w, t, top, self.normalizer, self.range is not None)
        return Normalized(u, scale, top)

    def codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize `w` at the stored width: (uint8 codes, shape of `w`; scale, broadcastable)."""
        with torch.no_grad():
            u, scale, _ = self.normalize(w)
            return QUANTIZERS[self.quantizer].codes(u, self.width.max_bits), scale

    def forward(self, w: Tensor) -> Tensor:
        """Return `w` at the width in use, in its dtype.

        At float width that is `w` itself, or E (2u - 1) with `float_pass` "normalized".
        """
        if self.made is not None:  # first: a compiled graph then does not depend on the width
            return self.made.to(w.dtype)
        bits, source = self.width.bits, self.width.source
        if bits is None and self.float_pass == "plain":
            return w
        u, scale, _ = self.normalize(w)
        if bits is None:
            return ((u - 0.5) * (2.0 * scale)).to(w.dtype)
        if torch.is_grad_enabled() and (u.requires_grad or scale.requires_grad):
            max_bits = self.width.max_bits
            out = FakeQuantize.apply(
                u, scale, True, bits, self.quantizer, self.ste, self.level, max_bits, source
            )
        else:
            codes = width_codes(u, bits, self.quantizer, self.width.max_bits, source)
            out = dequantize(codes, bits, scale, self.level)
        return out.to(w.dtype)

    def extra_repr(self) -> str:
        """Describe the quantizer in the printed model."""
        return f"{self.quantizer}, ste={self.ste}, level={self.level}, normalizer={self.normalizer}"


class QuantizedTensor(NamedTuple):
    """A weight with its quantizer.

    Attributes:
        name: Full name of the tensor in the model.
        module: The layer that owns it.
        tensor: Its name in `module`.
        quantizer: The parametrization.
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
    return [
        QuantizedTensor(f"{name}.{tensor}" if name else tensor, module, tensor, quantizer)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for tensor, chain in module.parametrizations.items()  # type: ignore[union-attr]
        for quantizer in chain
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
