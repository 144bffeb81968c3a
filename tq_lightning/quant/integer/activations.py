"""Activation codes (uint8): their step at each width, and modules that quantize and dequantize."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.activation_ranges import ActivationRange
from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import QUANTIZERS
from tq_lightning.quant.fake_quantize import width_codes
from tq_lightning.quant.integer.saturation import activation_top


class CodeParams(NamedTuple):
    """Parameters of codes at one width: x = step * (code - zero), code in [0, top].

    A kernel computes them as round(x / make_step + zero + make_offset), clamps them to
    [0, make_top] and shifts them right by `shift`. The steps to make and to read codes differ only
    for trained quantizers: `floor` codes have bins of clip / 2^n and an offset of half a bin, and
    truncated codes are computed at the stored width.
    """

    step: float
    zero: int
    top: int
    make_step: float
    make_offset: float
    make_top: int
    shift: int

    @classmethod
    def of_range(cls, span: ActivationRange, top: int) -> "CodeParams":
        """Return the parameters of evenly spaced codes in [0, top] that span a range."""
        step, zero = span.step(top)
        return cls(step, zero, top, step, 0.0, top, 0)


class CalibratedCodes:
    """Codes of a calibrated range: 8 bits at every width, or 7 bits if sums could saturate.

    Args:
        span: the range.
        level: level of the weights.
        exact_sums: see `saturation.activation_top`.
    """

    def __init__(self, span: ActivationRange, level: str, exact_sums: bool) -> None:
        self.span, self.level, self.exact_sums = span, level, exact_sums
        self.signed = span.low < 0

    def at(self, width: Width) -> CodeParams:
        """Return the parameters at the width in use."""
        assert width.bits is not None
        top = activation_top(width.bits, self.level, self.exact_sums)
        return CodeParams.of_range(self.span, top)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CalibratedCodes) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]


def rounding_of(quantizer: str, bits: int) -> tuple[int, float]:
    """Return the steps and the offset of a quantizer in the form that integer kernels compute.

    Args:
        quantizer: a key of `QUANTIZERS`.
        bits: width n, 1..8.

    Returns:
        (steps, offset): code = round(steps * u + offset), clamped to [0, 2^n - 1]. Ties may differ.

    Raises:
        ValueError: the quantizer has no such form.

    Example:
        At 2 bits `floor` is round(4 u - 1/2) and `round` is round(3 u).
    """
    form = QUANTIZERS[quantizer].rounding
    if form is None:
        known = [name for name, row in QUANTIZERS.items() if row.rounding is not None]
        raise ValueError(
            f"quantizer {quantizer!r} has no rounding form for integer kernels; "
            f"pass activations quantized by {' or '.join(known)}"
        )
    extra, offset = form
    return 2**bits - 1 + extra, offset


class TrainedCodes:
    """Codes of an `ActivationQuantizer`: n bits at width n, clipped before they are quantized."""

    signed = False

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer

    def at(self, width: Width) -> CodeParams:
        """Return the parameters at the width in use."""
        rule, bits = self.quantizer, width.bits
        assert bits is not None
        clip = float(rule.effective_clip)
        shifted = rule.truncated and width.source == "truncate"
        made = width.max_bits if shifted else bits
        steps, offset = rounding_of(rule.quantizer, made)
        top = 2**bits - 1
        return CodeParams(clip / top, 0, top, clip / steps, offset, 2**made - 1, made - bits)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainedCodes) and self.quantizer is other.quantizer

    __hash__ = None  # type: ignore[assignment]


ActivationCodes = CalibratedCodes | TrainedCodes


class _WithCodes(nn.Module):
    """Module that makes or reads codes.

    Args:
        codes: the codes.
        width: the model's shared `Width`, which selects their step.
    """

    def __init__(self, codes: ActivationCodes, width: Width) -> None:
        super().__init__()
        self.codes, self.width = codes, width


class Quantize(_WithCodes):
    """Quantize a float tensor of any shape to codes."""

    def forward(self, x: Tensor) -> Tensor:
        """Return uint8 codes, shape of `x`."""
        if isinstance(self.codes, TrainedCodes):  # bit-identical to ActivationQuantizer
            rule, width = self.codes.quantizer, self.width
            assert width.bits is not None
            source = width.source if rule.truncated else "quantize"
            u = (x.float() / rule.effective_clip).clamp_(0.0, 1.0)
            return width_codes(u, width.bits, rule.quantizer, width.max_bits, source)
        at = self.codes.at(self.width)
        scaled = x.float().mul(1.0 / at.step)
        if at.zero:
            scaled.add_(at.zero)
        return scaled.round_().clamp_(0, at.top).to(torch.uint8)


class Dequantize(_WithCodes):
    """Dequantize codes to float32: step * (code - zero)."""

    def forward(self, a: Tensor) -> Tensor:
        """Return float32 values, shape of `a`."""
        at = self.codes.at(self.width)
        x = a.float()
        return x.sub_(at.zero).mul_(at.step) if at.zero else x.mul_(at.step)
