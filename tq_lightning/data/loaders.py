"""Loaders for Lightning: plain iterables, whose sampler and position Lightning leaves alone."""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from tq_lightning.data.augment import BatchAugment, seeded
from tq_lightning.data.images import UnreadableImage
from tq_lightning.data.sampling import TrainOrder, derive_seed, eval_batches, share
from tq_lightning.errors import UserError

# Forking is safe on Linux alone; elsewhere, and from Python 3.14 on, other methods are the default.
START_METHOD = "fork" if sys.platform == "linux" else None
_MAX_UNREADABLE = 50  # consecutive images


class Item(NamedTuple):
    """One sample as a worker process returns it."""

    image: Tensor | None
    """uint8 (C, H, W); None if it can't be read."""
    label: int
    error: str
    """Why the image can't be read, or why another one took its place; else empty."""
    number: int
    """Sample number that was asked for."""


class ImageDataset:
    """Map-style data set of `Item`s for worker processes. A key is (sample number, seed).

    An image that can't be read has no `image`, so that an evaluation can leave it out. In training,
    where a batch must keep its size, the next image that can be read takes its place.

    Args:
        read: sample number -> (PIL image, class number). May raise `UnreadableImage`.
        count: number of samples.
        transform: PIL image -> uint8 tensor. It may draw from the global generators, which are
            seeded for every sample.
        replace: whether other images take the place of those that can't be read.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Any, int]],
        count: int,
        transform: Callable[[Any], Tensor],
        replace: bool,
    ) -> None:
        self.read, self.count, self.transform, self.replace = read, count, transform, replace

    def __getitem__(self, key: tuple[int, int]) -> Item:
        number, seed = key
        reason = ""
        for step in range(min(self.count, _MAX_UNREADABLE) if self.replace else 1):
            try:
                image, label = self.read((number + step) % self.count)
            except UnreadableImage as error:
                reason = reason or str(error)
                continue
            with seeded(seed):
                return Item(torch.as_tensor(self.transform(image)), int(label), reason, number)
        return Item(None, 0, reason, number)


def _collate(items: list[Item]) -> tuple[Any, Any, list[str], list[int]]:
    """Collate a batch into (images, labels, errors, numbers of the unreadable samples).

    Images are (batch, ...), labels (batch,). Both are None if every image is unreadable.
    """
    errors = [item.error for item in items if item.error]
    missing = [item.number for item in items if item.image is None]
    readable = [(item.image, item.label) for item in items if item.image is not None]
    images, labels = default_collate(readable) if readable else (None, None)
    return images, labels, errors, missing


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
        self.missing: set[int] = set()
        """Sample numbers that were left out of an evaluation, since they can't be read."""

    def __call__(
        self, batches: Callable[[], Iterator[Tensor]], seed: int = 0, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the batches of an epoch.

        Args:
            batches: makes an iterator over the sample numbers of each batch.
            seed: run seed, for the transforms.
            epoch: number of the epoch, for the transforms.

        Yields:
            (images uint8 (B, C, H, W), labels int64 (B,)). Without the images that can't be read,
            a batch of an evaluation is smaller; one that would be empty is left out.

        Raises:
            UserError: in training, many images in a row can't be read; in an evaluation, none can.
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
                multiprocessing_context=START_METHOD if self.workers else None,
            )
        known, found = len(self._unreadable), False
        try:
            for images, labels, errors, missing in self._loader:
                self._unreadable.update(dict.fromkeys(errors))
                if missing and self.items.replace:  # type: ignore[union-attr]
                    raise UserError(
                        f"{min(len(self.labels), _MAX_UNREADABLE)} images in a row can't be read, "
                        f"the first is {errors[0]}; copy or unpack the data set again"
                    )
                self.missing.update(missing)
                if images is not None:
                    found = True
                    yield images, labels
            if self._unreadable and not found:
                raise UserError(
                    f"none of {len(self._unreadable)} images can be read, the first is "
                    f"{next(iter(self._unreadable))}; copy or unpack the data set again"
                )
        finally:
            if len(self._unreadable) > known:
                self._report()

    def _report(self) -> None:
        """Print one line that counts the images that can't be read, in this process."""
        how = (
            f"skipped {len(self._unreadable)} of {len(self.labels)} images, others took their place"
            if self.items is not None and self.items.replace
            else f"left {len(self._unreadable)} images that can't be read out of the evaluation"
        )
        first = next(iter(self._unreadable))
        print(f"{how}; the first is {first}", file=sys.stderr, flush=True)


class TrainLoader:
    """Training batches (images uint8, labels, draw) of one process.

    `draw` holds the random numbers of `BatchAugment` for the batch. Inside `fit`, Lightning's
    counters, which a checkpoint restores, say which batch of which epoch comes next. They are read
    when the first batch is asked for, so a run resumed inside an epoch sees exactly the rest of it.
    Elsewhere iteration starts at batch 0 of the epoch last given to `set_epoch`.

    Args:
        fetch: reader of the split.
        order: batches of every epoch.
        augment: augmentation that draws the numbers; None yields batches as they are read.
        data: name of the data set, kept in checkpoints.
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
                f"{self.state_dict()}: pass the same data.seed, data.samples and global batch "
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
        """Values that determine the order of the data; Lightning's counters hold the position."""
        order = self.order
        state = {"seed": order.seed, "samples": order.samples.numel(), "batch": order.size}
        return {**state, "data": self.data} if self.data else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state for the next iteration, which refuses to resume inside another order."""
        self._saved = state


def fit_progress(trainer: Any, loader: TrainLoader) -> tuple[int, int] | None:
    """Return (epoch, next batch) by Lightning's counters if a running fit trains on `loader`."""
    if trainer is None or not trainer.training or trainer.train_dataloader is not loader:
        return None
    fit = trainer.fit_loop
    return fit.epoch_progress.current.processed, fit.epoch_loop.batch_progress.current.ready


class EvalLoader:
    """Evaluation batches (images uint8, labels) of one process, in order, each sample once.

    An image that can't be read is left out. Another one in its place would be scored twice.

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

    def scored(self) -> list[int]:
        """Return the sample numbers of the last iteration, in order, without the unreadable ones.

        If the iteration was cut short, the last ones were not read.
        """
        numbers = torch.cat(self.batches).tolist()
        return [number for number in numbers if number not in self.fetch.missing]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.fetch(lambda: iter(self.batches))
