"""Losses: against labels, and against a wider network's logits. One function each; `LOSSES` lists those for labels."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of logits (batch, classes) against labels (batch,) or soft labels (batch, classes)."""
    return F.cross_entropy(logits.float(), target)


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy summed over classes; shapes as in `cross_entropy`. Source: ResNet strikes back, 2110.00476."""
    if target.dim() == 1:
        target = F.one_hot(target, logits.shape[1])
    return (
        F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
        .sum(1)
        .mean()
    )


def distillation(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), mean over the batch. Source: Hinton et al., arXiv 1503.02531.

    Args:
        logits, teacher: (batch, classes); `teacher` carries no gradient. temperature: T > 0.

    Returns:
        A float32 scalar, 0 where the two agree.
    """
    student = F.log_softmax(logits.float() / temperature, dim=1)
    target = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    return F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": cross_entropy, "bce": bce}
TEACHERS = ("none", "widest", "recursive", "external")


def taught(
    hard: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    teacher: str,
    outside: Tensor | None = None,
    share: float = 1.0,
    temperature: float = 1.0,
) -> Callable[[int | None, Tensor, dict[int | None, Tensor]], Tensor]:
    """The loss of each width of a joint step: labels where nobody teaches, else (1 - share) labels + share teacher.

    Args:
        hard: a row of `LOSSES`. target: what it scores against.
        teacher: one of `TEACHERS`. An outside teacher teaches every width where it is "external", else the widest.
        outside: logits (batch, classes) of an outside teacher.
        share, temperature: of `distillation`.

    Returns:
        (width, its logits, {wider width: its logits} widest first) -> scalar.
    """

    def loss(bits: int | None, logits: Tensor, wider: dict[int | None, Tensor]) -> Tensor:
        by = outside if teacher == "external" or not wider else None
        if by is None and wider and teacher != "none":
            by = list(wider.values())[0 if teacher == "widest" else -1]
        if by is None:
            return hard(logits, target)
        soft = distillation(logits, by, temperature)
        return soft if share == 1.0 else (1 - share) * hard(logits, target) + share * soft

    return loss


class EpochLosses:
    """Sums of losses over the samples of an epoch, on their device.

    Lightning's own mean of an epoch starts anew in a run that goes on inside one. `state` is what a checkpoint keeps;
    under several processes it is that of the first, so that there the means of a resumed epoch are not quite those of
    an uninterrupted one.
    """

    def __init__(self) -> None:
        self.state: dict[str, tuple[Tensor, int]] = {}

    def add(self, losses: dict[str, Tensor], samples: int) -> None:
        """Takes in the mean losses (scalars, by key) of a batch of `samples`."""
        for key, loss in losses.items():
            total, count = self.state.get(key, (0.0, 0))
            # what a checkpoint held may lie on another device
            total = total.to(loss.device) if isinstance(total, Tensor) else total
            self.state[key] = (total + loss.detach() * samples, count + samples)

    def means(self) -> dict[str, Tensor]:
        """The mean of each loss, scalars by key."""
        return {key: total / count for key, (total, count) in self.state.items()}
