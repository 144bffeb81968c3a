"""Build the network of a packed file without initializing it, within bounds set by the file."""

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
# Room for tensors that a constructor registers and replaces, or that a file stores once for
# several uses.
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
# Substrings of model arguments that name files to open or weights to fetch.
_FORBIDDEN = ("name", "pretrained", "checkpoint", "cache", "file", "path", "url", "hf_hub")
_MAX_ARG = 1 << 16  # largest number in a model argument


def build_skeleton(
    header: Mapping[str, Any],
    model: nn.Module | None = None,
    norm_sets: Collection[int] | None = None,
    held: tuple[int, int] | None = None,
) -> nn.Module:
    """Build the prepared network of a header, on the meta device if it is made here.

    Args:
        header: checked header, see `read_header`.
        model: network to use instead of the one that the header names, as in `load_packed`.
        norm_sets: widths to make norm sets for if the network is prepared here. None makes all
            of them, and the float set.
        held: (tensors, numbers) in the file. Building stops once the network has many times
            more. None sets no bound.

    Returns:
        The prepared network.

    Raises:
        UserError: the model is unknown, too large, would open files, or can't be prepared as
            the header says.
    """
    if model is None:
        with _bounded(held):
            model = _create(header["model"])
    if weight_quantizers(model):
        if getattr(model, "tq", None) != header["prepare"]:
            raise UserError(
                "the given model was prepared with other options than the file; "
                "pass it as it was before prepare()"
            )
        return model
    from tq_lightning.quant.prepare import apply_config, attach_norms

    try:
        config = QuantConfig(**header["prepare"])
        # norms separately: copying sets that are not needed would take most of the loading time
        apply_config(model, replace(config, norm="shared"))
        attach_norms(model, config.norm, width_of(model), norm_sets)
        model.tq = config.to_dict()  # type: ignore[assignment]
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"its network can't be prepared as the header says ({error})") from error
    return model


class SkipInit(TorchFunctionMode):
    """Skip in-place initialization of tensors on the meta device, which have no values.

    PyTorch would compute the result shape of every such call in Python, and load its compiler for
    random numbers.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` unless it only fills a meta tensor."""
        if func in _FILLS and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _bounded(held: tuple[int, int] | None) -> Iterator[None]:
    """Raise `UserError` once this thread registers many times more tensors than a file holds."""
    if held is None:
        yield
        return
    thread, tensors, numbers = threading.get_ident(), 0, 0
    max_tensors, max_numbers = _TIMES * held[0] + _MORE_TENSORS, _TIMES * held[1] + _MORE_NUMBERS

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal tensors, numbers
        if value is None or threading.get_ident() != thread:
            return
        tensors, numbers = tensors + 1, numbers + value.numel()
        if tensors > max_tensors or numbers > max_numbers:
            raise UserError(f"the network that its header asks for {TOO_LARGE}")

    handle = register_module_parameter_registration_hook(count)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _create(spec: Mapping[str, Any]) -> nn.Module:
    from tq_lightning.models import create_model

    name, args = spec.get("name"), spec.get("args")
    if name is None:
        raise UserError("the file does not name a model; pass the network itself as model=")
    if not isinstance(name, str) or ":" in name or not isinstance(args, dict):
        raise UserError(f"the file does not name a timm model: {str(name)[:60]!r}")
    for key, value in args.items():
        if any(word in key for word in _FORBIDDEN) or not _is_plain(value):
            raise UserError(f"disallowed model argument in the file header: {str(key)[:40]!r}")
    try:
        with torch.device("meta"), SkipInit():
            return create_model(name, **args)
    except UserError as error:
        if "unknown model" in str(error) or TOO_LARGE in str(error):
            raise
    return create_model(name, **args)  # a network whose constructor computes with real values


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 64 and all(_is_plain(v) for v in value)
    if isinstance(value, str):
        return len(value) <= 64 and "/" not in value and "\\" not in value
    if value is None or isinstance(value, bool):
        return True
    return isinstance(value, int | float) and abs(value) <= _MAX_ARG
