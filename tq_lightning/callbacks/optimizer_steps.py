"""Optimizer steps and losses in callbacks: under accumulation, only some batches take a step."""

from typing import Any

import lightning as L


class OptimizerSteps:
    """Detect at the end of each training batch whether it took an optimizer step."""

    def __init__(self) -> None:
        self.count = 0
        """Optimizer steps so far, including those of earlier attempts at the run."""

    def start(self, trainer: L.Trainer) -> None:
        """Initialize the count of a new or resumed run. Call it in `on_train_start`."""
        self.count = trainer.global_step

    def advanced(self, trainer: L.Trainer) -> bool:
        """Return True if a step was taken since the last call. Call it in `on_train_batch_end`."""
        before, self.count = self.count, trainer.global_step
        return self.count > before


def takes_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Return True if a training batch ends in an optimizer step; for `on_train_batch_start`."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def batch_loss(trainer: L.Trainer, outputs: Any) -> float:
    """Return the loss of a training batch; for `on_train_batch_end`.

    Lightning divides the loss in `outputs` by the number of accumulated batches.
    """
    return float(outputs["loss"] * trainer.accumulate_grad_batches)


def validation_follows(trainer: L.Trainer, batch_idx: int) -> bool:
    """Return True if this training batch is followed by a validation or the end of the epoch.

    Lightning treats a checkpoint between the two as one after the validation: a run killed in that
    validation would resume without it, and a last epoch would not be evaluated.
    """
    every = trainer.val_check_batch
    if trainer.is_last_batch or every is None or every == float("inf"):
        return trainer.is_last_batch
    loop = trainer.fit_loop.epoch_loop
    batch = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    return trainer.enable_validation and (batch + 1) % every == 0
