"""Scores of an evaluation, one class per task: they sum over batches and return metrics by width.

To add a task, write its class, a row of `SCORES`, and a row of `records.TASKS`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tq_lightning.callbacks.width_metrics import (
    TOP,
    Pass,
    hits,
    perplexity_metrics,
    top5_metrics,
    width_metrics,
)
from tq_lightning.errors import TrainingError
from tq_lightning.quant.label_checks import IGNORE_INDEX

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over all processes
MAX_CROSS_ENTROPY = 700.0  # largest cross-entropy whose exponential is finite in float64


class Accuracy:
    """Top-1 and top-5 of every pass, and the cross-entropy of the truncated trained widths.

    Args:
        passes: (width, source) pairs.
        hparams: hyperparameters of the module, for `max_bits` and `num_classes`.
        widths: trained widths.
        device: device of the sums.
    """

    def __init__(
        self, passes: list[Pass], hparams: Any, widths: tuple[int, ...], device: torch.device
    ) -> None:
        self.hparams, self.widths = hparams, widths
        zeros = torch.zeros(3, dtype=torch.int64, device=device)
        self._hits = {p: zeros.clone() for p in passes}  # (images, top-1, top-5)
        self._losses = {bits: torch.zeros((), device=device) for bits in widths}

    def add(self, logits: dict[Pass, Tensor], target: Tensor) -> None:
        """Add a batch: logits (batch, classes) of every pass, and class indices (batch,).

        Samples with the label `IGNORE_INDEX` are not counted, as in the loss.
        """
        for p, out in logits.items():
            self._hits[p] += torch.stack(
                [(target != IGNORE_INDEX).sum(), *(right.sum() for right in hits(out, target))]
            )
        for bits, total in self._losses.items():
            total += F.cross_entropy(logits[bits, "truncate"].float(), target, reduction="sum")

    def metrics(self, stage: str, reduce: Reduce) -> dict[str, float]:
        """Return the metrics of a stage, "val" or "test", by key.

        Raises:
            TrainingError: no sample has a label.
        """
        passes = list(self._hits)
        counts = reduce(torch.stack(list(self._hits.values())))
        sums = reduce(torch.stack(list(self._losses.values())))
        images, top1, top5 = counts.view(len(passes), 3).T.cpu()
        if not images[0]:
            raise TrainingError(f"no {stage} sample has a label; all are {IGNORE_INDEX}")
        accuracy, accuracy5 = (
            {
                p: round(100.0 * float(n / total), 5)
                for p, n, total in zip(passes, found, images, strict=True)
            }
            for found in (top1, top5)
        )
        values = width_metrics(stage, accuracy, self.hparams.max_bits, self.widths)
        if (self.hparams.num_classes or TOP) >= TOP:
            values |= top5_metrics(stage, accuracy5, self.widths)
        losses = {b: float(s) / int(images[0]) for b, s in zip(self._losses, sums, strict=True)}
        values |= {f"{stage}/loss_w{bits}": loss for bits, loss in losses.items()}
        values[f"{stage}/loss"] = sum(losses.values()) / len(losses)
        values[f"{stage}/images"] = float(images[0])
        return values


class Perplexity:
    """Perplexity of every pass: the exponential of the mean cross-entropy of the labeled tokens.

    Cross-entropies are summed, in float64 if the device supports it, so that the perplexity of a
    poor network is large but finite.

    Args:
        passes: (width, source) pairs.
        hparams: hyperparameters of the module, for `max_bits`.
        widths: trained widths.
        device: device of the sums.
    """

    def __init__(
        self, passes: list[Pass], hparams: Any, widths: tuple[int, ...], device: torch.device
    ) -> None:
        self.hparams, self.widths = hparams, widths
        kind = torch.float32 if device.type == "mps" else torch.float64
        self._sums = {p: torch.zeros((), dtype=kind, device=device) for p in passes}
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, logits: dict[Pass, Tensor], target: Tensor) -> None:
        """Add a batch: logits (batch, tokens, vocabulary) of every pass, labels (batch, tokens)."""
        flat = target.flatten()
        for p, out in logits.items():
            rows = out.float().flatten(0, -2)
            self._sums[p] += F.cross_entropy(rows, flat, ignore_index=IGNORE_INDEX, reduction="sum")
        self._tokens += (flat != IGNORE_INDEX).sum()

    def metrics(self, stage: str, reduce: Reduce) -> dict[str, float]:
        """Return the metrics of a stage, "val" or "test", by key.

        Raises:
            TrainingError: no token has a label.
        """
        tokens = int(reduce(self._tokens))
        if tokens == 0:
            raise TrainingError(f"no token of the {stage} data has a label; all are {IGNORE_INDEX}")
        sums = reduce(torch.stack(list(self._sums.values())))
        losses = {p: float(s) / tokens for p, s in zip(self._sums, sums, strict=True)}
        perplexity = {p: math.exp(min(loss, MAX_CROSS_ENTROPY)) for p, loss in losses.items()}
        values = perplexity_metrics(stage, perplexity, self.hparams.max_bits)
        trained = {bits: losses[bits, "truncate"] for bits in self.widths}
        values |= {f"{stage}/loss_w{bits}": loss for bits, loss in trained.items()}
        values[f"{stage}/loss"] = sum(trained.values()) / len(trained)
        mean = values[f"{stage}/loss"]
        values[f"{stage}/ppl_truncate_mean"] = math.exp(min(mean, MAX_CROSS_ENTROPY))
        values[f"{stage}/tokens"] = float(tokens)
        return values


# task, a value of `model.task` -> its scores
SCORES: dict[str, type[Accuracy] | type[Perplexity]] = {
    "classification": Accuracy,
    "language_modeling": Perplexity,
}
