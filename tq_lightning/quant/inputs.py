"""Batches as tensors, tuples or mappings: the inputs of a network, and the labels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

LABELS = ("labels", "label", "target")  # keys of the labels in a batch that is a mapping


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a network with a tensor, a tuple of arguments or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Split a batch into the inputs of the network and the labels.

    Args:
        batch: (inputs, labels), (input, input, ..., labels), or a mapping with one of the keys
            `LABELS`; the other keys are then arguments of the network.

    Raises:
        ValueError: The batch has no labels.
    """
    if isinstance(batch, Mapping):
        key = next((key for key in LABELS if key in batch), None)
        if key is None:
            raise ValueError(
                f"a batch has the keys {', '.join(map(str, batch))}, and no labels; add one of "
                f"{', '.join(LABELS)}"
            )
        return {k: v for k, v in batch.items() if k != key}, batch[key]
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise ValueError(f"a batch is a {type(batch).__name__}, not (inputs, labels)")
    return batch[0] if len(batch) == 2 else tuple(batch[:-1]), batch[-1]


def first_tensor(inputs: Any) -> Tensor:
    """Return the first tensor in the inputs of a network.

    Raises:
        ValueError: The inputs contain no tensor.
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
