"""Read the stored codes of a weight from a prepared or a packed model."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import QUANTIZERS, truncate_codes
from tq_lightning.quant.weight import WeightQuantizer


class StoredWeight(NamedTuple):
    """Stored codes of a weight.

    Attributes:
        codes: uint8, shape of the weight.
        stored: their width.
        scale: float32, broadcastable to the weight.
        level: a key of `codes.LEVELS`.
    """

    codes: Tensor
    stored: int
    scale: Tensor
    level: str


def stored_weight(layer: nn.Module) -> StoredWeight:
    """Read the codes of a quantized layer of a prepared or packed model."""
    chain: Any = layer.parametrizations["weight"]  # type: ignore[index]
    rule = chain[0]
    if isinstance(rule, WeightQuantizer):
        codes, scale = rule.codes(chain.original)
        return StoredWeight(codes, rule.width.max_bits, scale, rule.level)
    return StoredWeight(chain.original, rule.stored, rule.scale.float(), rule.level)


def codes_at(layer: nn.Module, width: Width) -> Tensor:
    """Return the codes of a quantized layer at the width and source in use, uint8.

    Only a prepared model has the source "quantize": its codes are computed from the float weight.
    """
    assert width.bits is not None
    chain: Any = layer.parametrizations["weight"]  # type: ignore[index]
    rule = chain[0]
    if isinstance(rule, WeightQuantizer) and width.source == "quantize":
        return QUANTIZERS[rule.quantizer].codes(rule.normalize(chain.original).u, width.bits)
    weight = stored_weight(layer)
    return truncate_codes(weight.codes, weight.stored, width.bits)
