"""WorkerLoader: a DataLoader that reads given samples, with random draws that depend on them."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tq_lightning.data.sampling import derive_seed

# Forking is safe only on Linux. Other systems, and Python 3.14, have other defaults.
START_METHOD = "fork" if sys.platform == "linux" else None
Key = tuple[int, int]  # (sample index, seed of its random draws)


class _Keys:
    """Batch sampler of the workers, whose keys are set for each epoch."""

    keys: Callable[[], Iterator[list[Key]]]

    def __iter__(self) -> Iterator[list[Key]]:
        return self.keys()


class WorkerLoader:
    """Read batches of samples by worker processes, which persist over the epochs.

    Args:
        dataset: `Key` -> sample.
        collate: samples of a batch -> batch.
        workers: number of worker processes; 0 reads in this process.
    """

    def __init__(self, dataset: Any, collate: Callable[[list], Any], workers: int) -> None:
        self._sampler = _Keys()
        self._loader: DataLoader = DataLoader(
            dataset,
            batch_sampler=self._sampler,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise a seed is drawn from the global generator
            multiprocessing_context=START_METHOD if workers else None,
        )

    def read(self, batches: Callable[[], Iterator[Tensor]], seed: int, epoch: int) -> Iterator[Any]:
        """Return an iterator over the batches of an epoch; it ends the iteration before it.

        Args:
            batches: returns an iterator over the sample indices of each batch.
            seed: run seed.
            epoch: index of the epoch.
        """
        self._sampler.keys = lambda: (
            [(n, derive_seed(seed, epoch, n, 5)) for n in numbers.tolist()] for numbers in batches()
        )
        return iter(self._loader)
