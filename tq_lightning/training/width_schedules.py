"""Width schedules: the passes of a run that each training step takes.

To add a schedule, write its function and add a row to `WIDTH_SCHEDULES`.
"""

import random
from collections.abc import Callable

# bit widths, widest first; None is the float pass
Passes = tuple[int | None, ...]


def all_widths(passes: Passes, count: int, rng: random.Random) -> Passes:
    """Take every pass in every step."""
    return passes


def sandwich(passes: Passes, count: int, rng: random.Random) -> Passes:
    """Take the widest pass, the narrowest pass and `count` random passes in between.

    Source: Yu and Huang, "Universally Slimmable Networks", arXiv 1903.05134.
    """
    inner = range(1, len(passes) - 1)
    chosen = rng.sample(inner, min(count, len(inner)))
    return tuple(passes[i] for i in sorted({0, *chosen, len(passes) - 1}))


# (passes of the run, number of random passes, generator) -> passes of the step, widest first
WIDTH_SCHEDULES: dict[str, Callable[[Passes, int, random.Random], Passes]] = {
    "all": all_widths,
    "sandwich": sandwich,
}
