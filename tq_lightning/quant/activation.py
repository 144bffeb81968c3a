"""ActivationQuantizer: replaces a ReLU, clips to [0, clip] and quantizes at the width in use."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import codes_to_levels
from tq_lightning.quant.fake_quantize import FakeQuantize, FakeQuantizeTensors, width_codes
from tq_lightning.quant.ste import resolve_ste

PACT_START = 6.0  # initial value of a learned clip, the clip of ReLU6
PACT_LEAST = 1e-3  # a clip at or below zero would never recover


class Activation(NamedTuple):
    """A row of `ACTIVATIONS`.

    Attributes:
        learned: learn the clip (PACT) instead of fixing it at 1.
        quantizer: a key of `codes.QUANTIZERS`.
        truncated: follow the source "truncate", as the weights do.
    """

    learned: bool
    quantizer: str
    truncated: bool


ACTIVATIONS: dict[str, Activation] = {
    "clamp_round": Activation(False, "round", False),
    "clamp_floor": Activation(False, "floor", False),
    "clamp_round_truncate": Activation(False, "round", True),
    "clamp_floor_truncate": Activation(False, "floor", True),
    "pact_round": Activation(True, "round", False),
    "pact_floor": Activation(True, "floor", False),
    "pact_round_truncate": Activation(True, "round", True),
    "pact_floor_truncate": Activation(True, "floor", True),
}


class ActivationQuantizer(nn.Module):
    """Replace a ReLU by y = clip * level(code(u)), with u = x / clip clamped to [0, 1].

    The computation is in float32; the output has the dtype of the input. `clamp_*` fixes the clip
    at 1 (DoReFa, arXiv 1606.06160; Any-Precision, arXiv 1911.07346). `pact_*` learns it: dy/dclip
    is 1 if x >= clip, else 0 (PACT, arXiv 1805.06085, eq. 3), for every straight-through rule,
    because a rule only affects dy/dx. Codes are computed at the width in use. With `*_truncate` and
    the source "truncate", they are computed at max_bits and shifted. Levels are endpoint levels, so
    that 0 stays 0 and 1 stays 1.

    Args:
        kind: a key of `ACTIVATIONS`.
        width: the model's shared `Width`.
        ste: as in `prepare`; "auto" pairs with the quantizer of the activations.
        float_relu: apply a plain ReLU at float width. A learned clip is applied at every width.

    Raises:
        ValueError: an unknown `kind` or `ste`.
    """

    def __init__(
        self, kind: str, width: Width, ste: str = "auto", float_relu: bool = False
    ) -> None:
        super().__init__()
        if kind not in ACTIVATIONS:
            raise ValueError(
                f"unknown activations {kind!r}; pass null or one of {', '.join(ACTIVATIONS)}"
            )
        self.learned, self.quantizer, self.truncated = ACTIVATIONS[kind]
        self.float_relu = float_relu and not self.learned
        self.kind, self.width, self.ste = kind, width, resolve_ste(ste, self.quantizer)
        self.clip: nn.Parameter | Tensor
        if self.learned:
            self.clip = nn.Parameter(torch.tensor(PACT_START))
        else:
            self.register_buffer("clip", torch.tensor(1.0), persistent=False)

    @property
    def effective_clip(self) -> Tensor:
        """The clip in use: a float32 scalar without gradient, at least `PACT_LEAST` if learned."""
        clip = self.clip.detach().float()
        return clip.clamp_min(PACT_LEAST) if self.learned else clip

    def forward(self, input: Tensor) -> Tensor:  # named as in `nn.ReLU`, which it replaces
        """Clip and quantize `input` (any shape and float dtype); at float width, clip only."""
        inside, scale = input.float(), self.effective_clip
        if self.learned:
            over = inside >= scale
            # no gradient to x beyond the clip, and none to the clip through the quantizer
            inside = inside.masked_fill(over, 0.0)
            u = (inside / scale).clamp_min(0.0).masked_fill(over, 1.0)
        else:
            u = inside.clamp(0.0, 1.0)
        # `masked_fill` with a tensor as value would wait for a GPU
        clipped = torch.where(over, scale, inside.clamp_min(0.0)) if self.learned else u
        if self.float_relu:
            clipped = inside.relu()
        if torch.compiler.is_compiling() and self.width.tensors is not None:
            out = self._at_any_width(u, scale, clipped)
        else:
            out = self._at_width_in_use(u, scale, clipped)
        if self.learned and torch.is_grad_enabled():
            out = out + over * (self.clip - self.clip.detach())  # adds 0, and the clip's gradient
        return out.to(input.dtype)

    def _at_width_in_use(self, u: Tensor, scale: Tensor, clipped: Tensor) -> Tensor:
        bits, max_bits = self.width.bits, self.width.max_bits
        source = self.width.source if self.truncated else "quantize"
        if bits is None:
            return clipped
        if torch.is_grad_enabled() and u.requires_grad:
            # Codes cannot hold NaN. Without this term a network that diverges before this layer
            # would keep training with a finite loss.
            scale = scale + 0.0 * u.detach().sum()
            return FakeQuantize.apply(
                u, scale, False, bits, self.quantizer, self.ste, "endpoint", max_bits, source
            )
        codes = width_codes(u, bits, self.quantizer, max_bits, source)
        return codes_to_levels(codes, bits).mul_(scale)

    def _at_any_width(self, u: Tensor, scale: Tensor, clipped: Tensor) -> Tensor:
        # do not read `bits` or `source` here: the graph would be compiled once for each value
        width = self.width.tensors
        assert width is not None
        stored = (width.stored_top, width.step) if self.truncated else (None, None)
        quantized = FakeQuantizeTensors.apply(
            u, scale, width.bits, width.top, *stored, self.quantizer, self.ste
        )
        return torch.where(width.is_float, clipped, quantized)

    def extra_repr(self) -> str:
        """Describe the quantizer in the printed model."""
        return f"{self.kind}, ste={self.ste}"
