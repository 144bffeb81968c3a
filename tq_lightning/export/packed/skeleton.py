"""Building a network for its shape alone: nothing is initialised, and one far larger than its file is not built to its end."""

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from tq_lightning.errors import UserError
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.config import QuantConfig
from tq_lightning.quant.weight import weight_quantizers

TOO_LARGE = "is many times larger than its file"
# A constructor registers some tensors that it replaces later, or that a file stores once for several: room for those.
_TIMES, _MORE_TENSORS, _MORE_NUMBERS = 4, 1000, 1 << 24
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


class SkipInit(TorchFunctionMode):
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


# What a file may never ask of create_model: files to open, weights to fetch.
_FORBIDDEN = ("name", "pretrained", "checkpoint", "cache", "file", "path", "url", "hf_hub")


_MAX_ARG = 1 << 16  # of any number in the model's arguments


def build_skeleton(
    header: Mapping[str, Any],
    model: nn.Module | None = None,
    norm_sets: Collection[int] | None = None,
    held: tuple[int, int] | None = None,
) -> nn.Module:
    """The prepared network of a header, without values where it is built here.

    Args:
        header: as `read_header` gives it.
        model: as in `load_packed`.
        norm_sets: widths whose norm sets are made, where it is prepared here; None = all, and float.
        held: (tensors, numbers) that the file holds: a network of many times more ends early; None = build whatever comes.

    Raises:
        UserError: a model that is unknown, asks for files, or cannot be prepared as the header says.
    """
    if model is None:
        with bounded(held):
            model = _create(header["model"])
    if weight_quantizers(model):
        if getattr(model, "tq", None) != header["prepare"]:
            raise UserError(
                "the model given was prepared in another way than the file's; pass it as it was before prepare()"
            )
        return model
    from tq_lightning.quant.prepare import apply_config, attach_norms

    try:
        config = QuantConfig(**header["prepare"])
        # Norms are attached separately: copies for widths that are not loaded would dominate the
        # time of a load.
        apply_config(model, replace(config, norm="shared"))
        attach_norms(model, config.norm, width_of(model), norm_sets)
        model.tq = config.to_dict()  # type: ignore[assignment]
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"its network cannot be prepared as the header says ({error})") from error
    return model


def _create(given: Mapping[str, Any]) -> nn.Module:
    from tq_lightning.models import create_model

    name, args = given.get("name"), given.get("args")
    if name is None:
        raise UserError("the file names no model; pass the network itself as model=")
    if not isinstance(name, str) or ":" in name or not isinstance(args, dict):
        raise UserError(f"the file names no model of timm's: {str(name)[:60]!r}")
    for key, value in args.items():
        if any(word in key for word in _FORBIDDEN) or not _plain(value):
            raise UserError(
                f"the file gives the model an argument that a file may not give: {str(key)[:40]!r}"
            )
    try:
        with torch.device("meta"), SkipInit():
            return create_model(name, **args)
    except UserError as error:
        if "unknown model" in str(error) or TOO_LARGE in str(error):
            raise
    return create_model(name, **args)  # a network that computes with real numbers while it is built


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 64 and all(_plain(v) for v in value)
    if isinstance(value, str):
        return len(value) <= 64 and "/" not in value and "\\" not in value
    return (
        value is None
        or isinstance(value, bool)
        or (isinstance(value, int | float) and abs(value) <= _MAX_ARG)
    )
