"""Fused weights: compute all weights of a width together, in a few calls.

A joint step over K widths, or an evaluation of many, needs every weight at every width. Layer by
layer, this takes a dozen small operations per layer and width. Here, the weights of a width are
computed in flat buffers (`FlatWeights`), the per-width norms select their copy, and the activation
quantizers get the width as tensors. The network then runs the operations of the float network on
these tensors for every width and source, so `torch.compile` builds one graph for all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tq_lightning.quant.activation import ActivationQuantizer, WidthTensors
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.flat_weights import FlatWeights
from tq_lightning.quant.quantized_tensors import QuantizedTensor, weight_quantizers
from tq_lightning.quant.switchable_norm import per_width_norms


class FusedModel:
    """The fused weights of a model: one `FlatWeights` per device and choice of quantizer.

    Args:
        model: A prepared model.
        check: Check once, when the weights are normalized, that all of them are finite, which
            synchronizes with the device. If False, the caller reads `finite` later.
    """

    def __init__(self, model: nn.Module, check: bool = True) -> None:
        groups: dict[tuple, list[QuantizedTensor]] = {}
        for w in weight_quantizers(model):
            q = w.quantizer
            learned = q.range is not None
            key = (w.original.device, q.quantizer, q.ste, q.level, q.normalizer, q.scale, learned)
            groups.setdefault(key, []).append(w)
        self.groups = [FlatWeights(group) for group in groups.values()]
        self.check = check
        self.width = width_of(model)
        self.norms = per_width_norms(model)
        clips = [m.clip for m in model.modules() if isinstance(m, ActivationQuantizer)]
        self.tensors = WidthTensors.empty(clips[0].device) if clips else None

    def make(self, bits: int | None, source: str) -> None:
        """Compute the weights of a width, and select its norms; see `FlatWeights.make`.

        Raises:
            ValueError: `check` is True and a weight contains NaN or infinity.
        """
        for group in self.groups:
            fresh = group.make(bits, source)
            if fresh and self.check:
                group.check()
        for norm in self.norms:
            norm.select(bits)
        if self.tensors is not None:
            self.tensors.fill(bits, source, self.width.max_bits)
            self.width.tensors = self.tensors

    def release(self) -> None:
        """Let each layer compute its own weight again."""
        for group in self.groups:
            group.release()
        for norm in self.norms:
            norm.unselect()
        self.width.tensors = None


@contextmanager
def fused_weights(model: nn.Module, check: bool = True) -> Iterator[FusedModel]:
    """Compute the weights of each width in a few calls; no weight may change inside the block.

    Entering `bit_width` computes them. A block inside another one of the same model shares its
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
