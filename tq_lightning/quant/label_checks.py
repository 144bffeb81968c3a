"""Checks that the labels of a batch fit the task, the logits and the inputs."""

from typing import Any

from torch import Tensor

from tq_lightning.errors import UserError
from tq_lightning.quant.batches import first_tensor

IGNORE_INDEX = -100  # label of tokens that losses and metrics exclude, the default of PyTorch


def check_logits(task: str, logits: Any, target: Tensor, soft: bool = False) -> None:
    """Check that the logits of a network fit the task and the labels.

    Args:
        task: a value of `model.task`.
        logits: return value of `batches.call_model`.
        target: labels of the batch.
        soft: accept probabilities of the classes as labels, as in training.

    Raises:
        UserError: the logits or labels are not tensors, or their shapes do not fit.
    """
    if not isinstance(logits, Tensor):
        raise UserError(
            f"the network returns a {type(logits).__name__}; return a tensor of logits, or an "
            "object with the attribute logits"
        )
    if not isinstance(target, Tensor):
        raise UserError(
            f"the labels of a batch are a {type(target).__name__}; return a tensor of class indices"
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
    elif target.is_floating_point() and labels == shape and not soft:
        raise UserError(
            f"the labels of an evaluation are probabilities {labels}; return class indices (batch,)"
        )
    elif len(shape) != 2 or labels not in (shape[:1], shape):
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
    labeled = labels[labels != IGNORE_INDEX]
    if not labeled.numel():
        return
    low, high = (int(value) for value in labeled.aminmax())
    if low < 0 or high >= classes:
        raise UserError(
            f"the labels are between {low} and {high}, but the network has {classes} outputs; "
            + (f"pass --model.num_classes {high + 1}" if low >= 0 else "number the classes from 0")
        )


def check_labels_are_shifted(inputs: Any, target: Tensor) -> None:
    """Check that the labels of a language model are not its inputs, which it could simply copy.

    Raises:
        UserError: the label of every labeled token is the input token.
    """
    tokens, labeled = first_tensor(inputs), target != IGNORE_INDEX
    if tokens.shape == target.shape and bool(((tokens == target) | ~labeled).all() & labeled.any()):
        raise UserError(
            "the labels are the input tokens themselves; pass the label of position t as the token "
            "to predict there (the next one: input_ids[:, :-1], labels[:, 1:]), "
            f"{IGNORE_INDEX} for none"
        )
