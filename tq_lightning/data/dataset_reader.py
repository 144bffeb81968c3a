"""Reader of a map-style data set of the user, with random draws that depend only on the sample."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tq_lightning.data.augment import seeded
from tq_lightning.data.worker_loader import Key, WorkerLoader
from tq_lightning.errors import UserError, first_line


class _Seeded:
    """Map-style data set whose random draws depend only on the key, (sample index, seed)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Key) -> Any:
        number, seed = key
        with seeded(seed):
            return self.dataset[number]


class _NoBatch(str):
    """Reason why samples could not be collated, returned by a worker process instead of a batch."""


class _Collate:
    """The `collate_fn` of a data set, which returns an error of torch as a `_NoBatch`."""

    def __init__(self, collate: Callable[[list], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list) -> Any:
        try:
            return self.collate(samples)
        except (RuntimeError, TypeError) as error:
            return _NoBatch(first_line(error))


class DatasetReader:
    """Batches of a map-style data set by sample index, with the interface of `BatchReader`.

    Args:
        dataset: index -> (input, label) or a mapping, in a form that `collate` can stack.
        collate: `collate_fn` of the data set.
        workers: number of worker processes. They persist over the epochs.
    """

    def __init__(self, dataset: Any, collate: Callable[[list], Any], workers: int) -> None:
        self.missing: set[int] = set()  # every sample is read
        self._loader = WorkerLoader(_Seeded(dataset), _Collate(collate), workers)

    def __call__(
        self, batches: Callable[[], Iterator[Tensor]], seed: int = 0, epoch: int = 0
    ) -> Iterator[Any]:
        """Yield the collated batches of an epoch.

        Raises:
            UserError: samples could not be collated.
        """
        for batch in self._loader.read(batches, seed, epoch):
            if isinstance(batch, _NoBatch):
                raise UserError(
                    f"the samples of the data set can't be stacked ({batch}); pad them to the same "
                    "shape, or give the data set a collate_fn"
                )
            yield batch
