"""PredictionWriter: write the predictions of `predict` to a CSV file in the run folder."""

import csv
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from tq_lightning.callbacks.own_data import describe, other_settings, part_of_split
from tq_lightning.files import atomic_write
from tq_lightning.records import NAME, read_record


class PredictionWriter(BasePredictionWriter):
    """Write predictions.csv: sample index, class index, class name and probability.

    Unreadable images have no row; the other samples keep their index in the split. Predictions of
    other data than the run's own, of a part of it, or in another precision do not replace that
    file: they are written to a new one, predictions-other-N.csv. With several processes, each
    writes the rows of its samples to a file whose name ends with its rank, e.g. predictions-0.csv.

    Args:
        folder: the run's folder.
        config: the resolved configuration, plain types.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        super().__init__("epoch")
        self.folder, self.config = folder, config
        self._trained: dict[str, Any] | None = None  # configuration of the run

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Read the configuration of the run; a checkpoint outside of a run folder has none.

        Raises:
            UserError: the record of the run is damaged.
        """
        super().setup(trainer, pl_module, stage)
        if (self.folder / NAME).is_file():
            self._trained = read_record(self.folder / NAME).config

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        predictions: Sequence[Tensor],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write the file."""
        names = getattr(trainer.datamodule, "class_names", [])  # type: ignore[attr-defined]
        self.folder.mkdir(parents=True, exist_ok=True)
        other, name = self._other(trainer), "predictions"
        if other:
            name = trainer.strategy.broadcast(self._unused_name())
        rank = "" if trainer.world_size == 1 else f"-{trainer.global_rank}"
        target = self.folder / f"{name}{rank}.csv"
        loader = getattr(trainer, "predict_dataloaders", None)
        samples = loader.scored() if hasattr(loader, "scored") else itertools.count()  # type: ignore[union-attr]
        number = 0
        with (
            atomic_write(target) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["sample", "class", "name", "probability"])
            numbers = iter(samples)
            for batch in predictions:
                probability, index = batch.max(1)
                for p, c in zip(probability.tolist(), index.tolist(), strict=True):
                    writer.writerow(
                        [next(numbers), c, names[c] if c < len(names) else c, f"{p:.6f}"]
                    )
                    number += 1
        if trainer.is_global_zero:
            self._remove_ranks(name, trainer.world_size)
        what = f" (not of {describe(other)})" if other else ""
        print(f"{number} predictions{what}: {target}")

    def _remove_ranks(self, name: str, processes: int) -> None:
        """Remove the files of an earlier call with another number of processes."""
        written = {f"{name}-{rank}.csv" for rank in range(processes)}
        if processes == 1:
            written = {f"{name}.csv"}
        for path in self.folder.glob(f"{name}*.csv"):
            if re.fullmatch(r"(-\d+)?", path.stem.removeprefix(name)) and path.name not in written:
                path.unlink(missing_ok=True)

    def _other(self, trainer: L.Trainer) -> list[str]:
        """Return the settings by which these are not predictions of the run's own data."""
        if self._trained is None:
            return []
        part = part_of_split(trainer.num_predict_batches, trainer.predict_dataloaders)
        return other_settings(self._trained, self.config, part)

    def _unused_name(self) -> str:
        """Return the first name predictions-other-N, without suffix, that has no file."""
        names = (f"predictions-other-{number}" for number in itertools.count(1))
        return next(name for name in names if not any(self.folder.glob(f"{name}[.-]*")))
