"""Build the prepared network of a packed file without initializing it."""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tq_lightning.errors import UserError
from tq_lightning.export.packed.size_limits import TOO_LARGE, LimitResultSizes, SizeLimits
from tq_lightning.factories import is_factory
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.config import QuantConfig
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.quant.switchable_norm import attach_norms

# Substrings of model arguments that name files to open or weights to fetch.
_FORBIDDEN = ("name", "pretrained", "checkpoint", "cache", "file", "path", "url", "hf_hub")
_MAX_ITEMS = 64  # arguments of a model, and items or characters of an argument
_MAX_NUMBER = 1 << 16  # largest number in an argument
_MAX_OWN_NUMBER = 1 << 20  # the same for a factory that the caller names
# constructors of old timm versions loop in Python over all pairs of positions in a window
_MAX_WINDOW = 32
_MAX_SKIP = 1000  # skip patterns
# initializations that SkipInit skips
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
    """Skip in-place initialization of tensors on the meta device, which have no values.

    PyTorch would compute the result shape of every such call in Python, and load its compiler for
    random numbers.

    Args:
        limits: counts all calls.
    """

    def __init__(self, limits: SizeLimits | None = None) -> None:
        super().__init__()
        self.limits = limits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` unless it only fills a meta tensor."""
        if self.limits is not None:
            self.limits.take("calls")
        if func in _FILLS and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def create_skeleton(spec: Mapping[str, Any], limits: SizeLimits | None = None) -> nn.Module:
    """Create the network that a header names, on the meta device if possible.

    Args:
        spec: "model" of the header.
        limits: limits of the network. None sets none.

    Raises:
        UserError: the model is unknown, too large, or would open files.
    """
    from tq_lightning.models import create_model

    name, args = spec.get("name"), spec.get("args")
    if name is None:
        raise UserError("the file does not name a model; pass the network itself as model=")
    if is_factory(name):
        raise UserError(
            f"the file names the factory {name}, which is not imported automatically; pass "
            f"--model.name {name} (in Python, model={name!r} or the network itself)"
        )
    if not isinstance(name, str) or ":" in name or not isinstance(args, dict):
        raise UserError(f"the file does not name a timm model: {str(name)[:60]!r}")
    check_args(args)
    with limits.registrations() if limits is not None else nullcontext():
        try:
            with torch.device("meta"), SkipInit(limits):
                return create_model(name, **args)
        except UserError as error:
            if "unknown model" in str(error) or TOO_LARGE in str(error):
                raise
        # a constructor that computes with values
        with LimitResultSizes(limits) if limits is not None else nullcontext():
            return create_model(name, **args)


def check_args(args: Any, own: bool = False) -> None:
    """Check the model arguments of a header, before any code is called with them.

    Args:
        args: "args" of the header's model.
        own: they are for a factory of the caller, with vocabularies and windows of any usual size.

    Raises:
        UserError: they are not a small mapping of plain values, or may name files.
    """
    hint = "pass the network itself as model="
    if not isinstance(args, dict):
        raise UserError(
            f"the model arguments in the file header are a {type(args).__name__}; {hint}"
        )
    if len(args) > _MAX_ITEMS:
        raise UserError(f"the file header has {len(args)} model arguments; {hint}")
    for key, value in args.items():
        timm_limit = _MAX_WINDOW if "window" in key else _MAX_NUMBER
        largest = _MAX_OWN_NUMBER if own else timm_limit
        if any(word in key for word in _FORBIDDEN) or not _is_plain(value, largest):
            raise UserError(
                f"disallowed model argument in the file header: {str(key)[:40]!r}; {hint}"
            )


def _is_plain(value: Any, largest: int, depth: int = 0) -> bool:
    if isinstance(value, list):
        if len(value) > _MAX_ITEMS or depth > 2:
            return False
        return all(_is_plain(v, largest, depth + 1) for v in value)
    if isinstance(value, str):
        return len(value) <= _MAX_ITEMS and "/" not in value and "\\" not in value
    if value is None or isinstance(value, bool):
        return True
    return isinstance(value, int | float) and abs(value) <= largest


def prepare_skeleton(
    model: nn.Module, options: Mapping[str, Any], norm_sets: Collection[int] | None = None
) -> nn.Module:
    """Prepare a network with the options of a header.

    Args:
        model: float network, or one prepared with the same options.
        options: "prepare" of the header.
        norm_sets: widths to build norm sets for. None builds all of them, and the float set.

    Returns:
        `model`.

    Raises:
        UserError: the network can't be prepared with these options.
    """
    from tq_lightning.quant.prepare import apply_config

    try:
        config = QuantConfig(**options)
        if weight_quantizers(model):
            if QuantConfig(**getattr(model, "tq", {})) != config:
                raise UserError(
                    "the given model was prepared with other options than the file; "
                    "pass the float model, without prepare()"
                )
            return model
        if len(config.skip) > _MAX_SKIP:
            raise ValueError(f"{len(config.skip)} skip patterns, at most {_MAX_SKIP} are allowed")
        # norms separately: copying sets that are not needed would take most of the loading time
        apply_config(model, replace(config, norm="shared", shared_norms=()))
        attach_norms(model, config.norm, width_of(model), norm_sets, config.shared_norms)
        model.tq = config.to_dict()  # type: ignore[assignment]
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the network in the file can't be prepared with the options of the header ({error})"
        ) from error
    return model
