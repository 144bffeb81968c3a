"""The width in use: `Width`, shared by all quantizers of a model; `bit_width` sets it."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

SOURCES = ("quantize", "truncate")
_SWITCHING = threading.Lock()  # two threads may enter the blocks of one model at the same time


class WidthTensors(NamedTuple):
    """A width as 0-dimensional tensors: inputs of a compiled graph that serves every width.

    Attributes:
        bits: float32; max_bits at float width.
        top: float32, M_n = 2^bits - 1.
        stored_top: float32, M_n of the width at which codes of `*_truncate` are computed.
        step: float32, divisor of these codes: 2^(max_bits - bits), or 1.
        is_float: bool, True for no quantization.
    """

    bits: Tensor
    top: Tensor
    stored_top: Tensor
    step: Tensor
    is_float: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> "WidthTensors":
        """Allocate the tensors of one width."""
        with torch.inference_mode(False):  # training may use them after an evaluation
            bits, top, stored_top, step = (torch.ones((), device=device) for _ in range(4))
            is_float = torch.zeros((), dtype=torch.bool, device=device)
        return cls(bits, top, stored_top, step, is_float)

    @torch.no_grad()
    def fill(self, bits: int | None, source: str, max_bits: int) -> None:
        """Write a width, in place."""
        n = max_bits if bits is None else bits
        stored = max_bits if source == "truncate" else n
        self.bits.fill_(n)
        self.top.fill_(2.0**n - 1)
        self.stored_top.fill_(2.0**stored - 1)
        self.step.fill_(2.0 ** (stored - n))
        self.is_float.fill_(bits is None)


@dataclass
class Width:
    """The current width of a prepared model. Only `bit_width` writes `bits` and `source`.

    Attributes:
        max_bits: stored width.
        widths: trained widths, widest first.
        bits: width in use, None = float. `prepare` starts at the widest trained width.
        source: source of the weights of that width, "quantize" or "truncate".
        packed: True if there are no float weights (a loaded packed model).
        default_source: the source of `bit_width` if none is passed.
        fused: the `FusedModel` that computes the weights inside `fused_weights`, else None.
        tensors: the width in use as `WidthTensors`, set by `fused`, else None.
        thread: the thread inside a `bit_width` block, else None.
        depth: number of nested blocks of that thread.
    """

    max_bits: int
    widths: tuple[int, ...]
    bits: int | None = None
    source: str = "quantize"
    packed: bool = False
    default_source: str = "quantize"
    fused: Any = None
    tensors: WidthTensors | None = None
    thread: int | None = None
    depth: int = 0

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which computes its own weights and belongs to no thread."""
        return {**self.__dict__, "fused": None, "tensors": None, "thread": None, "depth": 0}

    def __post_init__(self) -> None:
        if self.bits is None and self.packed:
            self.bits = self.max_bits


def walk_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the (name, module) pairs of a model like `named_modules`, in a tenth of the time.

    The nested generators of `named_modules` would slow down a switch between two images, and a
    step on a GPU. Nothing is cached, so that copied, replaced and added modules are found.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"{model!r:.80}"
        raise TypeError(f"the model must be a torch.nn.Module, got {what}; pass the network itself")
    seen: set[int] = set()
    todo: list[tuple[str, nn.Module]] = [("", model)]
    found = []
    while todo:
        name, module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        children = module.__dict__["_modules"]
        if children:
            prefix = f"{name}." if name else ""
            todo += [
                (prefix + key, child)
                for key, child in reversed(children.items())
                if child is not None
            ]
    return found


def _holders(modules: list[tuple[str, nn.Module]]) -> list[nn.Module]:
    """Return the modules that hold a `Width`."""
    return [module for _, module in modules if isinstance(module.__dict__.get("width"), Width)]


class WidthSwitch:
    """Sets the width of a model whose modules were listed once and do not change.

    Args:
        modules: the modules of a prepared or packed model, from `walk_modules`.

    Attributes:
        width: the `Width` that all quantizers share.

    Raises:
        ValueError: the model is not prepared, or contains parts of several prepared models.
    """

    def __init__(self, modules: list[tuple[str, nn.Module]]) -> None:
        holders = _holders(modules)
        self._checks = [h.check_width for h in holders if hasattr(type(h), "check_width")]
        found: dict[int, Width] = {id(h.width): h.width for h in holders}  # type: ignore[misc]
        name = type(modules[0][1]).__name__
        if not found:
            raise ValueError(f"{name} has no quantizers; call prepare(model, ...) first")
        if len(found) > 1:
            raise ValueError(
                f"{name} contains parts of {len(found)} prepared models; "
                "set the width of each part separately"
            )
        self.width = next(iter(found.values()))

    @contextmanager
    def at(self, bits: int | None, source: str | None = None) -> Iterator[None]:
        """Run the model at a width inside the `with` block; see `bit_width`.

        Raises:
            ValueError: an unknown width or source, float on a packed model, or an untrained width
                without norm statistics.
            RuntimeError: another thread is inside a block of this model.
        """
        width = self.width
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
                f"unknown width {bits!r}; pass bits from 1 to {width.max_bits}, or None for float"
            )
        if width.packed and source == "quantize":
            raise ValueError(
                "a packed model stores codes, not weights to quantize; pass source='truncate'"
            )
        for check in self._checks:
            check(bits)  # type: ignore[operator]
        _allow_variants(width.max_bits)
        _enter(width)
        before = (width.bits, width.source)
        try:
            _set(width, bits, source)
            if width.fused is not None:
                width.fused.compute(bits, source)
            yield
        finally:
            if width.fused is not None:
                width.fused.release()
            _set(width, *before)
            _leave(width)


def width_of(model: nn.Module) -> Width:
    """Return the `Width` that all quantizers of a prepared model (or of a part of one) share.

    Raises:
        ValueError: the model is not prepared, or contains parts of several prepared models.
    """
    return WidthSwitch(walk_modules(model)).width


def _allow_variants(max_bits: int) -> None:
    # torch.compile builds one graph per width and source, and silently falls back to eager mode
    # beyond its limit
    dynamo: Any = sys.modules.get("torch._dynamo.config")
    if dynamo is not None:
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * (2 * max_bits + 1))


def _enter(width: Width) -> None:
    """Count a block. The width is a state of the model, so only one thread may switch it."""
    thread = threading.get_ident()
    # a checkpointed function runs again in a thread of autograd, while its caller waits
    in_backward = torch._C._current_graph_task_id() != -1
    with _SWITCHING:
        if width.depth and width.thread != thread and not in_backward:
            raise RuntimeError(
                "another thread is inside a bit_width block of this model; "
                "pass each thread its own copy, e.g. copy.deepcopy(model)"
            )
        width.thread = width.thread if width.depth else thread
        width.depth += 1


def _leave(width: Width) -> None:
    with _SWITCHING:
        width.depth -= 1
        width.thread = width.thread if width.depth else None


def _set(width: Width, bits: int | None, source: str) -> None:
    width.bits, width.source = bits, source
    parametrize._cache.clear()  # the keys of parametrize.cached() do not include the width


@contextmanager
def bit_width(model: nn.Module, bits: int | None, source: str | None = None) -> Iterator[nn.Module]:
    """Run `model` at a width inside the `with` block; any exit restores the previous width.

    Args:
        model: a prepared or loaded packed model, or a part of one. All parts of that model change
            together.
        bits: width in use, 1..max_bits. None = float: the network before `prepare`, except that
            its activations stay clipped.
        source: "quantize" (codes computed at `bits`) or "truncate" (stored codes shifted). None is
            "quantize" for a prepared model and "truncate" for a packed one.

    Yields:
        The model.

    Raises:
        ValueError: an unknown width or source, float on a packed model, or an untrained width
            without norm statistics.
        RuntimeError: another thread is inside a block of this model. The width is a state of the
            model; pass each thread its own copy.
    """
    with WidthSwitch(walk_modules(model)).at(bits, source):
        yield model
