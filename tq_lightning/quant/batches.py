"""Batches of tensors, tuples or mappings: their inputs and labels, and calls of a network."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError

LABELS = ("labels", "label", "target")  # keys of the labels in a batch that is a mapping


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a network with a tensor, a tuple of arguments or a mapping of keyword arguments.

    Returns:
        The return value of the network, or its attribute or key `logits`.
    """
    if isinstance(inputs, Mapping):
        out = model(**inputs)
    else:
        out = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    if isinstance(out, Mapping):
        return out.get("logits", out)
    return out if isinstance(out, Tensor) else getattr(out, "logits", out)


def list_batches(model: nn.Module, batches: Iterable[Any], purpose: str) -> list[Any]:
    """List batches of inputs, after checks that the network can be called with each.

    Args:
        model: the network.
        batches: tensors, tuples of arguments or mappings.
        purpose: what they are for, named in errors: "to observe activations on".

    Raises:
        UserError: there are no batches, `batches` is not a list of them, one has no tensor, or one
            has other arguments than the network, e.g. labels.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise UserError(
            f"the batches {purpose} must be a list, got a {type(batches).__name__}; "
            "pass e.g. [images]"
        )
    batches = list(batches)
    if not batches:
        raise UserError(f"no batches {purpose}; pass a list of image batches")
    signature = inspect.signature(model.forward)
    for batch in batches:
        first_tensor(batch)
        args = batch if isinstance(batch, tuple | list) else ()
        named = batch if isinstance(batch, Mapping) else {}
        try:
            signature.bind(*args, **named) if args or named else None
        except TypeError as error:
            raise UserError(
                f"a batch {purpose} is a {type(batch).__name__} of {len(batch)} parts that "
                f"{type(model).__name__}.forward does not take ({error}); pass its inputs without "
                "labels, e.g. [images for images, _ in loader]"
            ) from None
    return batches


def overwrites_outputs(model: nn.Module) -> bool:
    """Return True if the next call of a compiled network may overwrite the outputs of this one.

    CUDA graphs (`torch.compile(mode="reduce-overhead")`) write logits and gradients to the same
    memory in every call.

    Args:
        model: a network, or a LightningModule with a `compiled_model`.
    """
    network = getattr(model, "compiled_model", model)
    compiled = hasattr(network, "_orig_mod") or network._compiled_call_impl is not None
    return compiled and next(network.parameters()).is_cuda and may_record_graphs(network)


def may_record_graphs(compiled: nn.Module) -> bool:
    """Return False if a compiled network is known to run without CUDA graphs."""
    config = getattr(getattr(compiled, "dynamo_ctx", None), "compiler_config", None)
    return config is None or bool(config.get("triton.cudagraphs", True))


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Split a batch into the inputs of the network and the labels, int64 or floating point.

    Args:
        batch: (inputs, labels), (input, input, ..., labels), or a mapping with one of the keys
            `LABELS`; the other keys are then arguments of the network.

    Raises:
        UserError: the batch has no labels.
    """
    inputs, labels = _parts(batch)
    integers = isinstance(labels, Tensor) and not labels.is_floating_point()
    return inputs, labels.long() if integers else labels


def _parts(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        key = next((key for key in LABELS if key in batch), None)
        if key is None:
            raise UserError(
                f"a batch has the keys {', '.join(map(str, batch))}, and no labels; add one of "
                f"{', '.join(LABELS)}"
            )
        return {k: v for k, v in batch.items() if k != key}, batch[key]
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise UserError(
            f"a batch is a {type(batch).__name__}; return (inputs, labels), or a dict with labels"
        )
    return batch[0] if len(batch) == 2 else tuple(batch[:-1]), batch[-1]


def first_tensor(inputs: Any) -> Tensor:
    """Return the first tensor in the inputs of a network.

    Raises:
        ValueError: the inputs contain no tensor.
    """
    if isinstance(inputs, Tensor):
        return inputs
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs
    for part in parts if isinstance(inputs, Mapping | tuple | list) else ():
        if isinstance(part, Tensor | Mapping | tuple | list):
            return first_tensor(part)
    raise ValueError(f"no tensor in the inputs of the network, a {type(inputs).__name__}")


def samples_of(inputs: Any) -> int:
    """Return the number of samples in a batch of inputs."""
    return len(first_tensor(inputs))


def to_device(inputs: Any, device: torch.device | str) -> Any:
    """Move all tensors of the inputs to a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {k: to_device(v, device) for k, v in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(to_device(v, device) for v in inputs)
    return inputs
