"""Data module of a user's map-style data sets."""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import default_collate

from tq_lightning.data.dataset_reader import DatasetReader
from tq_lightning.data.loaders import EvalLoader, TrainLoader, make_train_loader, process_index
from tq_lightning.data.sampling import CALIBRATION_SEED, calibration_samples, train_or_val_part
from tq_lightning.errors import UserError


class DatasetModule(lightning.LightningDataModule):
    """Training, validation and test batches of the user's data sets.

    Order, resume, several processes and the held-out validation samples work as for the built-in
    data sets: the order of epoch e depends only on (seed, e), and the random draws of sample n only
    on (seed, e, n).

    Args:
        name: name of the factory.
        parts: data sets by stage: train, test and, optionally, val.
        batch_size: training samples per process and step.
        eval_batch_size: samples per process and step in evaluation.
        workers: number of worker processes.
        val_fraction: fraction of the training set held out if the factory returns no validation
            set.
        samples: number of training samples to use; None is all.
        seed: seed of the order.
    """

    def __init__(
        self,
        name: str,
        parts: dict[str, Any],
        batch_size: int,
        eval_batch_size: int | None,
        workers: int,
        val_fraction: float,
        samples: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.name, self.parts, self.batch_size = name, parts, batch_size
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.workers, self.val_fraction = workers, val_fraction
        self.samples, self.seed = samples, seed
        self.labels = _labels(parts["train"])

    @property
    def num_classes(self) -> int | None:
        """Number of classes, from `num_classes`, `classes` or the labels; None if unknown."""
        train = self.parts["train"]
        own = getattr(train, "num_classes", None)
        if own is not None or getattr(train, "classes", None) is None:
            return own or (None if self.labels is None else int(self.labels.max()) + 1)
        return len(train.classes)

    @property
    def class_names(self) -> list[str]:
        """Class names from `classes` of the training set, else class indices as text."""
        names: Sequence[Any] = getattr(self.parts["train"], "classes", None) or range(
            self.num_classes or 0
        )
        return [str(name) for name in names]

    def split_of(self, stage: str) -> str:
        """Return the name of the data set that a stage reads."""
        return stage if stage in self.parts else "val" if stage == "test" else "train"

    def _part(self, stage: str) -> tuple[Any, Tensor]:
        """Return (data set, sample indices) of the stage train, val or test."""
        split = self.split_of(stage)
        if split not in self.parts:
            raise UserError(f"data.name={self.name}: it returns no {stage} data set")
        dataset = self.parts[split]
        if split != "train":
            return dataset, torch.arange(len(dataset))
        labels = torch.zeros(len(dataset)).long() if self.labels is None else self.labels
        fraction = None if "val" in self.parts else self.val_fraction
        return dataset, train_or_val_part(labels, stage, fraction, self.samples)

    def _reader(self, dataset: Any) -> DatasetReader:
        return DatasetReader(dataset, getattr(dataset, "collate_fn", default_collate), self.workers)

    def train_dataloader(self) -> TrainLoader:
        """Create the loader of the training samples."""
        dataset, samples = self._part("train")
        return make_train_loader(self, self._reader(dataset), samples, None)

    def _eval_loader(self, stage: str) -> EvalLoader:
        dataset, samples = self._part(stage)
        reader: Any = self._reader(dataset)
        return EvalLoader(reader, samples, self.eval_batch_size, *process_index(self.trainer))

    def val_dataloader(self) -> EvalLoader:
        """Create the loader of the validation samples."""
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        """Create the loader of the test samples."""
        return self._eval_loader("test")

    predict_dataloader = test_dataloader

    def calibration_batches(self, n: int) -> Iterator[Any]:
        """Yield fixed training batches to estimate norm statistics from."""
        dataset, samples = self._part("train")
        chosen = calibration_samples(samples, n * self.batch_size)
        yield from self._reader(dataset)(
            lambda: iter(chosen.split(self.batch_size)), CALIBRATION_SEED
        )


def _labels(dataset: Any) -> Tensor | None:
    """Return the labels of a data set from `labels` or `targets`; None without class indices."""
    for key in ("labels", "targets"):
        values = getattr(dataset, key, None)
        if values is not None and len(values) == len(dataset):
            try:
                labels = torch.as_tensor(values)
            except (TypeError, ValueError, RuntimeError):  # e.g. class names
                return None
            return labels.long() if labels.dim() == 1 else None
    return None
