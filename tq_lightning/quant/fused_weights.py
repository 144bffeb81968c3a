"""Fused weights: all quantized weights of a model at one width, made together in a few calls.

A joint step over K widths, or an evaluation of many, needs every weight at every width. Layer by
layer that is a dozen small operations per layer and width. Here the weights lie in flat buffers
(`FlatWeights`). The layers read tensors that share their memory, so the network itself runs the
operations of the float network.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.flat_weights import FlatWeights
from tq_lightning.quant.weight import QuantizedTensor, weight_quantizers


class FusedModel:
    """The fused weights of a model: one `FlatWeights` per device and choice of quantizer.

    Args:
        model: A prepared model.
        check: Read back once, when the weights are normalized, whether all of them are finite. If
            False, the caller reads `finite` when it suits.
    """

    def __init__(self, model: nn.Module, check: bool = True) -> None:
        groups: dict[tuple, list[QuantizedTensor]] = {}
        for w in weight_quantizers(model):
            q = w.quantizer
            learned = q.range is not None
            key = (w.original.device, q.quantizer, q.ste, q.level, q.normalizer, learned)
            groups.setdefault(key, []).append(w)
        self.groups = [FlatWeights(group) for group in groups.values()]
        self.check = check

    def make(self, bits: int | None, source: str) -> None:
        """Make the weights of a width; see `FlatWeights.make`.

        Raises:
            ValueError: `check` is True and a weight contains NaN or infinity.
        """
        for group in self.groups:
            fresh = group.make(bits, source)
            if fresh and self.check:
                group.check()

    def release(self) -> None:
        """Let the layers make their weights on their own again."""
        for group in self.groups:
            group.release()


@contextmanager
def fused_weights(model: nn.Module, check: bool = True) -> Iterator[FusedModel]:
    """Make the weights of each width in a few calls; no weight may change inside the block.

    `bit_width` makes them as it is entered. A block inside another one of the same model shares its
    normalized weights.

    Args:
        model: A prepared or packed model.
        check: As in `FusedModel`.

    Yields:
        The fused weights.

    Raises:
        ValueError: The model is not prepared.
    """
    width = width_of(model)
    if width.fused is not None:
        yield width.fused
        return
    width.fused = FusedModel(model, check)
    try:
        yield width.fused
    finally:
        width.fused.release()
        width.fused = None
