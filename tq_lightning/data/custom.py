"""Data sets from a user's factory: `data.name: package.module:factory`."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import default_collate

from tq_lightning.data.batch_reader import default_workers
from tq_lightning.data.dataset_reader import DatasetReader
from tq_lightning.data.loaders import EvalLoader, TrainLoader, fit_progress
from tq_lightning.data.sampling import (
    CALIBRATION_SEED,
    TrainOrder,
    generator,
    run_seed,
    train_or_val_part,
)
from tq_lightning.data.validation import check_data_options
from tq_lightning.errors import UserError
from tq_lightning.factories import call_factory, is_factory

STAGES = ("train", "val", "test")


def open_custom(
    name: str, arguments: Mapping[str, Any] | None, **options: Any
) -> lightning.LightningDataModule:
    """Call a factory of data sets.

    Args:
        name: `package.module:function`.
        arguments: its arguments.
        **options: the other arguments of `DatasetModule`.

    Returns:
        The LightningDataModule that the factory returns, or a `DatasetModule` of its data sets.

    Raises:
        UserError: see `call_factory`; or the factory returns another type.
    """
    made = call_factory(name, "data.name", **(arguments or {}))
    if isinstance(made, lightning.LightningDataModule):
        return made
    parts = list(made) if isinstance(made, tuple | list) and 2 <= len(made) <= 3 else []
    if not parts or parts[0] is None or not all(p is None or _is_dataset(p) for p in parts):
        raise UserError(
            f"data.name={name}: it returns {_kind(made)}; return a LightningDataModule, "
            "or (train, test) or (train, val, test) data sets with __len__ and __getitem__"
        )
    named = dict(zip(("train", "test") if len(parts) == 2 else STAGES, parts, strict=True))
    given = {stage: part for stage, part in named.items() if part is not None}
    for stage, part in given.items():
        if not len(part):
            raise UserError(f"data.name={name}: its {stage} data set is empty; return samples")
    return DatasetModule(name, given, **options)


def _kind(made: Any) -> str:
    """Return the type of a value, with those of its items if it is a tuple or a list."""
    items = (
        ", ".join(type(item).__name__ for item in made) if isinstance(made, tuple | list) else ""
    )
    return f"a {type(made).__name__}" + (f" of {items[:80]}" if items else "")


def _is_dataset(part: Any) -> bool:
    indexed = hasattr(part, "__getitem__") and hasattr(part, "__len__")
    return indexed and not isinstance(part, str)


class FactoryMeta(type):
    """Make `TQDataModule(name=...)` return the data module of a factory, if `name` is one.

    A metaclass is needed because the signature of `__init__` is the `data:` section.
    """

    @property
    def __signature__(cls) -> inspect.Signature:
        """Signature of `__init__` without self, which `__call__` would hide."""
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(cls, *args: Any, **keys: Any) -> Any:
        """Construct the data module, or call the factory."""
        given = inspect.signature(cls.__init__).bind(None, *args, **keys)  # type: ignore[misc]
        given.apply_defaults()
        values = given.arguments
        if not is_factory(values["name"]):
            return super().__call__(*args, **keys)
        check_data_options(values)
        workers, seed = values["workers"], values["seed"]
        return open_custom(
            values["name"],
            values["data_args"],
            batch_size=values["batch_size"],
            eval_batch_size=values["eval_batch_size"],
            workers=default_workers() if workers is None else workers,
            val_fraction=values["val_fraction"],
            samples=values["samples"],
            seed=run_seed() if seed is None else seed,
        )


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

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> TrainLoader:
        """Create the loader of the training samples."""
        dataset, samples = self._part("train")
        order = TrainOrder(samples, self.batch_size, self.seed, *self._place())
        order.shuffle = not getattr(self.trainer, "overfit_batches", 0.0)
        reader: Any = self._reader(dataset)
        loader = TrainLoader(reader, order, None, str(self.name))
        loader.progress = lambda: fit_progress(self.trainer, loader)
        return loader

    def _eval_loader(self, stage: str) -> EvalLoader:
        dataset, samples = self._part(stage)
        reader: Any = self._reader(dataset)
        return EvalLoader(reader, samples, self.eval_batch_size, *self._place())

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
        order = torch.randperm(samples.numel(), generator=generator(CALIBRATION_SEED))
        chosen = samples[order[: n * self.batch_size]]
        yield from self._reader(dataset)(
            lambda: iter(chosen.split(self.batch_size)), CALIBRATION_SEED
        )


def _labels(dataset: Any) -> Tensor | None:
    """Return the labels of a data set from `labels` or `targets`; None if it has neither."""
    for key in ("labels", "targets"):
        values = getattr(dataset, key, None)
        if values is not None and len(values) == len(dataset):
            labels = torch.as_tensor(values)
            return labels.long() if labels.dim() == 1 else None
    return None
