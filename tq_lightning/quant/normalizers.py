"""Normalizers: maps from float weights to u in [0, 1], which quantizers turn into codes.

To add a normalizer, write its functions and one row of `NORMALIZERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalizer:
    """A row of `NORMALIZERS`: u = t / (2 max|t|) + 1/2 with t = `squash(w)`.

    Attributes:
        squash: w -> t, odd and increasing.
        slope: t -> dt/dw, may overwrite its argument; None if t is w.
        per_channel: Take the maximum, and the mean of the scale, over each output channel,
            not over the whole tensor.
    """

    squash: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor] | None
    per_channel: bool


def _unchanged(w: Tensor) -> Tensor:
    return w


def _tanh_slope(t: Tensor) -> Tensor:
    return t.square_().neg_().add_(1.0)


NORMALIZERS: dict[str, Normalizer] = {
    "tanh": Normalizer(torch.tanh, _tanh_slope, per_channel=False),
    "tanh_channel": Normalizer(torch.tanh, _tanh_slope, per_channel=True),
    "absmax": Normalizer(_unchanged, None, per_channel=False),
    "absmax_channel": Normalizer(_unchanged, None, per_channel=True),
}
