"""Switchable normalization: one norm layer per width, each a deep copy of the layer it replaces.

Activation statistics differ so much between widths that shared batch-norm statistics fail
(Any-Precision DNNs, arXiv 1911.07346; AdaBits, arXiv 1912.09666; the idea comes from Slimmable
networks, arXiv 1812.08928). Every width has its own norm, and so does float. The norms of the
trained widths are trained. The others are estimated by `calibrate_norms`; using one before that is
an error.
"""

import copy
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tq_lightning.quant.bit_width import Width, width_of
from tq_lightning.quant.layers import LAYER_NORMS, replace_modules

FLOAT = "none"  # key of bits=None; ModuleDict does not accept "float", a method of every module


def width_name(bits: int | None) -> str:
    """Return the key of a width in `PerWidthNorm.sets`."""
    return FLOAT if bits is None else str(bits)


class PerWidthNorm(nn.Module):
    """Replace `layer` by one copy per width, and forward each call to that of the width in use.

    Args:
        layer: a normalization layer, including those of timm that apply an activation.
        width: the model's shared `Width`; its `widths` are the trained ones.
        only: widths to create copies for, if the model runs only at these widths; None = all widths
            and float.

    Attributes:
        sets: ModuleDict with keys "1".."max_bits" and `FLOAT`, or those of `only`. Parameters of
            untrained widths do not require a gradient.
        calibrated: bool (max_bits + 1,); entry n is True if the untrained width n has statistics.
    """

    def __init__(self, layer: nn.Module, width: Width, only: Collection[int] | None = None) -> None:
        super().__init__()
        self.width = width
        all_widths: list[int | None] = [*range(1, width.max_bits + 1), None]
        keys = [width_name(bits) for bits in all_widths if only is None or bits in only]
        # the memo keeps the width shared if the layer holds an activation quantizer
        self.sets = nn.ModuleDict({key: copy.deepcopy(layer, {id(width): width}) for key in keys})
        self.trained = {str(bits) for bits in width.widths}
        for key, norm in self.sets.items():
            if key not in self.trained:
                norm.requires_grad_(False)
            # `norm_calibration.lagging_widths` counts updates from here on
            for m in norm.modules():
                if isinstance(m, _BatchNorm) and m.num_batches_tracked is not None:
                    m.num_batches_tracked.zero_()
        self.register_buffer("calibrated", torch.zeros(width.max_bits + 1, dtype=torch.bool))
        self.calibrating = False
        self.selected: nn.Module | None = None  # see `SelectedNorms`
        self._read: tuple[Tensor, int | None, list[bool]] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the norm of the width in use."""
        if self.selected is not None:
            return self.selected(*args, **kwargs)
        return self.sets[width_name(self.width.bits)](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # during deepcopy and unpickling `sets` and `width` do not exist yet
            if name in ("sets", "width") or name.startswith("__"):
                raise
            key = width_name(self.width.bits)
            if key not in self.sets:  # a width outside of `only`
                raise
            return getattr(self.sets[key], name)

    def check_width(self, bits: int | None) -> None:
        """Check that the norm of a width can be used; `bit_width` calls this.

        Raises:
            ValueError: the norm is neither trained nor calibrated.
        """
        key = width_name(bits)
        if key in self.trained or self.calibrating or bits is None:
            return
        if self.training:
            raise ValueError(
                f"width {bits} has no trainable norm; "
                f"train one of {', '.join(sorted(self.trained))}"
            )
        # a packed model checks its widths in PackedWeight, which has the list of loaded widths
        if not self.width.packed and not self._calibrated_widths()[bits]:
            raise ValueError(
                f"width {bits} was not trained and has no norm statistics yet; "
                "call calibrate_norms(model, batches) first"
            )

    def _calibrated_widths(self) -> list[bool]:
        """Return `calibrated` as a list, read from the device only after it has changed."""
        flags = self.calibrated
        version = None if flags.is_inference() else flags._version
        if self._read is None or self._read[0] is not flags or self._read[1] != version:
            self._read = (flags, version, flags.tolist())
        return self._read[2]

    def copy_affine_from_wider(self, bits: int | None) -> None:
        """Copy the parameters of the next wider trained width to an untrained width.

        Float, and widths above all trained ones, get those of the widest trained width.
        """
        trained = sorted(int(key) for key in self.trained if key != FLOAT)
        wider = next((b for b in trained if bits is not None and b >= bits), trained[-1])
        self.sets[width_name(bits)].load_state_dict(self.sets[str(wider)].state_dict())


class SelectedNorms:
    """Makes all norms of a model use the norm of a width regardless of the width in use.

    `torch.compile` then sees one norm with different tensors, not one norm per width.

    Args:
        norms: the norms of the model. One that is replaced later is not seen.
    """

    def __init__(self, norms: Sequence[PerWidthNorm]) -> None:
        self._norms = norms
        self._of: dict[int | None, list[nn.Module]] = {}  # norms of a width
        self._parameters: dict[int | None, list[nn.Parameter]] = {}
        self._flagged: list[nn.Parameter] = []

    def select(self, bits: int | None) -> None:
        """Use the norms of a width, until `unselect`."""
        if bits not in self._of:
            self._of[bits] = [norm.sets[width_name(bits)] for norm in self._norms]
        for norm, selected in zip(self._norms, self._of[bits], strict=True):
            # `Module.__setattr__` is slow, and would register the norm a second time
            norm.__dict__["selected"] = selected
        self._unflag()
        if not torch.is_grad_enabled():
            # graphs depend on requires_grad even in evaluation, and untrained norms do not have it
            if bits not in self._parameters:
                self._parameters[bits] = [p for norm in self._of[bits] for p in norm.parameters()]
            self._flagged = [p for p in self._parameters[bits] if not p.requires_grad]
            for p in self._flagged:
                p.requires_grad_(True)

    def unselect(self) -> None:
        """Follow the width in use again."""
        for norm in self._norms:
            norm.__dict__["selected"] = None
        self._unflag()

    def _unflag(self) -> None:
        for p in self._flagged:
            p.requires_grad_(False)
        self._flagged.clear()


def attach_norms(
    model: nn.Module,
    norm: str,
    width: Width,
    only: Collection[int] | None = None,
    shared: Sequence[str] = (),
) -> dict[str, str]:
    """Replace norms by `PerWidthNorm`, after all quantizers are attached.

    Args:
        model: a model with its quantizers attached.
        norm: as in `prepare`.
        width: the model's shared `Width`.
        only: as in `PerWidthNorm`.
        shared: patterns of norms to leave as they are.

    Returns:
        A dict from layer name to a description of the attached modules.

    Raises:
        ValueError: a pattern matches no norm.
    """
    if norm == "shared":
        return {}
    kinds = _norm_kinds(norm)
    kept = shared_norms(model, norm, shared)
    replaced = replace_modules(
        model, kinds, lambda m: PerWidthNorm(m, width, only), list(kept.values())
    )
    trained = ", ".join(map(str, width.widths))
    return {
        **dict.fromkeys(replaced, f"norm per width: trained {trained}; the others estimated"),
        **dict.fromkeys(kept, "norm shared by all widths"),
    }


def _norm_kinds(norm: str) -> tuple[type[nn.Module], ...]:
    return (_BatchNorm, *LAYER_NORMS) if norm == "per_width_all" else (_BatchNorm,)


def shared_norms(model: nn.Module, norm: str, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Find the norms that match a pattern, by name.

    Raises:
        ValueError: a pattern matches no norm.
    """
    kinds = _norm_kinds(norm)
    norms: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in norms):
            examples = ", ".join(map(repr, list(norms)[:3])) or "none"
            raise ValueError(
                f"shared_norms pattern {pattern!r} matches no norm; the model has {examples}"
            )
    return {n: m for n, m in norms.items() if any(fnmatchcase(n, p) for p in patterns)}


def per_width_norms(model: nn.Module) -> list[PerWidthNorm]:
    """List all `PerWidthNorm` of a model, in model order."""
    return [m for m in model.modules() if isinstance(m, PerWidthNorm)]


def train_float_norms(model: nn.Module) -> None:
    """Make the float norms trainable, for joint training with a float pass."""
    for norm in per_width_norms(model):
        norm.trained.add(FLOAT)
        norm.sets[FLOAT].requires_grad_(True)


def untrained_widths(model: nn.Module) -> list[int | None]:
    """List the widths whose norms are estimated: widest first, None (float) last.

    The list is empty for a model without per-width norms.
    """
    norms = per_width_norms(model)
    if not norms:
        return []
    widths: list[int | None] = [*range(width_of(model).max_bits, 0, -1), None]
    return [bits for bits in widths if width_name(bits) not in norms[0].trained]
