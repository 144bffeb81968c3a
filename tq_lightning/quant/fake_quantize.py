"""Fake quantization: the autograd function that joins codes and a straight-through estimator."""

import torch
from torch import Tensor

from tq_lightning.quant.codes import (
    LEVELS,
    QUANTIZERS,
    codes_to_levels,
    dequantize,
    truncate_codes,
)
from tq_lightning.quant.ste import STES


def width_codes(u: Tensor, bits: int, quantizer: str, max_bits: int, source: str) -> Tensor:
    """Quantize `u` at a width, or quantize it at the stored width and truncate.

    Args:
        u: float32 in [0, 1], any shape.
        bits: width of the result.
        quantizer: a key of `QUANTIZERS`.
        max_bits: stored width.
        source: "quantize" computes codes at `bits` directly; "truncate" shifts codes computed at
            `max_bits`.

    Returns:
        uint8 codes of width `bits`, shape of `u`.
    """
    if source == "truncate":
        return truncate_codes(QUANTIZERS[quantizer].codes(u, max_bits), max_bits, bits)
    return QUANTIZERS[quantizer].codes(u, bits)


class FakeQuantize(torch.autograd.Function):
    """Fake-quantize `u` with the straight-through gradient of `ste`.

    It is a single autograd node, so that the forward pass saves only tensors that the rule reads.

    forward(u, scale, signed, bits, quantizer, ste, level, max_bits, source, table=None): `u` is
    float32 in [0, 1], any shape; `scale` is float32, broadcastable to it; `table` holds the levels,
    see `codes_to_levels`. Returns float32 of the shape of `u`: scale * (2 level - 1) if `signed`
    (weights; the same `dequantize` reads packed files), else scale * level (activations). The scale
    of weights gets a gradient if it requires one (the `scale_rule` of the STE); that of activations
    never does.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, u, scale, signed, bits, quantizer, ste, level, max_bits, source, table=None
    ):
        """Return the fake-quantized values of `u`."""
        codes = width_codes(u, bits, quantizer, max_bits, source)
        kept = (u, codes) if STES[ste].elementwise or scale.requires_grad else (None, None)
        ctx.save_for_backward(scale, *kept, table)
        ctx.rule = (signed, bits, quantizer, ste, level)
        if signed:
            return dequantize(codes, bits, scale, level, table=table)
        return codes_to_levels(codes, bits, level).mul_(scale)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Return the straight-through gradients of `u` and of a learned scale."""
        scale, u, codes, table = ctx.saved_tensors
        signed, bits, quantizer, ste, level = ctx.rule
        levels = None
        if codes is not None:
            levels = codes_to_levels(codes, bits, level, table=table)
        grad_level = grad * (2.0 * scale if signed else scale)
        grad_u = STES[ste].rule(grad_level, u, levels, bits, quantizer)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            each = STES[ste].scale_rule(grad, grad_u, u, levels, scale, bits, quantizer)
            grad_scale = each.sum_to_size(scale.shape)
        return grad_u, grad_scale, *(None,) * (len(ctx.needs_input_grad) - 2)


class FakeQuantizeTensors(torch.autograd.Function):
    """`FakeQuantize` of activations with the width as tensors, for one graph for all widths.

    forward(u, scale, bits, top, stored_top, step, quantizer, ste): `u` is float32 in [0, 1], any
    shape; `scale` is float32 without gradient. The widths are those of `WidthTensors`;
    `stored_top` and `step` are None for codes that are never truncated. Returns scale * code / top.
    Codes are integers in float32, so that NaN propagates.
    """

    @staticmethod
    def forward(ctx, u, scale, bits, top, stored_top, step, quantizer, ste):  # type: ignore[no-untyped-def]
        """Return the fake-quantized values of `u`."""
        codes = QUANTIZERS[quantizer].float_codes(u, top if stored_top is None else stored_top)
        if step is not None:
            codes = torch.floor(codes / step)
        level = LEVELS["endpoint"](codes, top)
        kept = (u, level) if STES[ste].elementwise else (None, None)
        ctx.save_for_backward(scale, bits, *kept)
        ctx.rule = (quantizer, ste)
        return level * scale

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Return the straight-through gradient of `u`."""
        scale, bits, u, level = ctx.saved_tensors
        quantizer, ste = ctx.rule
        grad_u = STES[ste].rule(grad * scale, u, level, bits, quantizer)
        return grad_u, None, None, None, None, None, None, None
