"""Training losses: against labels, and against the logits of a teacher.

To add a label loss, write its function and add a row to `LOSSES`.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tq_lightning.quant.label_checks import IGNORE_INDEX, check_labels, check_logits


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropy, averaged over the batch or over the labeled tokens.

    Args:
        logits: (batch, classes), or (batch, tokens, vocabulary) of a language model.
        target: class indices (batch,) or soft labels (batch, classes); for a language model, token
            indices (batch, tokens), with `IGNORE_INDEX` for excluded tokens.

    Returns:
        A float32 scalar; 0 if no token has a label.
    """
    if logits.dim() == 3:
        rows, flat = logits.float().flatten(0, 1), target.flatten()
        total = F.cross_entropy(rows, flat, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / (flat != IGNORE_INDEX).sum().clamp_min(1)
    return F.cross_entropy(logits.float(), target)


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the binary cross-entropy, summed over classes and averaged over the batch.

    Args:
        logits: (batch, classes).
        target: class indices (batch,) or soft labels (batch, classes).

    Returns:
        A float32 scalar.

    Source: Wightman et al., "ResNet strikes back", arXiv 2110.00476.
    """
    if target.dim() == 1:
        target = F.one_hot(target, logits.shape[1])
    losses = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    return losses.sum(1).mean()


def distillation(
    logits: Tensor, teacher: Tensor, temperature: float = 1.0, counted: Tensor | None = None
) -> Tensor:
    """Compute the distillation loss T^2 KL(softmax(teacher / T) || softmax(logits / T)).

    The divergence is averaged over the batch.

    Args:
        logits: logits of the student, (batch, classes) or (batch, tokens, vocabulary).
        teacher: logits of the teacher, of the same shape; they receive no gradient.
        temperature: T > 0.
        counted: for a language model, tokens to average over, bool (batch, tokens).

    Returns:
        A float32 scalar; 0 if both distributions are equal.

    Source: Hinton et al., arXiv 1503.02531.
    """
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    target = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    if counted is not None:
        tokens = F.kl_div(student, target, reduction="none", log_target=True).sum(-1)
        return (tokens * counted).sum() / counted.sum().clamp_min(1) * temperature**2
    return F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


LabelLoss = Callable[[Tensor, Tensor], Tensor]
# (width, its logits, {wider width: its logits}, widest first) -> scalar loss
WidthLoss = Callable[[int | None, Tensor, dict[int | None, Tensor]], Tensor]

LOSSES: dict[str, LabelLoss] = {"cross_entropy": cross_entropy, "bce": bce}
TEACHERS = ("none", "widest", "recursive", "external")


def make_width_loss(
    label_loss: LabelLoss,
    target: Tensor,
    teacher: str,
    external: Tensor | None = None,
    distill_weight: float = 1.0,
    temperature: float = 1.0,
) -> WidthLoss:
    """Build the loss function that the joint step applies to each width.

    A width without a teacher is trained on the labels. A width with a teacher is trained on
    (1 - distill_weight) * label loss + distill_weight * distillation loss.

    Args:
        label_loss: a value of `LOSSES`.
        target: labels, in the form that `label_loss` expects.
        teacher: one of `TEACHERS`. "external" is the teacher of every width. With the other
            choices, an external teacher, if given, is the teacher of the widest width.
        external: logits of the external teacher, of the shape of the student's.
        distill_weight: weight of the distillation loss, from 0 to 1.
        temperature: temperature of the distillation loss.

    Returns:
        The loss of one width, given the logits of the wider widths of the same step.
    """

    def width_loss(bits: int | None, logits: Tensor, wider: dict[int | None, Tensor]) -> Tensor:
        soft_target = external if teacher == "external" or not wider else None
        if soft_target is None and wider and teacher != "none":
            soft_target = list(wider.values())[0 if teacher == "widest" else -1]
        if soft_target is None:
            return label_loss(logits, target)
        counted = target != IGNORE_INDEX if logits.dim() == 3 else None
        soft = distillation(logits, soft_target, temperature, counted)
        if distill_weight == 1.0:
            return soft
        return (1 - distill_weight) * label_loss(logits, target) + distill_weight * soft

    return width_loss


def with_label_checks(
    width_loss: WidthLoss, task: str, target: Tensor, read_labels: bool
) -> WidthLoss:
    """Return `width_loss` with messages that say which logits or labels do not fit.

    Args:
        width_loss: loss of one width.
        task: a value of `model.task`.
        target: labels of the batch.
        read_labels: read the labels at the first width, and not only after an error.

    Returns:
        The same loss. It raises UserError if logits or labels do not fit the task.
    """

    def checked(bits: int | None, logits: Tensor, wider: dict[int | None, Tensor]) -> Tensor:
        check_logits(task, logits, target, soft=True)
        if read_labels and not wider:
            check_labels(logits, target)
        try:
            return width_loss(bits, logits, wider)
        except (IndexError, RuntimeError):
            if not target.is_cuda:  # a GPU that failed cannot be read
                check_labels(logits, target)
            raise

    return checked
