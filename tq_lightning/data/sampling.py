"""Assignment of samples to batches.

Everything here is a function of integers alone, so resumed and distributed runs see the same
batches.
"""

import math
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tq_lightning.errors import UserError

# independent of the run's seed: runs are compared on the same held-out images
SPLIT_SEED = 0
# of the order and the augmentation of calibration batches, in every run
CALIBRATION_SEED = 8


def run_seed() -> int:
    """Return the seed of `seed_everything`, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def derive_seed(*numbers: int) -> int:
    """Derive a 63-bit seed from non-negative integers (run seed, epoch, batch, ...).

    Nearby inputs give unrelated seeds.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*numbers: int) -> torch.Generator:
    """Make a CPU generator seeded by `derive_seed(*numbers)`; no global random state changes."""
    return torch.Generator().manual_seed(derive_seed(*numbers))


def stratified(labels: Tensor, count: int, seed: int = SPLIT_SEED) -> Tensor:
    """Pick `count` samples, as evenly over the classes as possible.

    Each class is shuffled, and its j-th of n samples gets the key (j + U) / n with one random U per
    class. The samples with the smallest keys are picked. A class with a single image takes part by
    chance, so a set with one image per class can be split too.

    Args:
        labels: (samples,) int64 class numbers.
        count: number of samples to pick, 0..samples.
        seed: seed of the private generator.

    Returns:
        (count,) int64, sorted sample numbers.
    """
    draw = generator(seed, labels.numel(), 1)
    keys = torch.empty(labels.numel(), dtype=torch.float64)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        offset = torch.rand((), generator=draw, dtype=torch.float64)
        keys[members] = (torch.randperm(members.numel(), generator=draw) + offset) / members.numel()
    return keys.argsort(stable=True)[:count].sort().values


def share(size: int, rank: int, world: int) -> Tensor:
    """Positions in a global batch that belong to one process.

    Process r takes the r-th block from the front and its mirror image from the back. Mixup pairs
    position i with size-1-i, so both samples of a pair are in one process, and reversing the local
    batch pairs them like reversing the global batch.

    Args:
        size: size of the global batch.
        rank: number of the process.
        world: number of processes.

    Returns:
        (size // world,) int64 positions.
    """
    local = size // world
    front, back = (local + 1) // 2, local // 2
    head = torch.arange(rank * front, (rank + 1) * front)
    tail = torch.arange(size - (rank + 1) * back, size - rank * back)
    return torch.cat([head, tail])


class TrainOrder:
    """Batches of every training epoch.

    Epoch e is a permutation drawn from (seed, e) and cut into global batches. The samples that do
    not fill a last batch are left out of the epoch; they differ in every epoch.

    Args:
        samples: (N,) sample numbers of the training part.
        batch_size: samples per process and step. The global batch has batch_size * world.
        seed: run seed.
        rank: number of this process.
        world: number of processes.

    Raises:
        UserError: the samples do not fill one global batch.
    """

    def __init__(
        self,
        samples: Tensor,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.samples, self.seed, self.rank, self.world = samples, seed, rank, world
        self.shuffle = True
        self.size = batch_size * world
        if samples.numel() < self.size:
            processes = f"{world} x " if world > 1 else ""
            raise UserError(
                f"data.batch_size={batch_size} is too large: {samples.numel()} training samples do "
                f"not fill a batch of {processes}{batch_size}; lower it"
            )

    def __len__(self) -> int:
        return self.samples.numel() // self.size

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Yield (batch number, (size,) sample numbers of the global batch) of an epoch.

        Args:
            epoch: number of the epoch.
            start: first batch to yield.
        """
        samples = self.samples
        if self.shuffle:
            samples = samples[
                torch.randperm(len(samples), generator=generator(self.seed, epoch, 2))
            ]
        for batch in range(start, len(self)):
            yield batch, samples[batch * self.size : (batch + 1) * self.size]


def eval_batches(samples: Tensor, batch_size: int, rank: int = 0, world: int = 1) -> list[Tensor]:
    """Evaluation batches of one process.

    Every sample is in exactly one process. All processes get the same number of batches, since a
    collective operation in an evaluation step would hang otherwise; batch sizes differ instead.

    Args:
        samples: (N,) sample numbers.
        batch_size: largest number of samples per batch.
        rank: number of this process.
        world: number of processes.

    Returns:
        Sample numbers of each batch.

    Raises:
        UserError: there are fewer samples than processes.
    """
    if samples.numel() < world:
        raise UserError(
            f"{samples.numel()} samples to evaluate for {world} processes; use fewer devices"
        )
    mine = samples[rank::world]
    if world == 1:
        return list(mine.split(batch_size))
    largest = math.ceil(samples.numel() / world)
    return list(mine.tensor_split(min(math.ceil(largest / batch_size), samples.numel() // world)))
