"""The loaders handed to Lightning: plain iterables, so that it neither swaps their sampler nor guesses their place."""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tq_lightning.data.augment import BatchAugment, seeded
from tq_lightning.data.sampling import TrainOrder, derive_seed, eval_batches, share
from tq_lightning.errors import UserError

_FORK = "fork" in multiprocessing.get_all_start_methods()


class ImageDataset:
    """Map-style set of (uint8 image (C, H, W), label) for worker processes; a key is (sample number, seed of its transform).

    Args:
        read: sample number -> (PIL image, class number).
        transform: PIL image -> uint8 tensor; draws from the global generators, which are seeded here for every sample.
    """

    def __init__(
        self, read: Callable[[int], tuple[Any, int]], transform: Callable[[Any], Tensor]
    ) -> None:
        self.read, self.transform = read, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        image, label = self.read(index)
        with seeded(seed):
            return torch.as_tensor(self.transform(image)), int(label)


class _Keys:
    """Batch sampler of the worker path: asks its owner for the keys when an epoch starts, so that workers can live on."""

    def __init__(self) -> None:
        self.keys: Callable[[], Iterator[list[tuple[int, int]]]] = lambda: iter(())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.keys()


class BatchReader:
    """Batches of one split by sample number: by tensor indexing where the images are in memory, else by worker processes.

    One iteration at a time: the workers persist, so that a new iteration ends the one before it.

    Args:
        labels: (N,) int64.
        pixels: (N, C, H, W) uint8 in memory, or None.
        items: read these instead where given.
        workers: processes for `items`; they persist over the epochs.
    """

    def __init__(
        self,
        labels: Tensor,
        pixels: Tensor | None,
        items: ImageDataset | None = None,
        workers: int = 0,
    ) -> None:
        self.labels, self.pixels, self.items, self.workers = labels, pixels, items, workers
        self._sampler = _Keys()
        self._loader: DataLoader | None = None

    def __call__(
        self, batches: Callable[[], Iterator[Tensor]], seed: int = 0, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images uint8, labels) for every tensor of sample numbers that `batches()` yields."""
        if self.pixels is not None and self.items is None:
            for i in batches():
                yield self.pixels.index_select(0, i), self.labels.index_select(0, i)
            return
        self._sampler.keys = lambda: (
            [(n, derive_seed(seed, epoch, n, 5)) for n in i.tolist()] for i in batches()
        )
        if self._loader is None:
            # a generator of its own: a DataLoader otherwise draws a seed from the global one whenever it starts
            self._loader = DataLoader(
                self.items,  # type: ignore[arg-type]
                batch_sampler=self._sampler,  # type: ignore[arg-type]
                num_workers=self.workers,
                persistent_workers=self.workers > 0,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),
                multiprocessing_context="fork" if self.workers and _FORK else None,
            )
        for batch in self._loader:
            yield batch[0], batch[1]


class TrainLoader:
    """Yields (images uint8, labels, draw) of this process; `draw` holds the random numbers of `BatchAugment` for the batch.

    Position: inside `fit`, Lightning's own counters say which batch of which epoch comes next (they are what a
    checkpoint restores), and they are read when the first batch is asked for: a run that goes on in the middle of an
    epoch sees exactly the rest of it. Elsewhere iteration starts at batch 0 of the epoch last given to `set_epoch`.
    """

    def __init__(self, fetch: BatchReader, order: TrainOrder, augment: BatchAugment) -> None:
        self.fetch, self.order, self.augment = fetch, order, augment
        self.epoch = 0
        self.progress: Callable[[], tuple[int, int] | None] = lambda: None
        self._saved: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.order)

    @property
    def sampler(self) -> "TrainLoader":
        """Lightning calls `loader.sampler.set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        epoch, start = self.progress() or (self.epoch, 0)
        saved, self._saved = self._saved, None
        if start and saved is not None and saved != self.state_dict():
            raise UserError(
                f"the checkpoint lies inside an epoch with {saved}, this run has {self.state_dict()}: pass the same "
                "data.seed, data.samples and global batch size, or a checkpoint from the end of an epoch"
            )
        order = self.order
        mine = share(order.size, order.rank, order.world)
        chosen = self.fetch(
            lambda: (samples[mine] for _, samples in order.batches(epoch, start)), order.seed, epoch
        )
        for number, (images, labels) in enumerate(chosen, start):
            yield images, labels, self.augment.draw(epoch, number, order.size, mine)

    def state_dict(self) -> dict[str, int]:
        """What fixes the order of the data, stored in a checkpoint; the place in it is in Lightning's counters."""
        order = self.order
        return {"seed": order.seed, "samples": order.samples.numel(), "batch": order.size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Kept for the first iteration, which refuses to go on in the middle of an epoch of another order."""
        self._saved = state


class EvalLoader:
    """Yields (images uint8, labels) of this process' share of `samples`, in order, each sample once."""

    def __init__(
        self, fetch: BatchReader, samples: Tensor, batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        self.fetch, self.batches = fetch, eval_batches(samples, batch_size, rank, world)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.fetch(lambda: iter(self.batches))
