"""RunLogger: Lightning's CSV logger in a run's own directory, which goes on with the file of a run that is resumed."""

import csv
import os
from collections.abc import Mapping
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from tq_lightning.files import atomic_write


class _ResumedWriter(ExperimentWriter):
    """Keeps the rows of an existing metrics.csv up to the step that the run goes on from; the later ones come again."""

    def __init__(self, log_dir: str, resume_step: int | None) -> None:
        self._resume_step = resume_step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        if not os.path.isfile(self.metrics_file_path):
            return
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        # a killed run may have left half a row: one without its step, or with more fields than keys
        rows = [row for row in rows if None not in row and (row.get("step") or "").isdigit()]
        kept = [
            row for row in rows if self._resume_step is None or int(row["step"]) < self._resume_step
        ]
        self.metrics_keys = sorted({key for row in rows for key in row})
        with (
            atomic_write(self.metrics_file_path) as temporary,
            temporary.open("w", newline="") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(kept)

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Nothing: the run directory holds the resolved configuration, config.yaml, already."""


class RunLogger(CSVLogger):
    """metrics.csv in `root`/`run`, written at every validation.

    Args:
        root: where the runs lie. run: the run's own folder in it.
        resume_step: step of the checkpoint that the run goes on from; rows from it on are dropped. None keeps all.
    """

    def __init__(self, root: str, run: str, resume_step: int | None = None) -> None:
        super().__init__(root, name="", version=run)
        self.resume_step = resume_step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _ResumedWriter(self.log_dir, self.resume_step)
        return self._experiment  # type: ignore[return-value]

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        super().log_metrics(dict(metrics), step)
        self.save()  # a row an epoch: a killed run keeps what it had logged
