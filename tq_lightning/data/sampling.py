"""Assignment of samples to batches.

All functions depend only on integers, so resumed and distributed runs see the same batches.
"""

import math
import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tq_lightning.errors import UserError

# independent of the seed of the run, so that all runs are compared on the same held-out images
SPLIT_SEED = 0
# seed of the order and augmentation of the calibration batches, the same in every run
CALIBRATION_SEED = 8


def run_seed() -> int:
    """Return the seed of `seed_everything`, else 0.

    Raises:
        UserError: the environment variable PL_GLOBAL_SEED is not an integer >= 0.
    """
    seed = os.environ.get("PL_GLOBAL_SEED", "0")
    if not seed.isdecimal():
        raise UserError(f"PL_GLOBAL_SEED={seed} is not a seed; set an integer >= 0, or unset it")
    return int(seed)


def derive_seed(*numbers: int) -> int:
    """Derive a 63-bit seed from non-negative integers (run seed, epoch, batch, ...).

    Nearby inputs give unrelated seeds.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*numbers: int) -> torch.Generator:
    """Create a CPU generator seeded by `derive_seed(*numbers)`, without global side effects."""
    return torch.Generator().manual_seed(derive_seed(*numbers))


def stratified(labels: Tensor, count: int, seed: int = SPLIT_SEED) -> Tensor:
    """Pick `count` samples, as evenly over the classes as possible.

    Each class is shuffled, and its j-th of n samples gets the key (j + U) / n with one random U per
    class. The samples with the smallest keys are picked. A class with a single image is picked at
    random, so a data set with one image per class can be split too.

    Args:
        labels: (samples,) int64 class indices.
        count: number of samples to pick, 0..samples.
        seed: seed of the generator.

    Returns:
        (count,) int64, sorted sample indices.
    """
    draw = generator(seed, labels.numel(), 1)
    keys = torch.empty(labels.numel(), dtype=torch.float64)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        offset = torch.rand((), generator=draw, dtype=torch.float64)
        keys[members] = (torch.randperm(members.numel(), generator=draw) + offset) / members.numel()
    return keys.argsort(stable=True)[:count].sort().values


def train_or_val_part(
    labels: Tensor, stage: str, val_fraction: float | None, samples: int | None
) -> Tensor:
    """Return the samples of the training split that the stage train or val reads.

    Args:
        labels: (samples,) int64 class indices of the training split.
        stage: train or val.
        val_fraction: fraction of the samples held out for validation; None if validation has a
            separate split.
        samples: largest number of samples to train on; None for all.

    Returns:
        (n,) int64, sorted sample indices.
    """
    everything = torch.arange(labels.numel())
    held = torch.zeros(labels.numel(), dtype=torch.bool)
    if val_fraction is not None:
        held[stratified(labels, max(1, round(val_fraction * labels.numel())))] = True
        if stage == "val":
            return everything[held]
    rest = everything[~held]
    if samples is not None and samples < rest.numel():
        rest = rest[stratified(labels[rest], samples)]
    return rest


def calibration_samples(samples: Tensor, count: int) -> Tensor:
    """Pick at most `count` training samples to estimate norm statistics from, the same in any run.

    Args:
        samples: (N,) sample indices.
        count: number of samples.
    """
    order = torch.randperm(samples.numel(), generator=generator(CALIBRATION_SEED))
    return samples[order[:count]]


def share(size: int, rank: int, world: int) -> Tensor:
    """Return the positions in a global batch that belong to one process.

    Process r takes the r-th block from the front and the r-th block from the back. Mixup pairs
    position i with size-1-i, so both samples of a pair are in one process, and reversing the local
    batch gives the same pairs as reversing the global batch.

    Args:
        size: size of the global batch.
        rank: index of the process.
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

    Epoch e is a permutation drawn from (seed, e), divided into global batches. Samples that do not
    fill the last batch are dropped; they differ in every epoch.

    Args:
        samples: (N,) indices of the training samples.
        batch_size: samples per process and step. The global batch has batch_size * world.
        seed: run seed.
        rank: index of this process.
        world: number of processes.

    Raises:
        UserError: there are fewer samples than in one global batch.
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
        """Yield (batch index, (size,) sample indices of the global batch) of an epoch.

        Args:
            epoch: index of the epoch.
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
    """Return the evaluation batches of one process.

    Every sample belongs to exactly one process. All processes get the same number of batches, so
    that collective operations in an evaluation step do not hang; batch sizes differ instead.

    Args:
        samples: (N,) sample indices.
        batch_size: largest number of samples per batch.
        rank: index of this process.
        world: number of processes.

    Returns:
        Sample indices of each batch.

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
