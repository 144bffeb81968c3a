"""Progress of a fit with the time left: a bar in a terminal, otherwise a line every few steps."""

import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import ProgressColumn
from rich.text import Text

from tq_lightning.callbacks.optimizer_steps import OptimizerSteps, batch_loss


class FitClock:
    """Estimate the time left of a fit from the batches of this process so far.

    The estimate includes validations.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._first: int | None = None

    def start(self, trainer: L.Trainer) -> None:
        """Start the clock at the batch at which this process starts."""
        self._start, self._first = time.monotonic(), _batches(trainer)

    def left(self, trainer: L.Trainer) -> str:
        """Return the time left as H:MM:SS; "?" before the first batch or without an end."""
        total = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        done = _batches(trainer) - (self._first or 0)
        if self._first is None or done < 1 or total == float("inf"):
            return "?"
        rest = max(0.0, total - _batches(trainer))
        seconds = (time.monotonic() - self._start) / done * rest
        return str(timedelta(seconds=round(seconds)))


def _batches(trainer: L.Trainer) -> int:
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


class FitProgressBar(RichProgressBar):
    """Lightning's rich progress bar with the time left of the fit instead of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = FitClock()
        self._steps = OptimizerSteps()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._clock.start(trainer)
        self._steps.start(trainer)
        super().on_train_start(trainer, pl_module)

    def get_metrics(self, trainer: L.Trainer, pl_module: Any) -> dict:
        """Return the metrics without the run's name, so that the bar fits 80 columns."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def configure_columns(self, trainer: L.Trainer) -> list:
        """Return Lightning's columns with the time column replaced."""
        left = _TimeLeft(trainer, self._clock)
        return [
            left if type(column).__name__ == "CustomTimeColumn" else column
            for column in super().configure_columns(trainer)
        ]


class _TimeLeft(ProgressColumn):
    """The time left of the fit."""

    max_refresh = 0.5

    def __init__(self, trainer: L.Trainer, clock: FitClock) -> None:
        super().__init__()
        self._trainer, self._clock = trainer, clock

    def render(self, task: Any) -> Text:
        """Return the text of the column."""
        fitting = self._trainer.state.fn == "fit"
        return Text(f"{self._clock.left(self._trainer)} left" if fitting else "")


class ProgressLines(L.Callback):
    """Print a line every `trainer.log_every_n_steps` steps; for output that is not a terminal."""

    def __init__(self) -> None:
        self._clock = FitClock()
        self._steps = OptimizerSteps()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._clock.start(trainer)
        self._steps.start(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print epoch, step, loss and the time left."""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by its logger connector
        stepped = self._steps.advanced(trainer)
        if not trainer.is_global_zero or not every or not stepped or trainer.global_step % every:
            return
        total = trainer.estimated_stepping_batches
        steps = f"{trainer.global_step}" + ("" if total == float("inf") else f"/{total:.0f}")
        loss = batch_loss(trainer, outputs)
        print(
            f"epoch {trainer.current_epoch}, step {steps}, loss {loss:.4g}, "
            f"{self._clock.left(trainer)} left",
            flush=True,
        )
