"""WeightQuantizer: normalise -> code -> (shift) -> level -> weight, as a torch parametrization of one tensor.

The operator reads `layer.weight` as ever and gets a tensor on the grid of the width in use, so that timm's own layers
and code that reads the weight itself are covered.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import LEVELS, QUANTIZERS, dequantize, truncate_codes
from tq_lightning.quant.fake_quantize import FakeQuantize, width_codes
from tq_lightning.quant.ste import resolve_ste

NORMALIZERS = ("tanh", "tanh_channel", "absmax", "absmax_channel")
_TINY = torch.finfo(torch.float32).tiny


def _channel_view(w: Tensor, channel_dim: int, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """`w` seen so that reducing all but the output channels is one call: (view, dims to reduce).

    A transposed convolution holds (in, out / groups, ...): its output channel is (group, dim 1), seen as
    (groups, in / groups, out / groups, ...).
    """
    if channel_dim == 0:
        return w, tuple(range(1, w.dim()))
    view = w.unflatten(0, (groups, w.shape[0] // groups))
    return view, (1, *range(3, view.dim()))


class WeightQuantizer(nn.Module):
    """Parametrization that puts a weight on the grid of the width in use.

    Args:
        name: the tensor's full name in the model, for messages.
        width: the model's shared `Width`.
        quantizer, ste, level, normalizer: as in `prepare`; `ste` may be "auto".
        channel_dim: dimension of the output channels, 0, or 1 for transposed convolutions (with their `groups`).

    Raises:
        ValueError: an unknown quantizer, ste, level or normalizer.
    """

    def __init__(
        self,
        name: str,
        width: Width,
        quantizer: str = "floor",
        ste: str = "auto",
        level: str = "endpoint",
        normalizer: str = "tanh",
        channel_dim: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__()
        for value, known, key in (
            (quantizer, QUANTIZERS, "quantizer"),
            (level, LEVELS, "level"),
            (normalizer, NORMALIZERS, "normalizer"),
        ):
            if value not in known:
                raise ValueError(f"unknown {key} {value!r}; pass one of {', '.join(known)}")
        self.name, self.width = name, width
        self.quantizer, self.ste = quantizer, resolve_ste(ste, quantizer)
        self.level, self.normalizer = level, normalizer
        self.channel_dim, self.groups = channel_dim, groups
        # (u, scale, max) shared by the passes of one step or one evaluation, see `shared_normalisation`; None outside
        self._shared: tuple[Tensor, Tensor, Tensor] | None = None
        self._stored: Tensor | None = None  # uint8 codes, kept for as long
        self._sharing = False

    def _reduce(self, w: Tensor, how: str) -> Tensor:
        """max or mean of a non-negative `w` over the tensor or per output channel, broadcastable to `w`."""
        if not self.normalizer.endswith("_channel"):
            return w.amax() if how == "max" else w.mean()
        view, dims = _channel_view(w, self.channel_dim, self.groups)
        out = view.amax(dims, keepdim=True) if how == "max" else view.mean(dims, keepdim=True)
        if self.channel_dim == 0:
            return out
        return out.expand(-1, view.shape[1], *(-1,) * (out.dim() - 2)).flatten(0, 1)

    def _scale(self, w: Tensor) -> Tensor:
        """E = mean |w|, no gradient; also where the tensor is checked, since a NaN or an infinity shows in the mean."""
        magnitude = w.detach().abs()
        scale = self._reduce(magnitude, "mean")
        if (
            torch.compiler.is_compiling()
        ):  # a graph does not branch on values: a NaN goes on and shows in the loss
            return torch.where(torch.isfinite(scale), scale, self._huge_mean(magnitude))
        if not torch.isfinite(scale).all():
            if not torch.isfinite(magnitude).all():
                raise ValueError(
                    f"weight {self.name} holds NaN or infinity; lower the learning rate or mend the checkpoint"
                )
            scale = self._huge_mean(magnitude)
        return scale

    def _huge_mean(self, magnitude: Tensor) -> Tensor:
        """The mean of a finite weight whose float32 sum overflows: a power of two, taken out and put back, is exact."""
        return self._reduce(magnitude * 2.0**-64, "mean") * 2.0**64

    def normalise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The normaliser: u = t / (2 max|t|) + 1/2 with t = tanh(w) or w, and the scale E = mean|w|.

        Args:
            w: float weight, any shape; computed in float32 whatever its dtype.

        Returns:
            u: float32 in [0, 1], shape of `w`; its gradient runs to `w` through t, not through the maximum.
            scale: float32, broadcastable to `w`, without gradient.

        Raises:
            ValueError: `w` holds NaN or infinity; the message names the layer.
        """
        u, scale, _ = self._normalise(w)
        return u, scale

    def _normalise(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w = w.float()
        scale = self._scale(w)
        t = torch.tanh(w) if self.normalizer.startswith("tanh") else w
        # twice a maximum near 3e38 would overflow, so the half is taken first; clamped for the all-zero weight
        top = self._reduce(t.detach().abs(), "max").clamp_min(_TINY)
        return (t * 0.5 / top).add(0.5), scale, top

    def _normalised(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if not self._sharing:
            return self.normalise(w)
        if self._shared is None:
            self._shared = self._normalise(w.detach())
        u, scale, _ = self._shared
        if w.requires_grad and torch.is_grad_enabled() and not u.requires_grad:
            u.requires_grad_()  # also where a pass without gradients came first
        return u, scale

    def normaliser_grad(self, grad_u: Tensor) -> Tensor:
        """Carries dL/du of the shared leaf to dL/dw, in place of `grad_u`; float32, its shape.

        du/dw is (1 - t^2) / (2 max|t|) with t = tanh(w), or 1 / (2 max|w|) for absmax: the maximum carries no gradient.
        """
        assert self._shared is not None
        u, _, top = self._shared
        if self.normalizer.startswith("tanh"):
            t = u.detach().sub(0.5).mul_(2.0).mul_(top)
            grad_u.mul_(t.square_().neg_().add_(1.0))
        return grad_u.mul_(0.5).div_(top)

    def codes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Stored codes of `w`: (uint8 codes of width max_bits, shape of `w`; scale, float32, broadcastable)."""
        with torch.no_grad():
            u, scale = self._normalised(w)
            return QUANTIZERS[self.quantizer](u, self.width.max_bits), scale

    def forward(self, w: Tensor) -> Tensor:
        """`w` at the width in use, in the dtype of `w`; `w` itself where that is float."""
        bits = self.width.bits
        if bits is None:
            return w
        u, scale = self._normalised(w)
        if torch.is_grad_enabled() and u.requires_grad:
            out = FakeQuantize.apply(
                u,
                scale,
                True,
                bits,
                self.quantizer,
                self.ste,
                self.level,
                self.width.max_bits,
                self.width.source,
            )
        else:
            out = dequantize(self._codes_at(u, bits), bits, scale, self.level)
        return out.to(w.dtype)

    def _codes_at(self, u: Tensor, bits: int) -> Tensor:
        """Codes of `u` at a width; in an evaluation of many widths the stored codes are made once and only shifted."""
        if not self._sharing or self.width.source != "truncate":
            return width_codes(u, bits, self.quantizer, self.width.max_bits, self.width.source)
        if self._stored is None:
            self._stored = QUANTIZERS[self.quantizer](u, self.width.max_bits)
        return truncate_codes(self._stored, self.width.max_bits, bits)

    def extra_repr(self) -> str:
        return f"{self.quantizer}, ste={self.ste}, level={self.level}, normalizer={self.normalizer}"


def weight_quantizers(model: nn.Module) -> list[tuple[str, nn.Module, str, WeightQuantizer]]:
    """All attached weight quantizers: (full tensor name, owning module, tensor name in it, quantizer), in model order."""
    found = []
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for tensor_name, chain in module.parametrizations.items():  # type: ignore[union-attr]
            for p in chain:
                if isinstance(p, WeightQuantizer):
                    found.append(
                        (f"{name}.{tensor_name}" if name else tensor_name, module, tensor_name, p)
                    )
    return found


def original(module: nn.Module, tensor_name: str) -> Tensor:
    """The float parameter behind a quantized tensor."""
    return module.parametrizations[tensor_name].original  # type: ignore[index,union-attr]


@contextmanager
def shared_normalisation(model: nn.Module) -> Iterator[list[tuple[WeightQuantizer, Tensor]]]:
    """Normalises each weight once for all passes inside the block: the weights must not change in it.

    The normaliser knows no width, so a joint step over K widths, or an evaluation of many, needs it once. Inside, `u` is a
    leaf: gradients of all passes meet there, and `WeightQuantizer.normaliser_grad` carries their sum to the weight. A block
    inside another one of the same model shares with it.

    Yields:
        (quantizer, its float parameter) for every quantized tensor, in model order.
    """
    pairs = [
        (q, original(module, tensor_name)) for _, module, tensor_name, q in weight_quantizers(model)
    ]
    if any(q._sharing for q, _ in pairs):
        yield pairs
        return
    for q, _ in pairs:
        q._sharing, q._shared, q._stored = True, None, None
    try:
        yield pairs
    finally:
        for q, _ in pairs:
            q._sharing, q._shared, q._stored = False, None, None
