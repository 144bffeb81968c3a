"""How often quantized and truncated weight codes differ."""

import torch
from torch import nn

from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.codes import QUANTIZERS, truncate_codes
from tq_lightning.quant.quantized_tensors import weight_quantizers


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
