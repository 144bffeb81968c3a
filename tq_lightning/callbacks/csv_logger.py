"""ResumableCSVLogger: a CSV logger that continues the metrics.csv of a resumed run."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of a metrics.csv.

    A killed run may leave an incomplete row, without a step or with more fields than the header.
    Such rows are dropped.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or ["step"]  # a kill may leave an empty file
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} is damaged ({error}); restore or empty it to resume the run"
        ) from None
    if "step" not in header:
        raise UserError(
            f"{path} is damaged (its header has no column step); restore or empty it to resume"
        )
    return [row for row in rows if None not in row and (row.get("step") or "").isdigit()]


class _ResumedWriter(ExperimentWriter):
    """Writer that keeps the rows before the resumed step of an existing metrics.csv.

    Later rows are logged again. Metrics of the same step and epoch as the last row, e.g. those of
    the validation at the end of a stopped run, are added to that row.
    """

    def __init__(self, log_dir: str, resume_step: int | None) -> None:
        self._resume_step = resume_step
        self._trimmed = False
        self._last: dict[str, Any] = {}  # the last row
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Do nothing: Lightning creates the writer before the fit is known to start."""

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Add a row; before the first one, drop the rows that will be logged again."""
        if not self._trimmed:
            self._trimmed = True
            self._trim()
        place = {k: v for k, v in metrics_dict.items() if k == "epoch"} | {"step": step}
        same = place.items() <= self._last.items()
        if same and self._last.keys() & metrics_dict.keys() == {"epoch"}:
            self._add_to_last_row(metrics_dict)
            return
        super().log_metrics(metrics_dict, step)
        self._last = self.metrics[-1]

    def _add_to_last_row(self, metrics: dict[str, float]) -> None:
        rows: list[dict[str, Any]] = list(read_rows(self.metrics_file_path))
        rows[-1] |= metrics
        self._last = self._last | metrics
        self.metrics_keys = sorted({*self.metrics_keys, *metrics})
        self._rewrite(rows)

    def _trim(self) -> None:
        if not os.path.isfile(self.metrics_file_path):
            return
        rows = read_rows(self.metrics_file_path)
        self.metrics_keys = sorted({key for row in rows for key in row})
        self._rewrite(
            row for row in rows if self._resume_step is None or int(row["step"]) < self._resume_step
        )

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._rewrite(read_rows(self.metrics_file_path))

    def _rewrite(self, rows: Any) -> None:
        target = self.metrics_file_path
        with atomic_write(target) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


class ResumableCSVLogger(CSVLogger):
    """Logger of `root`/`run`/metrics.csv that writes each row to disk at once.

    Args:
        root: folder of the runs.
        run: name of the run's folder in `root`.
        resume_step: step of the checkpoint that the run resumes from; rows from that step on are
            dropped. None keeps all.

    Raises:
        UserError: the run resumes and its metrics.csv is damaged.
    """

    def __init__(self, root: str, run: str, resume_step: int | None = None) -> None:
        super().__init__(root, name="", version=run)
        self.resume_step = resume_step
        existing = Path(root) / run / "metrics.csv"
        if resume_step is not None and existing.is_file():
            read_rows(existing)  # raises before the training starts

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of metrics.csv, created on first use."""
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _ResumedWriter(self.log_dir, self.resume_step)
        return self._experiment  # type: ignore[return-value]

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: config.yaml has the hyperparameters."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        """Write a row."""
        try:
            super().log_metrics(dict(metrics), step)
            self.save()
        except OSError as error:
            raise UserError(
                f"cannot write {self.log_dir}/metrics.csv ({error.strerror})"
            ) from error
