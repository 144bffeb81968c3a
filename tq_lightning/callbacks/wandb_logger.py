"""Weights & Biases: a logger for one fit, also inside sweeps, and an upload of the record."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tq_lightning.callbacks.metric_log import SPEED
from tq_lightning.errors import UserError, first_line
from tq_lightning.records import TASKS, read_record


class PerFitWandbLogger(WandbLogger):
    """A WandbLogger for one fit.

    Its W&B run ends with the fit; otherwise it would also receive the next fit of the same process,
    e.g. in a sweep. A resumed fit continues the W&B run of its folder and skips values that are
    already logged. W&B cannot replace a value: if a repeated step has another one now, e.g. because
    the configuration changed, its curve has both, and a line says so.

    Args:
        run_dir: the run's folder.
        kwargs: arguments of WandbLogger.
    """

    def __init__(self, run_dir: Path, **kwargs: Any) -> None:
        super().__init__(save_dir=run_dir, log_model=False, **kwargs)
        self._wandb_init.pop("anonymous", None)  # W&B warns that it has no effect
        self._logged_file = run_dir / "wandb" / "logged.txt"
        self._logged: dict[tuple[str, str], set[str]] = {}  # (step, key) -> values, "" if not known
        self._reported = False
        if self._logged_file.is_file():
            for line in self._logged_file.read_text().splitlines():
                step, _, rest = line.partition(" ")
                key, _, value = rest.partition("\t")
                self._logged.setdefault((step, key), set()).add(value)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        texts = {key: _text(value) for key, value in metrics.items() if key != "epoch"}
        before = {key: self._logged.get((str(step), key), set()) for key in texts}
        other = {k for k, was in before.items() if was and not was & {"", texts[k]}} - {SPEED}
        new = other | {key for key, was in before.items() if not was}
        if not new:
            return
        if other and not self._reported:
            self._reported = True
            print(
                f"from step {step} on, values differ from those that W&B has of the same steps: "
                "its curves show both, metrics.csv only the new ones"
            )
        if step is not None and not _is_disabled(self.experiment):
            self._logged_file.parent.mkdir(parents=True, exist_ok=True)
            with self._logged_file.open("a") as file:
                file.writelines(f"{step} {key}\t{texts[key]}\n" for key in texts if key in new)
        super().log_metrics({k: v for k, v in metrics.items() if k in new | {"epoch"}}, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Finish the W&B run."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def _is_disabled(run: Any) -> bool:
    """Return True if W&B keeps nothing of a run: WANDB_MODE=disabled."""
    return not Path(run.dir).is_dir()


def _text(value: Any) -> str:
    """Return a number as text; "" for other values, which are not compared."""
    try:
        return repr(float(value))
    except (TypeError, ValueError, RuntimeError):
        return ""


def earlier_id(run_dir: Path) -> str | None:
    """Return the id of the W&B run of an earlier attempt, from the name of its folder."""
    for folder in sorted(run_dir.glob("wandb/*run-*")):
        if match := re.fullmatch(r"(offline-)?run-\d{8}_\d{6}-(.+)", folder.name):
            return match[2]
    return None


def make_wandb_logger(run_dir: Path, config: dict[str, Any]) -> WandbLogger:
    """Start a W&B run with the resolved configuration; its files are written below `run_dir`.

    A W&B agent passes the id and the project of the run through the environment. Inside a W&B
    sweep, neither is therefore set here, and the keys set by the sweep are not changed. Only rank 0
    starts a run.

    Raises:
        UserError: W&B does not start, e.g. because the API key is missing.
    """
    import wandb

    in_sweep = "WANDB_SWEEP_ID" in os.environ
    project = None if in_sweep else os.environ.get("WANDB_PROJECT", "tq_lightning")
    logger = PerFitWandbLogger(
        run_dir,
        name=None if in_sweep else run_dir.name,
        project=project,
        id=None if in_sweep else earlier_id(run_dir),
    )
    if getattr(rank_zero_only, "rank", 0) == 0:  # works under torchrun and SLURM too
        run_dir.mkdir(parents=True, exist_ok=True)
        # a sweep locks the keys that it has set, and therefore their sections
        resolved = {"resolved": config} if in_sweep else config
        try:
            logger.experiment.config.update(resolved, allow_val_change=True)
        except wandb.Error as error:
            raise UserError(
                f"W&B did not start ({first_line(error)}); run `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
    return logger


class WandbRecord(L.Callback):
    """Add the table by width, its figure and record.json to the W&B run at the end of a fit.

    Args:
        record: path of record.json.
    """

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
            metric = TASKS[pl_module.hparams.task]
            unit = metric.unit or metric.name
            heads = [f"quantize ({unit})", f"truncate ({unit})", f"QT gap ({metric.gap_unit})"]
            table = wandb.Table(columns=["bits", *heads], data=rows)
            figure = _figure(rows, f"{metric.name} ({metric.unit})" if metric.unit else metric.name)
            run.log({"widths": table, "qt_gap": wandb.Image(figure)})
            figure.clf()
        if _is_disabled(run):
            return
        shutil.copyfile(self.record, Path(run.dir) / self.record.name)
        run.save(str(Path(run.dir) / self.record.name), base_path=run.dir, policy="end")


def _figure(rows: list[list[Any]], label: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    bits = [row[0] for row in rows]
    axes.plot(bits, [row[1] for row in rows], "o--", color="#0072B2", label="quantized")
    axes.plot(bits, [row[2] for row in rows], "s-", color="#D55E00", label="truncated")
    axes.set(xlabel="bits of a weight", ylabel=label, xticks=sorted(bits))
    axes.legend()
    return figure
