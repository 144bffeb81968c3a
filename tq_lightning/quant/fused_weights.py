"""Fused weights: all weights of a model at a width, and their gradients, in a few calls.

A joint step over K widths, or an evaluation of many, needs every weight at every width. Layer by
layer, this takes a dozen small operations per layer and width. Here, the functions of `codes.py`
and `ste.py` run once per width on a flat buffer of normalized weights (`FlatWeights`), and the
layers read tensors that share the memory of the result. Values and gradients are bit-identical to
those of `WeightQuantizer`.

The per-width norms select their copy, and the activation quantizers get the width as tensors. The
network then runs the operations of the float network on these tensors for every width and source,
so `torch.compile` builds one graph for all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.bit_width import WidthSwitch, WidthTensors, walk_modules
from tq_lightning.quant.codes import QUANTIZERS, codes_to_levels, dequantize, truncate_codes
from tq_lightning.quant.flat_normalizer import FlatNormalizer
from tq_lightning.quant.level_tables import level_table
from tq_lightning.quant.quantized_tensors import QuantizedTensor, weight_quantizers_of
from tq_lightning.quant.ste import STES
from tq_lightning.quant.switchable_norm import PerWidthNorm, SelectedNorms
from tq_lightning.quant.trained_parameters import TrainedParameters, parameter_slots
from tq_lightning.quant.unparametrized_layers import UnparametrizedLayers
from tq_lightning.quant.weight import WeightQuantizer


class FlatWeights(FlatNormalizer):
    """The quantized weights of a model that share their quantizer, normalizer, level and STE.

    Args:
        weights: weights on one device. They must not change while this object is in use.
    """

    def __init__(self, weights: Sequence[QuantizedTensor]) -> None:
        super().__init__(weights)
        self._trained = [
            i
            for i, w in enumerate(self.originals)
            if w.requires_grad or (self.ranges and self.ranges[i].requires_grad)
        ]
        self._quantizer_row = QUANTIZERS[self.choices.quantizer]
        self._ste = STES[self.choices.ste]
        self._per_element = self._ste.elementwise or bool(self.ranges)  # the rule reads u and level
        self.leaves: list[Tensor] = []  # the weights in use that get a gradient
        self.start()

    def start(self) -> None:
        """Forget the values of a step, but keep the memory of `tensors`."""
        for leaf in self.leaves:
            leaf.requires_grad_(False)
            leaf.grad = None
        for name in ("_scale", "_grad_divisor", "_top", "_rms", "_table"):
            self.__dict__.pop(name, None)
        self.finite = self._u = None
        self.bits: int | None = None  # width of the weights in `tensors`
        self.leaves = []
        self._stored: Tensor | None = None  # codes at max_bits
        self._codes_in_use: Tensor | None = None
        self._grad_sum: Tensor | None = None  # dL/du, summed over the widths
        self._float_grads: dict[int, Tensor] = {}
        self._range_sums: list[Tensor] = []
        self._has_grad = [False] * len(self._trained)

    @torch.no_grad()
    def compute(self, bits: int | None, source: str) -> bool:
        """Write the weights of a width to `tensors`, which the layers read; None = float weights.

        Returns:
            True if the weights were normalized by this call.
        """
        if not self.tensors:
            self._allocate()
        self.bits = bits
        normalized = bits is not None or self.choices.float_pass == "normalized"
        fresh = normalized and self.finite is None
        if fresh:
            self.normalize()
        if not normalized:
            torch._foreach_copy_(self.tensors, self.originals)
        elif bits is None:
            torch.sub(self._unit(), 0.5, out=self._buffer).mul_(2.0 * self._scale)
        else:
            codes = self._codes(bits, source)
            self._table = level_table(
                self.choices.level, self.choices.normalizer, bits, self.device
            )
            dequantize(
                codes, bits, self._scale, self.choices.level, out=self._buffer, table=self._table
            )
            self._codes_in_use = codes if self._per_element else None
        if torch.is_autocast_enabled(self.device.type):
            torch.clear_autocast_cache()  # its keys are tensors, which do not change here
        if self.weights[0].quantizer.fused_weight is not self.tensors[0]:  # not held
            for w, weight in zip(self.weights, self.tensors, strict=True):
                w.quantizer.__dict__["fused_weight"] = weight  # `Module.__setattr__` is slow
        return fresh

    def _codes(self, bits: int, source: str) -> Tensor:
        max_bits = self.choices.width.max_bits
        if source != "truncate" and not self._quantizer_row.nested:
            return self._quantizer_row.codes(self._unit(), bits)
        if self._stored is None:
            self._stored = self._quantizer_row.codes(self._unit(), max_bits)
            if not self._per_element:
                self._u = None  # codes take a quarter of the memory; `_backward` recomputes u
        return truncate_codes(self._stored, max_bits, bits)

    def release(self) -> None:
        """Let each layer compute its own weight again."""
        for w in self.weights:
            w.quantizer.__dict__["fused_weight"] = None

    def require_grad(self) -> None:
        """Make the weights in training `leaves` of autograd."""
        if not self.leaves:
            self.leaves = [self.tensors[i].requires_grad_() for i in self._trained]

    @torch.no_grad()
    def add_grads(self, grads: Sequence[Tensor | None]) -> None:
        """Add the gradients of a width: dL/dleaf for each of `leaves`, None if it was not used.

        The straight-through rule of the width is applied here, once for all weights. It reuses the
        memory of the weights, which are no longer needed.
        """
        if all(g is None for g in grads):
            return
        if self.bits is None and self.choices.float_pass == "plain":
            pairs = zip(self._trained, grads, strict=True)
            self._float_grads = {i: g for i, g in pairs if g is not None}
            return
        present = [i for i, g in enumerate(grads) if g is not None]
        for i in present:
            self._has_grad[i] = True
        if len(present) < len(self.weights):
            self._buffer.zero_()
        torch._foreach_copy_(
            [self.tensors[self._trained[i]] for i in present],
            [g for g in grads if g is not None],
        )
        grad, slope = self._buffer, 2.0 * self._scale  # slope of the weight over its level
        if self.bits is None:
            self._add(grad.mul_(slope))
            return
        level = None
        if self._codes_in_use is not None:
            level = codes_to_levels(
                self._codes_in_use, self.bits, self.choices.level, table=self._table
            )
        grad_level = grad * slope if self.ranges else grad.mul_(slope)
        grad_u = self._ste.rule(
            grad_level,
            self._u,  # type: ignore[arg-type]  # only rules per element read it, and the level
            level,  # type: ignore[arg-type]
            self.bits,
            self.choices.quantizer,
        )
        if self.ranges:
            assert self._u is not None and level is not None
            args = (self._u, level, self._scale, self.bits, self.choices.quantizer)
            self._add_range_grads(self._ste.scale_rule(grad, grad_u, *args))
        self._add(grad_u)

    def _add(self, grad_u: Tensor) -> None:
        if self._grad_sum is not None:
            self._grad_sum.add_(grad_u)
        else:
            self._grad_sum = grad_u.clone() if grad_u is self._buffer else grad_u

    @torch.no_grad()
    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Return pairs (parameter, gradient), summed over the widths; this ends the step.

        The parameters are the weights and learned ranges that were used.
        """
        summed: list[Tensor] = []
        if self._grad_sum is not None:
            self._backward(self._grad_sum)
            summed = self._views(self._grad_sum)
        pairs: list[tuple[Tensor, Tensor]] = []
        for i, has in zip(self._trained, self._has_grad, strict=True):
            if i in self._float_grads:
                plain = self._float_grads[i]
                pairs.append((self.originals[i], plain.add_(summed[i]) if has else plain))
            elif has:
                pairs.append((self.originals[i], summed[i]))
            if has and self.ranges:
                pairs.append((self.ranges[i], self._range_sums[i]))
        self.start()
        return [(p, g.to(p.dtype)) for p, g in pairs if p.requires_grad]


def _group_key(original: Tensor, q: WeightQuantizer) -> tuple:
    """Return what the weights of a `FlatWeights` have in common."""
    learned = q.range is not None
    return (original.device, q.quantizer, q.ste, q.level, q.normalizer, q.scale_kind, learned)


class FusedModel:
    """The fused weights of a model: one `FlatWeights` per device and choice of quantizer.

    Args:
        modules: the modules of a prepared or packed model, from `walk_modules`.
        switch: their width.

    Attributes:
        at: `at(bits, source)` is `bit_width(model, bits, source)`, without listing the modules.
        trained: the parameters that require a gradient.
        depth: number of open blocks of `fused_weights`.
        check: check once, when the weights are normalized, that all of them are finite, which
            synchronizes with the device. If False, the caller reads `finite` later.
    """

    def __init__(self, modules: list[tuple[str, nn.Module]], switch: WidthSwitch) -> None:
        self.width, self.at = switch.width, switch.at
        self.check = True
        weights = weight_quantizers_of(modules)
        groups: dict[tuple, list[QuantizedTensor]] = {}
        for w in weights:
            groups.setdefault(_group_key(w.original, w.quantizer), []).append(w)
        self.groups = [FlatWeights(group) for group in groups.values()]
        self._layers = UnparametrizedLayers(weights)
        self._norms = SelectedNorms([m for _, m in modules if isinstance(m, PerWidthNorm)])
        clips = [m.clip for _, m in modules if isinstance(m, ActivationQuantizer)]
        self.tensors = WidthTensors.empty(clips[0].device) if clips else None
        self._modules = [m for _, m in modules[1:]]  # without the root, which may keep this object
        slots = parameter_slots(modules)
        self._owners = [owner for owner, _, _ in slots]
        self._names = [name for _, name, _ in slots]
        self._parameters = [p for _, _, p in slots]
        self.trained = TrainedParameters(modules)
        self._quantized = [(w.module, w.original, w.quantizer) for w in weights]
        self._state = self._describe()
        self.depth = 0
        self._held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the fused weights in use between the widths of a block, where no layer is called.

        It saves Python time for each layer and width.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self.release()

    def end(self) -> None:
        """End a block: keep nothing but the memory of the weights in use."""
        self.release()
        for group in self.groups:
            group.start()

    def describes(self, model: nn.Module) -> bool:
        """Return True if `model` has the same modules, and parameters as in `is_current`."""
        modules = [m for _, m in walk_modules(model)[1:]]
        same = len(modules) == len(self._modules) and all(map(is_, modules, self._modules))
        return same and self.is_current()

    def is_current(self) -> bool:
        """Return True if no parameter was replaced, moved, frozen or unfrozen.

        It does not list the modules again, so it does not see added or replaced ones.
        """
        in_place = map(dict.get, self._owners, self._names)
        return all(map(is_, in_place, self._parameters)) and self._describe() == self._state

    def _describe(self) -> list[Any]:
        return [
            *map(attrgetter("requires_grad"), self._parameters),
            *((type(layer), p.dtype, *_group_key(p, q)) for layer, p, q in self._quantized),
        ]

    def compute(self, bits: int | None, source: str) -> None:
        """Compute the weights of a width, and select its norms; see `FlatWeights.compute`.

        Raises:
            ValueError: `check` is True and a weight contains NaN or infinity.
        """
        for group in self.groups:
            fresh = group.compute(bits, source)
            if fresh and self.check:
                group.check()
        self._layers.bypass()
        self._norms.select(bits)
        if self.tensors is not None:
            self.tensors.fill(bits, source, self.width.max_bits)
            self.width.tensors = self.tensors

    def release(self) -> None:
        """Let each layer compute its own weight again, except between the widths of `held`."""
        if self._held and self.width.depth == 1:  # not the width of a block inside of another
            return
        self._layers.restore()
        for group in self.groups:
            group.release()
        self._norms.unselect()
        self.width.tensors = None


@contextmanager
def fused_weights(model: nn.Module, check: bool = True, keep: bool = False) -> Iterator[FusedModel]:
    """Compute the weights of each width in a few calls; no weight may change inside the block.

    Entering `bit_width` computes them. A block inside another one of the same model shares its
    normalized weights.

    Args:
        model: a prepared or packed model.
        check: as in `FusedModel`.
        keep: use the `FusedModel` of the last such block if the model has an attribute
            `fused_model` (a `TQModule`). The modules then need not be listed in every step, and the
            weights stay at the same addresses, which CUDA graphs need. The caller ensures that no
            module was replaced since then (`FusedModel.describes`).

    Yields:
        The fused weights.

    Raises:
        ValueError: the model is not prepared.
    """
    owner = model._modules.get("_orig_mod") or model  # of a compiled network
    keep = keep and "fused_model" in owner.__dict__
    kept: FusedModel | None = owner.__dict__["fused_model"] if keep else None
    if kept is not None and (kept.depth or (kept.width.fused is None and kept.is_current())):
        fused = kept
    else:
        modules = walk_modules(model)
        switch = WidthSwitch(modules)
        fused = switch.width.fused or FusedModel(modules, switch)
        if keep and not fused.depth:
            owner.__dict__["fused_model"] = fused
    fused.depth += 1
    try:
        if fused.depth == 1:
            fused.check = check
            fused.width.fused = fused
        yield fused
    finally:
        fused.depth -= 1
        if not fused.depth:
            fused.end()
            fused.width.fused = None
