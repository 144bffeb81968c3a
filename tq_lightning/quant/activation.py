"""ActivationQuantizer: takes the place of a ReLU; clips to [0, clip] and quantizes at the width in use."""

import torch
from torch import Tensor, nn

from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import codes_to_levels
from tq_lightning.quant.fake_quantize import FakeQuantize, width_codes
from tq_lightning.quant.ste import resolve_ste

# name -> (learned clip?, quantizer, truncated as the weights are?)
ACTIVATIONS: dict[str, tuple[bool, str, bool]] = {
    "clamp_round": (False, "round", False),
    "clamp_floor": (False, "floor", False),
    "clamp_round_truncate": (False, "round", True),
    "clamp_floor_truncate": (False, "floor", True),
    "pact_round": (True, "round", False),
    "pact_floor": (True, "floor", False),
    "pact_round_truncate": (True, "round", True),
    "pact_floor_truncate": (True, "floor", True),
}
PACT_START = 6.0  # where ReLU6 clips; the clip is learned from there
PACT_LEAST = 1e-3  # a clip at or below zero would silence the layer for good


class ActivationQuantizer(nn.Module):
    """y = clip * level(code(x clipped to [0, clip] / clip)), in float32 inside, in the dtype of `x` outside.

    `clamp_*` has clip 1 (DoReFa, arXiv 1606.06160; Any-Precision, arXiv 1911.07346); `pact_*` learns it: dy/dclip is 1
    where x >= clip, else 0 (PACT, arXiv 1805.06085, eq. 3), whatever the straight-through rule, which speaks of dy/dx.
    Codes are made at the width in use; with `*_truncate`, and the source "truncate", they are made at max_bits and
    shifted. Levels are endpoint levels, so that 0 stays 0 and 1 stays 1.

    Args:
        kind: a key of `ACTIVATIONS`.
        width: the model's shared `Width`.
        ste: as in `prepare`; "auto" pairs with the quantizer of the activations.

    Raises:
        ValueError: an unknown kind or ste.
    """

    def __init__(self, kind: str, width: Width, ste: str = "auto") -> None:
        super().__init__()
        if kind not in ACTIVATIONS:
            raise ValueError(
                f"unknown activations {kind!r}; pass null or one of {', '.join(ACTIVATIONS)}"
            )
        self.learned, self.quantizer, self.truncated = ACTIVATIONS[kind]
        self.kind, self.width, self.ste = kind, width, resolve_ste(ste, self.quantizer)
        self.clip: nn.Parameter | Tensor
        if self.learned:
            self.clip = nn.Parameter(torch.tensor(PACT_START))
        else:
            self.register_buffer("clip", torch.tensor(1.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` of any shape and float dtype -> same shape and dtype. At float width it clips and does not quantize."""
        inside, scale = x.float(), self.clip.detach().float()
        if self.learned:
            scale = scale.clamp_min(PACT_LEAST)
            over = inside >= scale
            inside = inside.masked_fill(
                over, 0.0
            )  # no gradient to x out there, none to the clip through the quantizer
            u = (inside / scale).clamp_min(0.0).masked_fill(over, 1.0)
        else:
            u = inside.clamp(0.0, 1.0)
        bits = self.width.bits
        source = self.width.source if self.truncated else "quantize"
        if bits is None:
            out = inside.clamp_min(0.0).masked_fill(over, scale) if self.learned else u
        elif torch.is_grad_enabled() and u.requires_grad:
            # integers know no NaN: a network that has diverged before this layer would train on with a finite loss
            scale = scale + 0.0 * u.detach().sum()
            out = FakeQuantize.apply(
                u,
                scale,
                False,
                bits,
                self.quantizer,
                self.ste,
                "endpoint",
                self.width.max_bits,
                source,
            )
        else:
            codes = width_codes(u, bits, self.quantizer, self.width.max_bits, source)
            out = codes_to_levels(codes, bits).mul_(scale)
        if self.learned and torch.is_grad_enabled():
            out = out + over * (self.clip - self.clip.detach())  # adds 0, and the clip's gradient
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.kind}, ste={self.ste}"
