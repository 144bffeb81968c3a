"""Limits on the network that is built for a packed file, relative to the size of the file."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tq_lightning.errors import UserError

TOO_LARGE = "is many times larger than its file"
# Constructors register some tensors that they replace later, and folded norms store 2 of 5
# tensors. Of 160 architectures of timm, none registers more than 1.3 times its tensors, has more
# than 3 modules per tensor, or makes more than 14 calls of PyTorch per tensor.
_TENSORS, _NUMBERS, _MODULES, _CALLS = 4, 4, 12, 60
_MORE_TENSORS, _MORE_NUMBERS = 250, 1 << 22
_FILLS = {
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.fill_,
    Tensor.zero_,
    Tensor.erfinv_,
    Tensor.mul_,
    Tensor.add_,
    Tensor.clamp_,
}


class Bounds:
    """Remaining budget of tensors, modules and calls while a network is built.

    Args:
        tensors: number of tensors in the file.
        numbers: number of values in the file.
    """

    def __init__(self, tensors: int, numbers: int) -> None:
        tensors, numbers = tensors + _MORE_TENSORS, numbers + _MORE_NUMBERS
        self.left = {
            "tensors": _TENSORS * tensors,
            "numbers": _NUMBERS * numbers,
            "modules": _MODULES * tensors,
            "calls": _CALLS * tensors,
            "values": 2 * _NUMBERS * numbers,
        }

    def take(self, kind: str, count: int = 1) -> None:
        """Subtract `count` from the budget of `kind`.

        Raises:
            UserError: the budget is exceeded.
        """
        self.left[kind] -= count
        if self.left[kind] < 0:
            raise UserError(f"the network that its header describes {TOO_LARGE}")

    @contextmanager
    def registrations(self) -> Iterator[None]:
        """Count the modules and tensors that this thread registers."""
        thread = threading.get_ident()

        def count_tensor(module: nn.Module, name: str, value: Tensor | None) -> None:
            if value is not None and threading.get_ident() == thread:
                self.take("tensors")
                self.take("numbers", value.numel())

        def count_module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
            if threading.get_ident() == thread:
                self.take("modules")

        handles = [
            register_module_parameter_registration_hook(count_tensor),  # type: ignore[arg-type]
            register_module_buffer_registration_hook(count_tensor),  # type: ignore[arg-type]
            register_module_module_registration_hook(count_module),  # type: ignore[arg-type]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class SkipInit(TorchFunctionMode):
    """Skip in-place initialization of tensors on the meta device, which have no values.

    PyTorch would compute the result shape of every such call in Python, and load its compiler for
    random numbers.

    Args:
        bounds: counts all calls.
    """

    def __init__(self, bounds: Bounds | None = None) -> None:
        super().__init__()
        self.bounds = bounds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` unless it only fills a meta tensor."""
        if self.bounds is not None:
            self.bounds.take("calls")
        if func in _FILLS and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


class BoundedValues(TorchDispatchMode):
    """Reject operations whose results would be too large, before they allocate memory.

    The size of each result is computed on the meta device first.

    Args:
        bounds: counts the calls, and the values of their results.
    """

    def __init__(self, bounds: Bounds) -> None:
        super().__init__()
        self.bounds = bounds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` if its results are within bounds."""
        kwargs = kwargs or {}
        self.bounds.take("calls")
        in_place = any(result.alias_info is not None for result in func._schema.returns)
        if not in_place:  # views and in-place operations allocate nothing
            sizes: list[Any] = []
            with suppress(Exception):  # some operations have no meta implementation
                on_meta = {**kwargs, "device": "meta"} if "device" in kwargs else kwargs
                sizes = tree_leaves(func(*tree_map(_meta, args), **tree_map(_meta, on_meta)))
            self.bounds.take("values", sum(s.numel() for s in sizes if isinstance(s, Tensor)))
        return func(*args, **kwargs)


def _meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
