"""Which passes a training step takes. To add a schedule, write its function and add a row to `WIDTH_SCHEDULES`."""

import random
from collections.abc import Callable

Passes = tuple[int | None, ...]


def all_widths(passes: Passes, count: int, draw: random.Random) -> Passes:
    """Every pass in every step."""
    return passes


def sandwich(passes: Passes, count: int, draw: random.Random) -> Passes:
    """The widest, the narrowest and `count` others, drawn anew each step. Source: arXiv 1903.05134."""
    inner = range(1, len(passes) - 1)
    chosen = draw.sample(inner, min(count, len(inner)))
    return tuple(passes[i] for i in sorted({0, *chosen, len(passes) - 1}))


# (passes of the run, widest first; how many random ones; where they are drawn from) -> passes of a step, widest first
WIDTH_SCHEDULES: dict[str, Callable[[Passes, int, random.Random], Passes]] = {
    "all": all_widths,
    "sandwich": sandwich,
}
