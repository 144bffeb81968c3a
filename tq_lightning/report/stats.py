"""Statistics over seeds: mean with its t interval, difference of two arms with its interval, and the words for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import (
    stdtrit,
)  # quantile of Student's t; scipy.stats would take a second to import

from tq_lightning.report.groups import Arm
from tq_lightning.report.runs import Run

LEVEL = 0.95
METHOD = (
    "Intervals: 95 % t intervals over seeds (mean ± t·s/√n); none where there is one seed. "
    "Differences: paired by seed where both arms have the same seeds, Welch's otherwise; "
    "no correction for the number of comparisons."
)


def number(value: float, digits: int = 1, sign: str = "") -> str:
    """Fixed digits without a minus before nothing: -0.04 -> 0.0; `sign` "+" shows the plus."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` seeds with the half-width of its t interval (None for one seed), in the unit of the values."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        """Lower end of the interval; the mean where there is none."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval; the mean where there is none."""
        return self.mean + (self.half or 0.0)

    def text(self, digits: int = 1) -> str:
        """`86.3 ± 0.4`, or `86.3` for one seed."""
        return number(self.mean, digits) + (
            "" if self.half is None else f" ± {self.half:.{digits}f}"
        )


@dataclass(frozen=True)
class Difference:
    """a - b with its interval; `how` is "paired", "Welch" or "one seed"."""

    estimate: Estimate
    how: str

    @property
    def shown(self) -> bool:
        """True where the interval exists and does not hold 0."""
        return self.estimate.half is not None and not self.estimate.low <= 0.0 <= self.estimate.high

    def verdict(self) -> str:
        """What the interval says of a and b, for the cell of a table."""
        if self.estimate.half is None:
            return "one seed: no interval"
        if not self.shown:
            return "no difference shown"
        return "a above b" if self.estimate.mean > 0 else "a below b"

    def words(self, a: str, b: str, unit: str = "points") -> str:
        """The difference as a sentence: `floor is above round by 1.20 points [+0.40, +2.00], paired`; two digits, so that an
        end of an interval that is near 0 is seen to be on one side of it."""
        e = self.estimate
        if e.half is None:
            return f"{a} - {b} = {number(e.mean, 2, '+')} {unit}, one seed: no interval, nothing is shown"
        interval = f"[{number(e.low, 2, '+')}, {number(e.high, 2, '+')}], {self.how}"
        if not self.shown:
            return f"no difference shown, {a} - {b} = {number(e.mean, 2, '+')} {unit} {interval}"
        return f"{a} is {'above' if e.mean > 0 else 'below'} {b} by {abs(e.mean):.2f} {unit} {interval}"


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean and t interval of independent values, one a seed. Example: [1, 2, 3] -> 2 ± 2.48."""
    x = np.asarray(values, dtype=float)
    if x.size < 2:
        return Estimate(float(x.mean()), None, int(x.size))
    half = float(stdtrit(x.size - 1, 0.5 + LEVEL / 2) * x.std(ddof=1) / math.sqrt(x.size))
    return Estimate(float(x.mean()), half, int(x.size))


def difference(a: dict[int | None, float], b: dict[int | None, float]) -> Difference:
    """Difference a - b of two arms given as {seed: value}.

    Paired by seed where both have the same two or more seeds, Welch's t (Welch 1947, unequal variances) otherwise; no
    interval where an arm has one seed.
    """
    if set(a) == set(b) and len(a) > 1 and None not in a:
        return Difference(
            mean_interval([a[seed] - b[seed] for seed in sorted(a, key=str)]), "paired"
        )
    x, y = np.array(list(a.values()), dtype=float), np.array(list(b.values()), dtype=float)
    mean = float(x.mean() - y.mean())
    if min(x.size, y.size) < 2:
        return Difference(Estimate(mean, None, int(min(x.size, y.size))), "one seed")
    va, vb = x.var(ddof=1) / x.size, y.var(ddof=1) / y.size
    if va + vb == 0:
        return Difference(Estimate(mean, 0.0, int(min(x.size, y.size))), "Welch")
    dof = (va + vb) ** 2 / (va**2 / (x.size - 1) + vb**2 / (y.size - 1))
    half = float(stdtrit(dof, 0.5 + LEVEL / 2) * math.sqrt(va + vb))
    return Difference(Estimate(mean, half, int(min(x.size, y.size))), "Welch")


def split_of(runs: Sequence[Run]) -> str:
    """ "test" where every run has a whole test block, else "val" for all of them: the two are never mixed."""
    return "test" if runs and all(run.has_test for run in runs) else "val"


SPLIT_WORDS = {"test": "test split", "val": "validation split, best epoch"}


def by_seed(arm: Arm, source: str, width: int, split: str) -> dict[int | None, float]:
    """{seed: top-1 in per cent} of an arm; runs without that width are absent."""
    values = {run.seed: run.acc1(source, width, split) for run in arm.runs}
    return {seed: value for seed, value in values.items() if value is not None}


def acc1(arm: Arm, source: str, width: int, split: str) -> Estimate | None:
    """Top-1 over the seeds of an arm, None where no run has that width."""
    values = by_seed(arm, source, width, split)
    return mean_interval(list(values.values())) if values else None


def acc1_float(arm: Arm, split: str) -> Estimate | None:
    """Top-1 of the float weights over the seeds, None unless every run has it."""
    values = [run.acc1_float(split) for run in arm.runs]
    return mean_interval([v for v in values if v is not None]) if None not in values else None


def compare(
    a: Arm, b: Arm, source_a: str, source_b: str, width: int, split: str
) -> Difference | None:
    """acc1(a, source_a) - acc1(b, source_b) at `width` bits; None where either lacks the width."""
    x, y = by_seed(a, source_a, width, split), by_seed(b, source_b, width, split)
    return difference(x, y) if x and y else None
