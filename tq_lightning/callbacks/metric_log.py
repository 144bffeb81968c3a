"""MetricLog: log one row of metrics per epoch, and the training loss by step, to every logger."""

import time
from typing import Any

import lightning as L
import torch

from tq_lightning.callbacks.optimizer_steps import OptimizerSteps, batch_loss
from tq_lightning.quant.batches import samples_of, split_batch

LOSS, RATE, SPEED = "train/loss", "train/lr", "train/images_per_second"


class MetricLog(L.Callback):
    """Log to every logger of the Trainer.

    Every epoch has one row with its training losses, the learning rate, the images per second
    (of all processes, without the time of validations) and its validation metrics. The row is
    written before the checkpoint of the epoch. A run that is killed between the two therefore logs
    the row again when it resumes, and a run that resumes from the checkpoint already has it. A
    validation within an epoch has its own row. Every `trainer.log_every_n_steps` optimizer steps, a
    row without `epoch` has the training loss and the learning rate.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        """Epoch of `train_metrics`."""
        self.train_metrics: dict[str, float] = {}
        """Training metrics of the last row."""
        self._pending: dict[str, float] = {}  # metrics of a validation that has no row yet
        self._steps = OptimizerSteps()
        self._images = 0
        self._rate = 0.0  # of the last step; the schedule advances before the batch ends
        self._seconds = self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._steps.start(trainer)
        self.on_train_epoch_start(trainer, pl_module)  # not called if the run resumes in an epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._images, self._seconds, self._since = 0, 0.0, time.monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._rate = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += samples_of(split_batch(batch)[0])
        stepped = self._steps.advanced(trainer)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by its logger connector
        if stepped and every and self._steps.count % every == 0:
            self._write(trainer, {LOSS: batch_loss(trainer, outputs), RATE: self._rate})

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()  # once per epoch: queued steps count as training time
        self._seconds += time.monotonic() - self._since

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._since = time.monotonic()
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        self._pending = {k: float(v) for k, v in metrics.items() if k.startswith("val/")}
        ends = trainer.global_step == trainer.max_steps or trainer.should_stop
        if not (ends or trainer.is_last_batch):
            self._write_epoch(trainer, {})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        losses = {key: float(mean) for key, mean in pl_module.train_losses().items()}
        seconds = self._seconds + time.monotonic() - self._since
        speed = self._images * trainer.world_size / max(seconds, 1e-9)
        self.epoch = trainer.current_epoch
        self.train_metrics = losses | {RATE: self._rate, SPEED: round(speed, 1)}
        pl_module.log_dict(self.train_metrics, logger=False)  # for callbacks that monitor a metric
        self._write_epoch(trainer, self.train_metrics)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._pending and self.epoch is not None:  # a validation after the row of the epoch
            self._write_epoch(trainer, {}, self.epoch)

    def _write_epoch(
        self, trainer: L.Trainer, metrics: dict[str, float], epoch: int | None = None
    ) -> None:
        epoch = trainer.current_epoch if epoch is None else epoch
        self._write(trainer, {**metrics, **self._pending, "epoch": epoch})
        self._pending = {}

    def _write(self, trainer: L.Trainer, row: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step - 1)
