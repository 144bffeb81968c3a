"""Read batches, from memory or by worker processes, and handle unreadable images."""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from tq_lightning.data.augment import seeded
from tq_lightning.data.images import UnreadableImage
from tq_lightning.data.worker_loader import Key, WorkerLoader
from tq_lightning.errors import UserError

_MAX_UNREADABLE = 50  # consecutive images


def default_workers() -> int:
    """Return the number of worker processes: one per CPU that this process may use, at most 8."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)  # macOS and Windows have no CPU affinity of a process


class Item(NamedTuple):
    """One sample as a worker process returns it."""

    image: Tensor | None
    """uint8 (C, H, W); None if it can't be read."""
    label: int
    error: str
    """Reason why the requested image can't be read; empty if it can."""
    number: int
    """Requested sample index."""


class ImageDataset:
    """Map-style data set of `Item`s for worker processes. A key is (sample index, seed).

    The item of an unreadable image has no `image`, so that an evaluation can skip it. In training,
    where a batch must keep its size, the next readable image replaces it.

    Args:
        read: sample index -> (PIL image, class index). May raise `UnreadableImage`.
        count: number of samples.
        transform: PIL image -> uint8 tensor. It may draw from the global generators, which are
            seeded for every sample.
        replace: replace unreadable images with other ones.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Any, int]],
        count: int,
        transform: Callable[[Any], Tensor],
        replace: bool,
    ) -> None:
        self.read, self.count, self.transform, self.replace = read, count, transform, replace

    def __getitem__(self, key: Key) -> Item:
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
    """Collate a batch into (images, labels, errors, indices of the unreadable samples).

    Images are (batch, ...), labels (batch,). Both are None if every image is unreadable.
    """
    errors = [item.error for item in items if item.error]
    missing = [item.number for item in items if item.image is None]
    readable = [(item.image, item.label) for item in items if item.image is not None]
    images, labels = default_collate(readable) if readable else (None, None)
    return images, labels, errors, missing


class BatchReader:
    """Batches of one split by sample index.

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
        self._loader: WorkerLoader | None = None
        self._unreadable: dict[str, None] = {}  # in order of appearance
        self.missing: set[int] = set()
        """Indices of the unreadable samples that an evaluation skipped."""

    def __call__(
        self, batches: Callable[[], Iterator[Tensor]], seed: int = 0, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the batches of an epoch.

        Args:
            batches: returns an iterator over the sample indices of each batch.
            seed: run seed, for the transforms.
            epoch: index of the epoch, for the transforms.

        Yields:
            (images uint8 (B, C, H, W), labels int64 (B,)). In an evaluation, unreadable images make
            a batch smaller, and empty batches are skipped.

        Raises:
            UserError: too many consecutive training images are unreadable, or all images of an
                evaluation are.
        """
        if self.pixels is not None and self.items is None:
            for i in batches():
                yield self.pixels.index_select(0, i), self.labels.index_select(0, i)
            return
        if self._loader is None:
            self._loader = WorkerLoader(self.items, _collate, self.workers)
        known, found = len(self._unreadable), False
        try:
            for images, labels, errors, missing in self._loader.read(batches, seed, epoch):
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
        """Print one line that counts the unreadable images of this process."""
        how = (
            f"replaced {len(self._unreadable)} unreadable images of {len(self.labels)} with others"
            if self.items is not None and self.items.replace
            else f"skipped {len(self._unreadable)} unreadable images in the evaluation"
        )
        first = next(iter(self._unreadable))
        print(f"{how}; the first is {first}", file=sys.stderr, flush=True)
