"""Read the stored codes of a weight from a prepared or a packed model."""

from typing import Any, NamedTuple

from torch import Tensor, nn

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
