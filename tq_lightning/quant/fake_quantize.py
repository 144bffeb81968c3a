"""TODO quant/fake_quantize.py."""

import torch
from torch import Tensor

from tq_lightning.quant.codes import QUANTIZERS, codes_to_levels, dequantize, truncate_codes
from tq_lightning.quant.ste import ELEMENTWISE, STES


def width_codes(u: Tensor, bits: int, quantizer: str, max_bits: int, source: str) -> Tensor:
    """Codes of `u` at a width: from `u` itself (source "quantize"), or its stored codes shifted (source "truncate").

    Args:
        u: float32 in [0, 1], any shape.
        bits: width in use; max_bits: stored width; quantizer: a key of `QUANTIZERS`; source: "quantize" or "truncate".

    Returns:
        uint8 codes of width `bits`, of the shape of `u`. "quantize" never passes through codes of another width.
    """
    if source == "truncate":
        return truncate_codes(QUANTIZERS[quantizer](u, max_bits), max_bits, bits)
    return QUANTIZERS[quantizer](u, bits)


class FakeQuantize(torch.autograd.Function):
    """u -> fake-quantized value with the straight-through gradient of `ste`; one node, so that little is kept.

    forward(u, scale, signed, bits, quantizer, ste, level, max_bits, source): `u` float32 in [0, 1], any shape; `scale`
    float32, broadcastable to it, without gradient. Returns float32 of the shape of `u`: scale * (2 level - 1) where
    `signed` (weights, the same `dequantize` that a packed file is read with), else scale * level (activations).
    """

    @staticmethod
    def forward(ctx, u, scale, signed, bits, quantizer, ste, level, max_bits, source):  # type: ignore[no-untyped-def]
        codes = width_codes(u, bits, quantizer, max_bits, source)
        kept = (u, codes) if ste in ELEMENTWISE else (None, None)
        ctx.save_for_backward(scale, *kept)
        ctx.rule = (signed, bits, quantizer, ste, level)
        return (
            dequantize(codes, bits, scale, level)
            if signed
            else codes_to_levels(codes, bits, level).mul_(scale)
        )

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        scale, u, codes = ctx.saved_tensors
        signed, bits, quantizer, ste, level = ctx.rule
        levels = None if codes is None else codes_to_levels(codes, bits, level)
        grad_level = grad * (2.0 * scale if signed else scale)
        grad_u = STES[ste](grad_level, u, levels, bits, quantizer)
        return grad_u, None, None, None, None, None, None, None, None
