"""Weights & Biases: a logger that gets along with sweeps, and a callback that puts a run's record among its files."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tq_lightning.records import read_record


class OwnRunLogger(WandbLogger):
    """A WandbLogger whose run ends with its fit: a run left open would take in the next fit of this process, a sweep's say."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def make_wandb_logger(run_dir: Path, config: dict[str, Any]) -> WandbLogger:
    """One W&B run for this run, with its resolved configuration; its files go below `run_dir`.

    An agent's sweep gives the run its id and project through the environment, so neither is set here where it does; what
    the sweep itself set is left to it. Only rank 0 makes a run.
    """
    in_sweep = "WANDB_SWEEP_ID" in os.environ
    project = None if in_sweep else os.environ.get("WANDB_PROJECT", "tq_lightning")
    logger = OwnRunLogger(
        name=None if in_sweep else run_dir.name, save_dir=run_dir, project=project, log_model=False
    )
    if getattr(rank_zero_only, "rank", 0) == 0:  # whoever launched this process, torchrun or Slurm
        run_dir.mkdir(parents=True, exist_ok=True)
        # a sweep locks the keys it set, and with them whole sections: the resolved values go beside them
        logger.experiment.config.update(
            {"resolved": config} if in_sweep else config, allow_val_change=True
        )
    return logger


class WandbRecord(L.Callback):
    """At the end of a fit: the table by width, its figure, and record.json among the files of the W&B run."""

    def __init__(self, record: Path) -> None:
        self.record = record

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        logger = next((lo for lo in trainer.loggers if isinstance(lo, WandbLogger)), None)
        if logger is None or not trainer.is_global_zero or not self.record.is_file():
            return
        import wandb

        run = logger.experiment
        results = read_record(self.record).widths or {}
        rows = [
            [bits, results[bits].quantize, results[bits].truncate, results[bits].qt_gap]
            for bits in sorted(results, reverse=True)
        ]
        if rows:
            table = wandb.Table(
                columns=["bits", "quantize (%)", "truncate (%)", "QT gap (points)"], data=rows
            )
            figure = _figure(rows)
            run.log({"widths": table, "qt_gap": wandb.Image(figure)})
            figure.clf()
        shutil.copyfile(self.record, Path(run.dir) / self.record.name)
        run.save(str(Path(run.dir) / self.record.name), base_path=run.dir, policy="end")


def _figure(rows: list[list[float]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    bits = [row[0] for row in rows]
    axes.plot(bits, [row[1] for row in rows], "o--", color="#0072B2", label="quantized")
    axes.plot(bits, [row[2] for row in rows], "s-", color="#D55E00", label="truncated")
    axes.set(xlabel="bits of a weight", ylabel="top-1 (%)", xticks=sorted(bits))
    axes.legend()
    return figure
