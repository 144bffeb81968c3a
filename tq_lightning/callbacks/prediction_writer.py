"""PredictionWriter: write the predictions of `predict` to a CSV file in the run folder."""

import csv
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from tq_lightning.files import atomic_write


class PredictionWriter(BasePredictionWriter):
    """Write predictions.csv: sample index, class index, class name and probability.

    Unreadable images have no row; the other samples keep their index in the split. With several
    processes, each writes the rows of its samples to predictions-RANK.csv.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("epoch")
        self.folder = folder

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        predictions: Sequence[Tensor],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write the file."""
        names = getattr(trainer.datamodule, "class_names", [])  # type: ignore[attr-defined]
        target = self.folder / (
            "predictions.csv"
            if trainer.world_size == 1
            else f"predictions-{trainer.global_rank}.csv"
        )
        self.folder.mkdir(parents=True, exist_ok=True)
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
        print(f"{number} predictions: {target}")
