"""EpochLosses: the mean losses of an epoch, which a checkpoint inside it carries on."""

from torch import Tensor


class EpochLosses:
    """Sums of losses over the samples of an epoch, on their device.

    Lightning's own mean of an epoch starts anew in a run that goes on inside one. `state` is what a checkpoint keeps;
    under several processes it is that of the first, so that there the means of a resumed epoch are not quite those of
    an uninterrupted one.
    """

    def __init__(self) -> None:
        self.state: dict[str, tuple[Tensor, int]] = {}

    def add(self, losses: dict[str, Tensor], samples: int) -> None:
        """Takes in the mean losses (scalars, by key) of a batch of `samples`."""
        for key, loss in losses.items():
            total, count = self.state.get(key, (0.0, 0))
            # what a checkpoint held may lie on another device
            total = total.to(loss.device) if isinstance(total, Tensor) else total
            self.state[key] = (total + loss.detach() * samples, count + samples)

    def means(self) -> dict[str, Tensor]:
        """The mean of each loss, scalars by key."""
        return {key: total / count for key, (total, count) in self.state.items()}
