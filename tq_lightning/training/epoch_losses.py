"""EpochLosses: the mean losses of an epoch, over resumes and ranks."""

from collections.abc import Callable

import torch
from torch import Tensor


class EpochLosses:
    """Running sums of the losses of an epoch, saved in checkpoints and reduced over ranks.

    Lightning's epoch mean restarts when a run resumes within an epoch, and torchmetrics' MeanMetric
    synchronizes with the device at every update. These sums avoid both.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, int]] = {}

    def reset(self) -> None:
        """Start a new epoch."""
        self._sums.clear()

    def add(self, losses: dict[str, Tensor], samples: int) -> None:
        """Add the mean losses (scalars, by key) of a batch of `samples` images."""
        for key, loss in losses.items():
            total, count = self._sums.get(key, (0.0, 0))
            # a total from a checkpoint may be on another device
            total = total.to(loss.device) if isinstance(total, Tensor) else total
            self._sums[key] = (total + loss.detach() * samples, count + samples)

    def means(
        self, reduce_sum: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> dict[str, Tensor]:
        """Return the mean of each loss.

        Args:
            reduce_sum: sums a tensor over all ranks.

        Returns:
            {key: scalar tensor}.
        """
        if not self._sums:
            return {}
        sums = reduce_sum(self._as_tensor())
        return {key: total / count for key, (total, count) in zip(self._sums, sums, strict=True)}

    def state_dict(
        self, gather: Callable[[Tensor], Tensor] = lambda sums: sums[None]
    ) -> dict[str, Tensor]:
        """Return {key: (ranks, 2) tensor of sum and sample count}.

        Args:
            gather: stacks a tensor over all ranks, along a new first dimension.
        """
        if not self._sums:
            return {}
        gathered = gather(self._as_tensor())
        return {key: gathered[:, i].cpu().clone() for i, key in enumerate(self._sums)}

    def load_state_dict(self, state: dict[str, object], rank: int = 0, world: int = 1) -> None:
        """Restore the sums of this rank.

        A state from the same number of ranks restores the sums of each rank. A state from another
        number of ranks is summed in rank 0. Older checkpoints have (sum, count) of rank 0, which
        every rank restores.
        """
        self._sums = {}
        for key, value in state.items():
            if isinstance(value, tuple):
                self._sums[key] = value
                continue
            assert isinstance(value, Tensor)
            if len(value) != world:
                value = torch.stack([value.sum(0), *[torch.zeros(2)] * (world - 1)])
            self._sums[key] = (value[rank, 0], int(value[rank, 1]))

    def _as_tensor(self) -> Tensor:
        """Return sums and counts as one (keys, 2) tensor."""
        device = next(iter(t.device for t, _ in self._sums.values() if isinstance(t, Tensor)), None)
        rows = [
            torch.stack(
                [torch.as_tensor(total, device=device), torch.tensor(float(n), device=device)]
            )
            for total, n in self._sums.values()
        ]
        return torch.stack(rows)
