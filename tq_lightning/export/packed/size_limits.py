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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tq_lightning.errors import UserError

TOO_LARGE = "is many times larger than its file"
# Constructors register some tensors that they replace later, and folded norms store 2 of 5
# tensors. Of 160 architectures of timm, none registers more than 1.3 times its tensors, has more
# than 3 modules per tensor, or makes more than 14 calls of PyTorch per tensor.
_TENSORS, _NUMBERS, _MODULES, _CALLS = 4, 4, 12, 60
_MORE_TENSORS, _MORE_NUMBERS = 250, 1 << 22


class SizeLimits:
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


class LimitResultSizes(TorchDispatchMode):
    """Reject operations whose results would be too large, before they allocate memory.

    The size of each result is computed on the meta device first.

    Args:
        limits: counts the calls, and the values of their results.
    """

    def __init__(self, limits: SizeLimits) -> None:
        super().__init__()
        self.limits = limits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` if its results are within the limits."""
        kwargs = kwargs or {}
        self.limits.take("calls")
        in_place = any(result.alias_info is not None for result in func._schema.returns)
        if not in_place:  # views and in-place operations allocate nothing
            sizes: list[Any] = []
            with suppress(Exception):  # some operations have no meta implementation
                on_meta = {**kwargs, "device": "meta"} if "device" in kwargs else kwargs
                sizes = tree_leaves(func(*tree_map(_meta, args), **tree_map(_meta, on_meta)))
            self.limits.take("values", sum(s.numel() for s in sizes if isinstance(s, Tensor)))
        return func(*args, **kwargs)


def _meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
