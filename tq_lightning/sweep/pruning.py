"""The callback that tells a study how a trial is doing, and ends the trial where the pruner says so."""

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

# Set by the worker while its trial runs in this process: (step, value) -> whether to stop. A module attribute, and not an
# argument of the callback: the trial's config is saved and logged, and must not hold the storage's URL with its password.
report: Callable[[int, float], bool] | None = None


class ReportToStudy(pl.Callback):
    """Report `monitor` after every validation; the n-th value is step n, as W&B counts.

    Under DDP rank 0, which is the worker's own process, reports and decides; the others get its decision. A pruned trial ends
    as a run does whose epochs are over, so it has its record. A fit that goes on from a checkpoint has the values up to there
    in it, and reports them first: the pruner sees one whole curve, though the earlier ones came from another trial.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.values: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values = list(state_dict["values"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and report is not None:
            for step, value in enumerate(
                self.values, 1
            ):  # what the pruner says of them it said before: the fit went on
                if math.isfinite(value):
                    report(step, value)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises RuntimeError where the metric isn't logged, or where rank 0 is no process of the sweep's."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            raise RuntimeError(
                f"{self.monitor} is not logged; this run logs {', '.join(sorted(trainer.callback_metrics))}"
            )
        value = float(trainer.callback_metrics[self.monitor])
        self.values.append(value)
        stop: Any = False
        if trainer.is_global_zero:
            if report is None:
                raise RuntimeError(
                    "pruning needs the worker to be rank 0: one process or strategy ddp, not ddp_spawn or ddp_fork"
                )
            stop = math.isfinite(value) and report(len(self.values), value)
        if trainer.strategy.broadcast(stop):
            trainer.should_stop = True
