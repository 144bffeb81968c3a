"""MovingAverage: an exponential moving average of the weights, which is what gets evaluated and served."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class MovingAverage(WeightAveraging):
    """average = decay * average + (1 - decay) * weights after every optimizer step; the first step's weights start it.

    Validation runs on the average, and a checkpoint's `state_dict` is the average (the weights in training lie beside it,
    under `current_model_state`). Parameters and norm statistics are averaged, one fused call a step; counters and flags
    are copied: a norm set that is no longer calibrated in training is not in the average either.

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
