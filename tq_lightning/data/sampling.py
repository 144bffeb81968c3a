"""Which samples make up which batch: functions of numbers alone, so that resumed and distributed runs see the same ones."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tq_lightning.errors import UserError

SPLIT_SEED = 0  # whatever the run's seed: seeds and arms are compared on the same held-out images


def derive_seed(*numbers: int) -> int:
    """One 63-bit seed out of non-negative integers (run seed, epoch, batch, ...); near-by inputs give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*numbers: int) -> torch.Generator:
    """A private CPU generator seeded by `derive_seed(*numbers)`; the global random state is not touched."""
    return torch.Generator().manual_seed(derive_seed(*numbers))


def stratified(labels: Tensor, count: int, seed: int = SPLIT_SEED) -> Tensor:
    """Exactly `count` sample numbers, as evenly over the classes as the numbers allow.

    Each class is shuffled and its j-th of n samples gets the key (j + U) / n with one random U a class; the smallest
    keys win. A class with a single image takes part by chance, so a set with one image a class can be split too.

    Args:
        labels: (samples,) int64 class numbers.
        count: how many to pick, 0..samples.
        seed: of the private generator.

    Returns:
        (count,) sorted sample numbers.
    """
    draw = generator(seed, labels.numel(), 1)
    keys = torch.empty(labels.numel(), dtype=torch.float64)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        offset = torch.rand((), generator=draw, dtype=torch.float64)
        keys[members] = (torch.randperm(members.numel(), generator=draw) + offset) / members.numel()
    return keys.argsort(stable=True)[:count].sort().values


def share(size: int, rank: int, world: int) -> Tensor:
    """The places in a global batch that belong to one process, size // world of them.

    Process r takes the r-th block from the front and its mirror image from the back. Mixup pairs place i with place
    size-1-i: so both of a pair live in one process, and reversing the local batch pairs them as the global one would.
    """
    local = size // world
    front, back = (local + 1) // 2, local // 2
    head = torch.arange(rank * front, (rank + 1) * front)
    tail = torch.arange(size - (rank + 1) * back, size - rank * back)
    return torch.cat([head, tail])


class TrainOrder:
    """The batches of every training epoch: epoch e is one permutation drawn from (seed, e), cut into global batches.

    Args:
        samples: (N,) sample numbers of the training part.
        batch_size: samples a process and step; the global batch is batch_size * world.
        seed: run seed.
        rank, world: this process and how many there are.
        even: drop the odd sample of a batch smaller than asked for (mixup needs pairs).

    The samples that do not fill a last batch are left out of the epoch (others in every epoch). A set smaller than one
    batch gives one smaller batch in a single process and is refused in several.
    """

    def __init__(
        self,
        samples: Tensor,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        even: bool = False,
    ) -> None:
        self.samples, self.seed, self.rank, self.world = samples, seed, rank, world
        self.shuffle = True
        count = samples.numel()
        self.size = min(batch_size * world, count)
        if world > 1 and self.size < batch_size * world:
            raise UserError(
                f"{count} training samples do not fill a batch of {world} x {batch_size}; lower data.batch_size"
            )
        if even:
            self.size -= self.size % 2
        if self.size < 1:
            raise UserError(
                f"{count} training samples make no batch; raise data.samples or lower data.val_fraction"
            )

    def __len__(self) -> int:
        return self.samples.numel() // self.size

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """(batch number, (size,) sample numbers of the global batch) from batch `start` of `epoch` on."""
        order = (
            torch.randperm(self.samples.numel(), generator=generator(self.seed, epoch, 2))
            if self.shuffle
            else None
        )
        samples = self.samples if order is None else self.samples[order]
        for batch in range(start, len(self)):
            yield batch, samples[batch * self.size : (batch + 1) * self.size]


def eval_batches(samples: Tensor, batch_size: int, rank: int = 0, world: int = 1) -> list[Tensor]:
    """The evaluation batches of one process: every sample in exactly one process, and equally many batches in each.

    (A collective inside an evaluation step would hang if one process had a batch more; the sizes differ instead.)
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
