"""One normalisation layer per width: deep copies of the layer it replaces, chosen by the width in use.

Activation statistics differ so much between widths that shared batch-norm statistics fail (Any-Precision DNNs, arXiv
1911.07346; AdaBits, arXiv 1912.09666). Sets exist for every width and for float; those of the trained widths learn in
training, the others are re-estimated by `calibrate_norms` and are an error before.
"""

import copy
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tq_lightning.quant.bit_width import Width, bit_width, width_of

FLOAT = "none"  # bits=None; "float" is a method of every module and no key of a ModuleDict


def _key(bits: int | None) -> str:
    return FLOAT if bits is None else str(bits)


class PerWidthNorm(nn.Module):
    """Stands where `layer` stood and hands each call to the copy of the width in use.

    Args:
        layer: a normalisation layer (timm's with their activation too).
        width: the model's shared `Width`; its `widths` are the trained ones.
        only: widths to make sets for, for a model that will run at no other; None = all, and float.

    Attributes:
        sets: ModuleDict with keys "1".."max_bits" and `FLOAT`, or of `only`. Parameters of untrained sets carry no gradient.
        calibrated: bool (max_bits + 1,), entry n says that untrained width n has statistics of its own.
    """

    def __init__(self, layer: nn.Module, width: Width, only: Collection[int] | None = None) -> None:
        super().__init__()
        self.width = width
        every: list[int | None] = [*range(1, width.max_bits + 1), None]
        keys = [_key(bits) for bits in every if only is None or bits in only]
        # the memo keeps the shared width shared where the layer holds an activation quantizer
        self.sets = nn.ModuleDict({key: copy.deepcopy(layer, {id(width): width}) for key in keys})
        self.trained = {str(bits) for bits in width.widths}
        for key, norm in self.sets.items():
            if key not in self.trained:
                norm.requires_grad_(False)
        self.register_buffer("calibrated", torch.zeros(width.max_bits + 1, dtype=torch.bool))
        self.calibrating = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.sets[_key(self.width.bits)](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("sets", "width") or name.startswith(
                "__"
            ):  # not built yet (deepcopy, unpickling)
                raise
            key = _key(self.width.bits)
            if key not in self.sets:  # of a width that it was not made for
                raise
            return getattr(self.sets[key], name)

    def check_width(self, bits: int | None) -> None:
        """Raises ValueError where `bits` would run on statistics that belong to no width."""
        key = _key(bits)
        if key in self.trained or self.calibrating or bits is None:
            return
        if self.training:
            raise ValueError(
                f"width {bits} has no trainable norm; train one of {', '.join(sorted(self.trained))}"
            )
        if (
            not self.calibrated[bits] and not self.width.packed
        ):  # there the weights refuse it, and know what was loaded
            raise ValueError(
                f"width {bits} was not trained and has no norm statistics yet; call calibrate_norms(model, batches) first"
            )

    def borrow(self, bits: int | None) -> None:
        """Gives an untrained set the affine parameters of the next wider trained width (the widest for float)."""
        trained = sorted(int(key) for key in self.trained if key != FLOAT)
        donor = next((b for b in trained if bits is not None and b >= bits), trained[-1])
        own = self.sets[_key(bits)]
        own.load_state_dict(self.sets[str(donor)].state_dict())


def per_width_norms(model: nn.Module) -> list[PerWidthNorm]:
    """All `PerWidthNorm` of a model, in model order."""
    return [m for m in model.modules() if isinstance(m, PerWidthNorm)]


def train_float_norms(model: nn.Module) -> None:
    """Makes the float sets trainable: for a joint training that has a float pass."""
    for norm in per_width_norms(model):
        norm.trained.add(FLOAT)
        norm.sets[FLOAT].requires_grad_(True)


def untrained_widths(model: nn.Module) -> list[int | None]:
    """Widths whose norm sets are estimated, not trained: widest first, None (float) last; empty without such norms."""
    norms = per_width_norms(model)
    if not norms:
        return []
    widths: list[int | None] = [*range(width_of(model).max_bits, 0, -1), None]
    return [bits for bits in widths if _key(bits) not in norms[0].trained]


@torch.no_grad()
def calibrate_norms(
    model: nn.Module, batches: Iterable[Tensor], widths: list[int | None] | None = None
) -> None:
    """Estimates the norm statistics of untrained widths from a few batches, into sets of their own.

    The affine parameters come from the next wider trained width, the statistics are the plain mean over the batches of
    what the layers see at that width, quantized as in training. Trained sets, modes, the width and all random states
    stay as they were: only batch norms of the width being estimated are in training mode.

    Args:
        model: a prepared model.
        batches: images (batch, channels, height, width) on the model's device; read once a width, so pass a list.
        widths: what to estimate; None = every untrained width and float. Trained widths are refused.

    Raises:
        ValueError: a width in `widths` that was trained or has no norm set; no batches; a model that is packed or not prepared.
    """
    if width_of(model).packed:
        raise ValueError(
            "a packed model has the statistics of its file; calibrate the prepared model before save_packed"
        )
    norms = per_width_norms(model)
    untrained = untrained_widths(model)
    widths = untrained if widths is None else widths
    for bits in widths:
        if bits not in untrained:
            trained = any(_key(bits) in norm.trained for norm in norms)
            why = (
                "was trained; its statistics are not re-estimated"
                if trained
                else "has no norm set to estimate"
            )
            raise ValueError(f"width {_key(bits)} {why}; pass None for all that can be estimated")
    if not norms or not widths:
        return
    batches = list(batches)
    if not batches:
        raise ValueError(
            "no batches to estimate norm statistics from; pass a list of image batches"
        )
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        for bits in widths:
            _calibrate(model, norms, batches, bits)
    finally:
        for module, mode in modes:
            module.training = mode


def _calibrate(
    model: nn.Module, norms: list[PerWidthNorm], batches: list[Tensor], bits: int | None
) -> None:
    layers = [
        m
        for norm in norms
        for m in norm.sets[_key(bits)].modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats
    ]
    momenta = [layer.momentum for layer in layers]
    try:
        for norm in norms:
            norm.borrow(bits)
            norm.calibrating = True
            if bits is not None:
                norm.calibrated[bits] = False  # until all batches have passed
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # cumulative mean over the batches
            layer.training = True
        with bit_width(model, bits, "quantize"):
            for batch in batches:
                model(batch)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum, layer.training = momentum, False
        for norm in norms:
            norm.calibrating = False
    if bits is not None:
        for norm in norms:
            norm.calibrated[bits] = True
