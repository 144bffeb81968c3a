"""WeightQuantizer: normalize -> code -> (truncate) -> level -> weight, as a torch parametrization.

The layer keeps reading `layer.weight` and gets a tensor on the grid of the width in use. Layers of
timm and any other code that reads the weight are therefore covered.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import QUANTIZERS, dequantize
from tq_lightning.quant.config import QuantConfig
from tq_lightning.quant.fake_quantize import FakeQuantize, width_codes
from tq_lightning.quant.learned_range import LearnedRange
from tq_lightning.quant.level_tables import level_table
from tq_lightning.quant.normalizers import NORMALIZERS, Normalize, Normalizer
from tq_lightning.quant.ste import STES

TINY = torch.finfo(torch.float32).tiny


def _channel_view(w: Tensor, channel_dim: int, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """View `w` so that one call reduces all dims but the output channels: (view, dims to reduce).

    A transposed convolution has the shape (in, out / groups, ...). Its output channel is (group,
    dim 1), hence the view (groups, in / groups, out / groups, ...).
    """
    if channel_dim == 0:
        return w, tuple(range(1, w.dim()))
    view = w.unflatten(0, (groups, w.shape[0] // groups))
    return view, (1, *range(3, view.dim()))


class Normalized(NamedTuple):
    """A normalized weight.

    Attributes:
        u: float32 in [0, 1], shape of the weight.
        scale: mean|w| or the weight at u = 1, without gradient, or the learned range; float32,
            broadcastable to `u`.
    """

    u: Tensor
    scale: Tensor


def span_of(rms: Tensor, row: Normalizer) -> Tensor:
    """Return the weight at u = 1 of a normalizer with the reference "rms" or "learned"."""
    assert row.span is not None
    return rms.mul(row.span).clamp_max(torch.finfo(torch.float32).max)


class WeightQuantizer(nn.Module):
    """Parametrization that puts a weight on the grid of the width in use.

    Args:
        name: full name of the tensor in the model, for messages.
        width: the model's shared `Width`.
        config: how the model is quantized.
        channel_dim: dimension of the output channels: 0, or 1 for a transposed convolution.
        groups: groups of a transposed convolution.

    Attributes:
        range: learned range of t, see `LearnedRange`; None (the default) uses the range of the
            weight. A learned range is also the scale, and u is clamped to [0, 1].
        range_layout: layout and gradient of `range`.
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
        self.level, self.normalizer, self.scale_kind = config.level, config.normalizer, config.scale
        all_widths = range(1, width.max_bits + 1)
        self.tables = {bits: level_table(self.level, self.normalizer, bits) for bits in all_widths}
        self.float_pass = config.float_pass
        self.channel_dim, self.groups = channel_dim, groups
        self.register_parameter("range", None)
        self.range_layout = LearnedRange()
        # the weight in use, if `fused_weights` computes the weights of the model, else None
        self.fused_weight: Tensor | None = None

    def reduce(self, w: Tensor, how: str) -> Tensor:
        """Reduce a non-negative `w` to its "max" or "mean", per tensor or per output channel."""
        if not NORMALIZERS[self.normalizer].per_channel:
            return w.amax() if how == "max" else w.mean()
        view, dims = _channel_view(w, self.channel_dim, self.groups)
        out = view.amax(dims, keepdim=True) if how == "max" else view.mean(dims, keepdim=True)
        if self.channel_dim == 0:
            return out
        return out.expand(-1, view.shape[1], *(-1,) * (out.dim() - 2)).flatten(0, 1)

    def _mean(self, magnitude: Tensor) -> Tensor:
        """Compute mean|w| and check the tensor: NaN and infinity propagate to the mean."""
        scale = self.reduce(magnitude, "mean")
        if torch.compiler.is_compiling():
            # a graph cannot branch on values; NaN propagates to the loss
            return torch.where(torch.isfinite(scale), scale, self.huge_mean(magnitude))
        if not torch.isfinite(scale).all():
            self.check_finite(magnitude)
            scale = self.huge_mean(magnitude)
        return scale

    def _max(self, magnitude: Tensor) -> Tensor:
        """Compute max|w| and check the tensor: NaN and infinity propagate to the maximum."""
        top = self.reduce(magnitude, "max")
        if not (torch.compiler.is_compiling() or top.is_meta) and not top.isfinite().all():
            self.check_finite(magnitude)
        return top

    def _rms(self, magnitude: Tensor) -> Tensor:
        """Compute the root mean square, in units of the maximum so that no square overflows."""
        top = self._max(magnitude).clamp_min(TINY)
        ratio = magnitude / top
        return self.reduce(ratio * ratio, "mean").sqrt().mul(top).clamp_min(TINY)

    def start_range(self, w: Tensor) -> None:
        """Make `range` a parameter that starts at `Normalizer.span` times the rms of `w`."""
        row, w = NORMALIZERS[self.normalizer], w.detach().float()
        groups = self.groups if row.per_channel and self.channel_dim == 1 else None
        first = span_of(self._rms(w.abs()), row)
        self.range_layout, self.range = LearnedRange.start(w, first, groups)

    def check_finite(self, w: Tensor) -> None:
        """Raise ValueError if `w` contains NaN or infinity; the message names the tensor."""
        learned = self.range
        if not torch.isfinite(w).all() or (learned is not None and not learned.isfinite().all()):
            raise ValueError(
                f"weight {self.name} contains NaN or infinity; "
                "lower the learning rate or repair the checkpoint"
            )

    def huge_mean(self, magnitude: Tensor) -> Tensor:
        """Average a finite weight whose float32 sum overflows; scaling by a power of 2 is exact."""
        small = magnitude * 2.0**-64
        if NORMALIZERS[self.normalizer].per_channel:
            return self.reduce(small, "mean") * 2.0**64
        # a norm and not a mean, since `FlatWeights` computes the norms of all weights in one call
        return torch.linalg.vector_norm(small, 1) / small.numel() * 2.0**64

    def normalize(self, w: Tensor) -> Normalized:
        """Normalize a weight with its row of `NORMALIZERS`, and compute its scale.

        Args:
            w: float weight, any shape and dtype; computed in float32.

        Returns:
            The normalized weight. The gradient of `u` flows to `w` through t, not the range.

        Raises:
            ValueError: `w` contains NaN or infinity; the message names the tensor.
        """
        w, row = w.float(), NORMALIZERS[self.normalizer]
        raw, value = w.detach(), STES[self.ste].value
        magnitude = raw.abs()
        top: Tensor | None = None
        learned = self.range
        if learned is not None:
            if not torch.compiler.is_compiling():
                self.check_finite(w)
            scale = self.range_layout.value(learned)
            grad_divisor = top = scale.detach()
            t = row.squash(raw)
        elif row.reference == "rms":
            grad_divisor = self._rms(magnitude)
            scale = span_of(grad_divisor, row)
            t = row.squash(raw / grad_divisor)
        else:
            scale = self._mean(magnitude) if self.scale_kind == "mean" else self._max(magnitude)
            t = row.squash(raw)
            # at least TINY for an all-zero weight
            grad_divisor = top = self.reduce(t.abs(), "max").clamp_min(TINY)
        if value:
            grad_divisor = scale.detach().clamp_min(TINY)
        clamped = learned is not None or row.reference == "rms"
        divisor_arg = None if grad_divisor is top else grad_divisor
        u = Normalize.apply(w, t, top, divisor_arg, self.normalizer, not value, clamped)
        return Normalized(u, scale)

    def table(self, bits: int, device: torch.device) -> Tensor | None:
        """Return the level of each code of a width, float32 (2^bits,); None if it is a formula."""
        table = self.tables[bits]
        return None if table is None else table.to(device)

    def codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize `w` at the stored width: (uint8 codes, shape of `w`; scale, broadcastable)."""
        with torch.no_grad():
            u, scale = self.normalize(w)
            return QUANTIZERS[self.quantizer].codes(u, self.width.max_bits), scale

    def forward(self, w: Tensor) -> Tensor:
        """Return `w` at the width in use, in its dtype.

        At float width this is `w` itself, or E (2u - 1) with `float_pass` "normalized".
        """
        if (
            self.fused_weight is not None
        ):  # first: a compiled graph then does not depend on the width
            return self.fused_weight.to(w.dtype)
        bits, source = self.width.bits, self.width.source
        if bits is None and self.float_pass == "plain":
            return w
        u, scale = self.normalize(w)
        if bits is None:
            return ((u - 0.5) * (2.0 * scale)).to(w.dtype)
        table, max_bits = self.table(bits, w.device), self.width.max_bits
        if torch.is_grad_enabled() and (u.requires_grad or scale.requires_grad):
            out = FakeQuantize.apply(
                u, scale, True, bits, self.quantizer, self.ste, self.level, max_bits, source, table
            )
        else:
            codes = width_codes(u, bits, self.quantizer, max_bits, source)
            out = dequantize(codes, bits, scale, self.level, table=table)
        return out.to(w.dtype)

    def extra_repr(self) -> str:
        """Describe the quantizer in the printed model."""
        text = f"{self.quantizer}, ste={self.ste}, level={self.level}, normalizer={self.normalizer}"
        return text if self.scale_kind == "mean" else f"{text}, scale={self.scale_kind}"
