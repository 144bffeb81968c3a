"""Loaders for Lightning: plain iterables, whose sampler and position Lightning leaves alone."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from tq_lightning.data.augment import BatchAugment, seeded
from tq_lightning.data.images import UnreadableImage
from tq_lightning.data.sampling import TrainOrder, derive_seed, eval_batches, share
from tq_lightning.errors import UserError

# Forking is safe on Linux alone; elsewhere, and from Python 3.14 on, other methods are the default.
_START_METHOD = "fork" if sys.platform == "linux" else None
_MAX_UNREADABLE = 50  # consecutive images


class ImageDataset:
    """Map-style data set for worker processes.

    A key is (sample number, seed of its transform). An item is (uint8 image (C, H, W), label,
    error). An image that can't be read is replaced by the next one that can. The error then says
    why, else it is empty. If none of the next images can be read, the image is None.

    Args:
        read: sample number -> (PIL image, class number). May raise `UnreadableImage`.
        count: number of samples.
        transform: PIL image -> uint8 tensor. It may draw from the global generators, which are
            seeded for every sample.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Any, int]],
        count: int,
        transform: Callable[[Any], Tensor],
    ) -> None:
        self.read, self.count, self.transform = read, count, transform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, int, str]:
        index, seed = key
        reason = ""
        for step in range(min(self.count, _MAX_UNREADABLE)):
            try:
                image, label = self.read((index + step) % self.count)
            except UnreadableImage as error:
                reason = reason or str(error)
                continue
            with seeded(seed):
                return torch.as_tensor(self.transform(image)), int(label), reason
        return None, 0, reason


def _collate(items: list[tuple[Tensor | None, int, str]]) -> tuple[Any, Any, list[str]]:
    """(images, labels, errors) of a batch; images and labels are None if one is missing."""
    errors = [error for *_, error in items if error]
    if any(image is None for image, *_ in items):
        return None, None, errors
    images, labels = default_collate([(image, label) for image, label, _ in items])
    return images, labels, errors


class _Keys:
    """Batch sampler of the workers. It asks for its keys when an epoch starts."""

    def __init__(self) -> None:
        self.keys: Callable[[], Iterator[list[tuple[int, int]]]] = lambda: iter(())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.keys()


class BatchReader:
    """Batches of one split by sample number.

    Images in memory are indexed as a tensor, others are read by worker processes. Only one
    iteration runs at a time: the workers persist, so a new iteration ends the previous one.

    Args:
        labels: (N,) int64.
        pixels: (N, C, H, W) uint8, or None.
        items: data set to read instead of `pixels`.
        workers: number of processes that read `items`. They persist over the epochs.
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
        self._unreadable: dict[str, None] = {}  # in order of appearance

    def __call__(
        self, batches: Callable[[], Iterator[Tensor]], seed: int = 0, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the batches of an epoch.

        Args:
            batches: makes an iterator over the sample numbers of each batch.
            seed: run seed, for the transforms.
            epoch: number of the epoch, for the transforms.

        Yields:
            (images uint8 (B, C, H, W), labels int64 (B,)).

        Raises:
            UserError: many images in a row can't be read.
        """
        if self.pixels is not None and self.items is None:
            for i in batches():
                yield self.pixels.index_select(0, i), self.labels.index_select(0, i)
            return
        self._sampler.keys = lambda: (
            [(n, derive_seed(seed, epoch, n, 5)) for n in i.tolist()] for i in batches()
        )
        if self._loader is None:
            # a generator of its own: a DataLoader otherwise draws a seed from the global one
            self._loader = DataLoader(
                self.items,  # type: ignore[arg-type]
                batch_sampler=self._sampler,  # type: ignore[arg-type]
                num_workers=self.workers,
                collate_fn=_collate,
                persistent_workers=self.workers > 0,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),
                multiprocessing_context=_START_METHOD if self.workers else None,
            )
        known = len(self._unreadable)
        try:
            for images, labels, errors in self._loader:
                self._unreadable.update(dict.fromkeys(errors))
                if images is None:
                    raise UserError(
                        f"{min(len(self.labels), _MAX_UNREADABLE)} images in a row can't be read, "
                        f"the first is {errors[0]}; copy or unpack the data set again"
                    )
                yield images, labels
        finally:
            if len(self._unreadable) > known:
                print(
                    f"skipped {len(self._unreadable)} of {len(self.labels)} images, others took "
                    f"their place; the first is {next(iter(self._unreadable))}",
                    file=sys.stderr,
                    flush=True,
                )


class TrainLoader:
    """Training batches (images uint8, labels, draw) of one process.

    `draw` holds the random numbers of `BatchAugment` for the batch. Inside `fit`, Lightning's
    counters, which a checkpoint restores, say which batch of which epoch comes next. They are read
    when the first batch is asked for, so a run resumed inside an epoch sees exactly the rest of it.
    Elsewhere iteration starts at batch 0 of the epoch last given to `set_epoch`.

    Args:
        fetch: reader of the split.
        order: batches of every epoch.
        augment: augmentation that draws the numbers.
        data: name of the data set, kept in checkpoints.
    """

    def __init__(
        self, fetch: BatchReader, order: TrainOrder, augment: BatchAugment, data: str = ""
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
                f"{self.state_dict()}: pass the same data.seed, data.samples and global batch "
                "size, or a checkpoint from the end of an epoch"
            )
        order = self.order
        mine = share(order.size, order.rank, order.world)
        batches = self.fetch(
            lambda: (samples[mine] for _, samples in order.batches(epoch, start)), order.seed, epoch
        )
        for number, (images, labels) in enumerate(batches, start):
            yield images, labels, self.augment.draw(epoch, number, order.size, mine)

    def state_dict(self) -> dict[str, Any]:
        """Values that determine the order of the data; Lightning's counters hold the position."""
        order = self.order
        state = {"seed": order.seed, "samples": order.samples.numel(), "batch": order.size}
        return {**state, "data": self.data} if self.data else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state for the next iteration, which refuses to resume inside another order."""
        self._saved = state


class EvalLoader:
    """Evaluation batches (images uint8, labels) of one process, in order, each sample once.

    Args:
        fetch: reader of the split.
        samples: (N,) sample numbers.
        batch_size: largest number of samples per batch.
        rank: number of this process.
        world: number of processes.
    """

    def __init__(
        self, fetch: BatchReader, samples: Tensor, batch_size: int, rank: int = 0, world: int = 1
    ) -> None:
        self.fetch, self.batches = fetch, eval_batches(samples, batch_size, rank, world)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.fetch(lambda: iter(self.batches))
