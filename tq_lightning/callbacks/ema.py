"""MovingAverage: an exponential moving average of the weights for evaluation and checkpoints."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class MovingAverage(WeightAveraging):
    """Update average = decay * average + (1 - decay) * weights after every optimizer step.

    The average starts with the weights of the first step. Validation runs on the average, and the
    `state_dict` of a checkpoint is the average; the weights in training are under
    `current_model_state`. Parameters and norm statistics are averaged with one fused call per step.
    Counters and flags are copied, so that norms are marked as calibrated in both or in neither.

    Args:
        decay: from 0 (the last weights) to below 1.
    """

    def __init__(self, decay: float) -> None:
        @torch.no_grad()
        def update(averages: Sequence[Tensor], weights: Sequence[Tensor], _: Any) -> None:
            if averages[0].is_floating_point():
                torch._foreach_lerp_(list(averages), list(weights), 1.0 - decay)
            else:
                for average, value in zip(averages, weights, strict=True):
                    average.copy_(value)

        super().__init__(use_buffers=True, multi_avg_fn=update)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move the average to the device of the model.

        Lightning copies the model in `setup`, where it is still on the CPU.
        """
        average = self._average_model
        assert average is not None
        updates = average.n_averaged.cpu()  # each update reads it, and must not wait for the device
        average.to(pl_module.device)
        average.n_averaged = updates
