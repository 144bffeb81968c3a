"""The callback that reports a trial's metric to the study and stops a pruned trial."""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

# (step, value) -> True to stop. The worker sets it while its trial runs in this process. It is a
# module attribute, not an argument, because the configuration of a trial is saved and logged, and
# an argument would expose the password in the storage's URL.
report: Callable[[int, float], bool] | None = None


class ReportToStudy(pl.Callback):
    """Report `monitor` after every validation; as in W&B, the n-th value is step n.

    Under DDP, rank 0, which is the process of the worker, reports and decides for all ranks. A
    pruned trial ends like a completed run and writes its record. A resumed fit first reports the
    values in its checkpoint, so that the pruner sees the full curve. Outside of a sweep, as in
    a fit with the saved configuration of a trial, it does nothing.

    Args:
        monitor: key of the metric.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.values: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the values reported so far."""
        return {"values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the values reported before the checkpoint."""
        self.values = list(state_dict["values"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the values of a resumed fit. They do not prune it."""
        if trainer.is_global_zero and report is not None:
            for step, value in enumerate(self.values, 1):
                if math.isfinite(value):
                    report(step, value)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the metric and stop the trial if the pruner decides to.

        Raises:
            RuntimeError: the metric is not logged, or Lightning started rank 0 in a new process,
                which is not the worker.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics))
            raise RuntimeError(f"{self.monitor} is not logged; this run logs {logged}")
        value = float(trainer.callback_metrics[self.monitor])
        self.values.append(value)
        stop: Any = False
        if trainer.is_global_zero:
            launcher = trainer.strategy.launcher
            if report is None and isinstance(launcher, _MultiProcessingLauncher):
                raise RuntimeError(
                    "pruning needs the worker to be rank 0; pass trainer.strategy ddp instead of "
                    "ddp_spawn or ddp_fork, or use one process"
                )
            if report is not None and math.isfinite(value):
                stop = report(len(self.values), value)
        if trainer.strategy.broadcast(stop):
            trainer.should_stop = True
