"""Batches as tensors, tuples or mappings: the inputs of a network, and the labels."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError

LABELS = ("labels", "label", "target")  # keys of the labels in a batch that is a mapping
IGNORED = -100  # label of tokens excluded from losses and metrics, `ignore_index` of PyTorch


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a network with a tensor, a tuple of arguments or a mapping of keyword arguments.

    Returns:
        The return value of the network, or its attribute `logits`.
    """
    if isinstance(inputs, Mapping):
        out = model(**inputs)
    else:
        out = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    return out if isinstance(out, Tensor) else getattr(out, "logits", out)


def overwrites_outputs(model: nn.Module) -> bool:
    """Return True if the next call of a compiled network may overwrite the outputs of this one.

    CUDA graphs (`torch.compile(mode="reduce-overhead")`) write logits and gradients to the same
    memory in every call.

    Args:
        model: a network, or a LightningModule with a `compiled_model`.
    """
    network = getattr(model, "compiled_model", model)
    compiled = hasattr(network, "_orig_mod") or network._compiled_call_impl is not None
    return compiled and next(network.parameters()).is_cuda


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Split a batch into the inputs of the network and the labels.

    Args:
        batch: (inputs, labels), (input, input, ..., labels), or a mapping with one of the keys
            `LABELS`; the other keys are then arguments of the network.

    Raises:
        UserError: the batch has no labels.
    """
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


def check_arguments(model: nn.Module, args: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Check that inputs fit the parameters of a network.

    Raises:
        UserError: an argument is missing or unknown.
    """
    try:
        inspect.signature(model.forward).bind(*args, **named)
    except TypeError as error:
        raise UserError(
            f"the inputs of a batch do not fit {type(model).__name__}.forward: {error}; name them "
            "like its parameters, or return them in the same order"
        ) from None


def check_logits(task: str, logits: Any, target: Tensor) -> None:
    """Check that the logits of a network fit the task and the labels.

    Args:
        task: a value of `model.task`.
        logits: return value of `call`.
        target: labels of the batch.

    Raises:
        UserError: the logits are not a tensor, or their shape does not fit.
    """
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the network returns a {type(logits).__name__}; return a tensor of logits, or an "
            "object with the attribute logits"
        )
    shape, labels = tuple(logits.shape), tuple(target.shape)
    if target.dim() == 1 and target.is_floating_point():
        raise UserError(f"the labels have type {target.dtype}; return integers, the class indices")
    if task == "language_modeling":
        if len(shape) != 3 or labels != shape[:2]:
            raise UserError(
                "model.task=language_modeling needs logits (batch, tokens, vocabulary) and labels "
                f"(batch, tokens), got {shape} and {labels}"
            )
    elif len(shape) != 2 or labels[:1] != shape[:1]:
        hint = "; pass model.task=language_modeling for a label per token" * (len(shape) == 3)
        raise UserError(
            f"the network returns logits {shape} for labels {labels}; expected (batch, classes) "
            f"and (batch,){hint}"
        )


def check_labels(logits: Tensor, target: Tensor) -> None:
    """Check that all class indices are outputs of the network. Reads the labels from the device.

    Args:
        logits: (..., classes).
        target: labels; probabilities of the classes are not checked.

    Raises:
        UserError: a label is below 0 or too large.
    """
    if target.is_floating_point() or target.shape == logits.shape:
        return
    classes, labels = logits.shape[-1], target.long()
    labeled = labels[labels != IGNORED]
    if not labeled.numel():
        return
    low, high = (int(value) for value in labeled.aminmax())
    if low < 0 or high >= classes:
        raise UserError(
            f"the labels are between {low} and {high}, but the network has {classes} outputs; "
            + (f"pass --model.num_classes {high + 1}" if low >= 0 else "number the classes from 0")
        )


def check_shifted(inputs: Any, target: Tensor) -> None:
    """Check that the labels of a language model are not its inputs, which it could simply copy.

    Raises:
        UserError: the label of every labeled token is the input token.
    """
    tokens, labeled = first_tensor(inputs), target != IGNORED
    if tokens.shape == target.shape and bool(((tokens == target) | ~labeled).all() & labeled.any()):
        raise UserError(
            "the labels are the input tokens themselves; pass the label of position t as the token "
            f"to predict there (the next one: input_ids[:, :-1], labels[:, 1:]), {IGNORED} for none"
        )


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


TYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


def describe_inputs(model: nn.Module, inputs: Any) -> list[dict[str, Any]]:
    """Return the name, the shape without the batch, and the type of each input of a network.

    Args:
        model: the network, whose parameter names the inputs have.
        inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.

    Returns:
        Rows {"name", "shape", "type"} with types from `TYPES`; [] if an input is not a tensor.
    """
    names = list(inspect.signature(model.forward).parameters)
    if not isinstance(inputs, Mapping):
        given = inputs if isinstance(inputs, tuple | list) else (inputs,)
        inputs = dict(zip(names, given, strict=False))
    rows = []
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or name not in names:
            return []
        kind = "float32" if value.is_floating_point() else "int64"
        kind = "bool" if value.dtype == torch.bool else kind
        rows.append({"name": name, "shape": list(value.shape[1:]), "type": kind})
    return rows


def example_inputs(
    model: nn.Module, rows: list[dict[str, Any]], batch: int = 2
) -> dict[str, Tensor | None]:
    """Create inputs of a network from rows of `describe_inputs`, in the order of its parameters.

    Returns:
        {parameter name: ones of shape (batch, ...)}; None for a parameter before the last input
        that has a default.

    Raises:
        UserError: the network has no parameter of that name.
    """
    parameters = list(inspect.signature(model.forward).parameters)
    known = {row["name"]: row for row in rows}
    if missing := [name for name in known if name not in parameters]:
        raise UserError(
            f"the network has no input {missing[0]!r}; it takes {', '.join(parameters)}"
        )
    last = max(parameters.index(name) for name in known)
    made: dict[str, Tensor | None] = {}
    for name in parameters[: last + 1]:
        row = known.get(name)
        made[name] = (
            None if row is None else torch.ones(batch, *row["shape"], dtype=TYPES[row["type"]])
        )
    return made
