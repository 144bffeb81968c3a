"""MovingAverage: an exponential moving average of the weights, which is evaluated and saved."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class MovingAverage(WeightAveraging):
    """average = decay * average + (1 - decay) * weights, after every optimizer step.

    It starts with the weights of the first step. Validation runs on the average, and the
    `state_dict` of a checkpoint is the average; the weights in training are under
    `current_model_state`. Parameters and norm statistics are averaged, in one fused call per step.
    Counters and flags are copied, so a norm that training has marked as not calibrated is not
    calibrated in the average either.

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
