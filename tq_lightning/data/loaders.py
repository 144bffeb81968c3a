"""Loaders for Lightning: plain iterables that control their own order and position."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tq_lightning.data.augment import BatchAugment
from tq_lightning.data.batch_reader import BatchReader
from tq_lightning.data.sampling import TrainOrder, eval_batches, share
from tq_lightning.errors import UserError


class TrainLoader:
    """Training batches (images uint8, labels, draw) of one process.

    `draw` holds the random numbers of `BatchAugment` for the batch. Inside `fit`, the next epoch
    and batch come from Lightning's counters, which a checkpoint restores. They are read at the
    first batch, so a run that resumes within an epoch gets exactly the remaining batches. Outside
    of `fit`, iteration starts at batch 0 of the epoch last passed to `set_epoch`.

    Args:
        fetch: reader of the split.
        order: batches of every epoch.
        augment: augmentation that draws the numbers; None yields batches without `draw`.
        data: name of the data set, stored in checkpoints.
    """

    def __init__(
        self, fetch: BatchReader, order: TrainOrder, augment: BatchAugment | None, data: str = ""
    ) -> None:
        self.fetch, self.order, self.augment, self.data = fetch, order, augment, data
        self.epoch = 0
        self.progress: Callable[[], tuple[int, int] | None] = lambda: None
        self._saved: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.order)

    @property
    def sampler(self) -> "TrainLoader":
        """The loader itself: Lightning calls `loader.sampler.set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration outside of `fit`."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        epoch, start = self.progress() or (self.epoch, 0)
        saved, self._saved = self._saved, None
        if (
            start
            and saved is not None
            and any(self.state_dict().get(key) != value for key, value in saved.items())
        ):
            raise UserError(
                f"the checkpoint was saved inside an epoch with {saved}, this run has "
                f"{self.state_dict()}; pass the same data.seed, data.samples and global batch "
                "size, or a checkpoint from the end of an epoch"
            )
        order = self.order
        mine = share(order.size, order.rank, order.world)
        batches = self.fetch(
            lambda: (samples[mine] for _, samples in order.batches(epoch, start)), order.seed, epoch
        )
        if self.augment is None:
            yield from batches  # type: ignore[misc]
            return
        for number, (images, labels) in enumerate(batches, start):
            yield images, labels, self.augment.draw(epoch, number, order.size, mine)

    def state_dict(self) -> dict[str, Any]:
        """Return the values that determine the order; Lightning's counters have the position."""
        order = self.order
        state = {"seed": order.seed, "samples": order.samples.numel(), "batch": order.size}
        return {**state, "data": self.data} if self.data else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Store a state, which the next iteration compares with its own order."""
        self._saved = state


def fit_progress(trainer: Any, loader: TrainLoader) -> tuple[int, int] | None:
    """Return (epoch, next batch) of Lightning's counters if a fit is training on `loader`."""
    if trainer is None or not trainer.training or trainer.train_dataloader is not loader:
        return None
    fit = trainer.fit_loop
    return fit.epoch_progress.current.processed, fit.epoch_loop.batch_progress.current.ready


def process_index(trainer: Any) -> tuple[int, int]:
    """Return (rank, number of processes) of a Trainer; (0, 1) without one."""
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)


def make_train_loader(
    module: Any, reader: Any, samples: Tensor, augment: BatchAugment | None
) -> TrainLoader:
    """Create the loader of a data module's training samples, in the order of its seed.

    Args:
        module: a data module with `batch_size`, `seed` and `name`.
        reader: a `BatchReader` or `DatasetReader` of the samples.
        samples: (N,) sample indices.
        augment: see `TrainLoader`.
    """
    order = TrainOrder(samples, module.batch_size, module.seed, *process_index(module.trainer))
    order.shuffle = not getattr(module.trainer, "overfit_batches", 0.0)
    loader = TrainLoader(reader, order, augment, str(module.name))
    loader.progress = lambda: fit_progress(module.trainer, loader)
    return loader


class EvalLoader:
    """Evaluation batches (images uint8, labels) of one process, in order, each sample once.

    Unreadable images are skipped, not replaced, because another image would be counted twice.

    Args:
        fetch: reader of the split.
        samples: (N,) sample indices.
        batch_size: largest number of samples per batch.
        rank: index of this process.
        world: number of processes.
    """

    def __init__(
        self, fetch: BatchReader, samples: Tensor, batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        self.fetch, self.batches = fetch, eval_batches(samples, batch_size, rank, world)

    def scored(self) -> list[int]:
        """Return the sample indices of the last iteration, in order, without unreadable ones.

        They include all samples, even if the iteration ended early.
        """
        numbers = torch.cat(self.batches).tolist()
        return [number for number in numbers if number not in self.fetch.missing]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.fetch(lambda: iter(self.batches))
