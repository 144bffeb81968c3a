"""Descriptions of the inputs of a network: names, shapes and types, as packed files store them."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError

TYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


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
