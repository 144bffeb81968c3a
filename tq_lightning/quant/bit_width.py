"""The width in use: one small object shared by all quantizers of a model, and the one context that writes it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

SOURCES = ("quantize", "truncate")


@dataclass
class Width:
    """What a prepared model runs at now. Only `bit_width` writes `bits` and `source`.

    Attributes:
        max_bits: stored width.
        widths: trained widths, widest first.
        bits: width in use, None = float.
        source: how the weight of a width came about, "quantize" or "truncate".
        packed: True where the float weights are gone (a loaded packed model).
        default_source: what `bit_width` takes where no source is given.
    """

    max_bits: int
    widths: tuple[int, ...]
    bits: int | None = None
    source: str = "quantize"
    packed: bool = False
    default_source: str = "quantize"

    def __post_init__(self) -> None:
        if self.bits is None and self.packed:
            self.bits = self.max_bits


def _holders(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that hold a `Width`, in model order.

    Walked anew at every call, so that a copied, swapped or added module is seen; by hand, since the generators of
    `nn.Module.modules` take ten times as long, which a switch between two images feels.
    """
    seen: set[int] = set()
    todo: list[nn.Module | None] = [model]
    found = []
    while todo:
        module = todo.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        own = module.__dict__
        if isinstance(own.get("width"), Width):
            found.append(module)
        if own["_modules"]:
            todo.extend(reversed(own["_modules"].values()))
    return found


def _shared(model: nn.Module, holders: list[nn.Module]) -> Width:
    found = {id(holder.width): holder.width for holder in holders}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no quantizers; call prepare(model, ...) first"
        )
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} holds parts of {len(found)} prepared models; set their widths one by one"
        )
    return next(iter(found.values()))  # type: ignore[return-value]


def width_of(model: nn.Module) -> Width:
    """The shared `Width` of a prepared model (or of one of its parts).

    Raises:
        ValueError: the model is not prepared, or holds parts of two prepared models.
    """
    return _shared(model, _holders(model))


def _allow_variants(max_bits: int) -> None:
    # torch.compile builds one graph a width and source and, past its limit, silently runs eager: make room for all.
    dynamo: Any = sys.modules.get("torch._dynamo.config")
    if dynamo is not None:
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * (2 * max_bits + 1))


def _set(width: Width, bits: int | None, source: str) -> None:
    width.bits, width.source = bits, source
    parametrize._cache.clear()  # inside parametrize.cached(): its key knows no width


@contextmanager
def bit_width(model: nn.Module, bits: int | None, source: str | None = None) -> Iterator[nn.Module]:
    """Runs `model` at a width inside the `with` block and restores what was before on any exit.

    Args:
        model: a prepared (or loaded packed) model, or a part of one; all parts of that model change together.
        bits: width in use, 1..max_bits; None = float, as if never prepared but for its clipped activations.
        source: "quantize" (codes made at `bits`) or "truncate" (stored codes shifted); None = the model's default,
            "quantize" for a prepared model and "truncate" for a packed one.

    Yields:
        The model.

    Raises:
        ValueError: no such width or source; float asked of a packed model; norm statistics missing at an untrained width.
    """
    holders = _holders(model)
    width = _shared(model, holders)
    source = width.default_source if source is None else source
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}; pass one of {', '.join(SOURCES)}")
    if bits is None:
        if width.packed:
            raise ValueError(
                f"a packed model has no float weights; pass bits from 1 to {width.max_bits}"
            )
    elif not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= width.max_bits:
        raise ValueError(
            f"no such width {bits!r}; pass bits from 1 to {width.max_bits}, or None for float"
        )
    if width.packed and source == "quantize":
        raise ValueError(
            "a packed model stores codes, not weights to quantize; pass source='truncate'"
        )
    for holder in holders:
        check = getattr(holder, "check_width", None)
        if check is not None:
            check(bits)
    _allow_variants(width.max_bits)
    before = (width.bits, width.source)
    _set(width, bits, source)
    try:
        yield model
    finally:
        _set(width, *before)
