"""Building a network for its shape alone: nothing is initialised, and one far larger than its file is not built to its end."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from tq_lightning.errors import UserError

TOO_LARGE = "is many times larger than its file"
# A constructor registers some tensors that it replaces later, or that a file stores once for several: room for those.
_TIMES, _MORE_TENSORS, _MORE_NUMBERS = 4, 1000, 1 << 24
_FILLS = {Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_}


class Unfilled(TorchFunctionMode):
    """Leaves out what only writes values to a tensor of the meta device, which has none.

    PyTorch works out the shape of every such call in Python, and for random numbers loads its compiler first.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def bounded(held: tuple[int, int] | None) -> Iterator[None]:
    """Ends the building of a network, in this thread, as soon as it has many times more than a file holds.

    Args:
        held: (tensors, numbers) of the file; None = no bound.

    Raises:
        UserError: the network has more, said with `TOO_LARGE`.
    """
    if held is None:
        yield
        return
    thread, tensors, numbers = threading.get_ident(), 0, 0
    most = (_TIMES * held[0] + _MORE_TENSORS, _TIMES * held[1] + _MORE_NUMBERS)

    def count(module: nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal tensors, numbers
        if parameter is None or threading.get_ident() != thread:
            return
        tensors, numbers = tensors + 1, numbers + parameter.numel()
        if tensors > most[0] or numbers > most[1]:
            raise UserError(f"the network that its header asks for {TOO_LARGE}")

    handle = register_module_parameter_registration_hook(count)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
