"""Reader of a map-style data set of the user, with random draws that depend only on the sample."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tq_lightning.data.augment import seeded
from tq_lightning.data.batch_reader import START_METHOD
from tq_lightning.data.sampling import derive_seed
from tq_lightning.errors import UserError, first_line


class _Seeded:
    """Map-style data set whose random draws depend only on the key, (sample index, seed)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        number, seed = key
        with seeded(seed):
            return self.dataset[number]


class _Keys:
    """Batch sampler of the workers, whose keys are set for each epoch."""

    keys: Callable[[], Iterator[list[tuple[int, int]]]]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.keys()


class _NoBatch(str):
    """Why samples could not be collated; passed on from a worker process in place of a batch."""


class _Collate:
    """The `collate_fn` of a data set, with an error of torch's as a `_NoBatch`."""

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
        self._sampler = _Keys()
        self._loader: DataLoader = DataLoader(
            _Seeded(dataset),  # type: ignore[arg-type]
            batch_sampler=self._sampler,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_Collate(collate),
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise a seed is drawn from the global generator
            multiprocessing_context=START_METHOD if workers else None,
        )

    def __call__(
        self, batches: Callable[[], Iterator[Tensor]], seed: int = 0, epoch: int = 0
    ) -> Iterator[Any]:
        """Yield the collated batches of an epoch.

        Raises:
            UserError: samples could not be collated.
        """
        self._sampler.keys = lambda: (
            [(n, derive_seed(seed, epoch, n, 5)) for n in numbers.tolist()] for numbers in batches()
        )
        for batch in self._loader:
            if isinstance(batch, _NoBatch):
                raise UserError(
                    f"the samples of the data set can't be stacked ({batch}); pad them to one "
                    "shape, or give the data set a collate_fn"
                )
            yield batch
