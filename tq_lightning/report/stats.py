"""Statistics over seeds: means and differences with their t intervals."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit  # quantile of Student's t; importing scipy.stats takes a second

from tq_lightning.records import ACC1, SOURCES, Metric
from tq_lightning.report.groups import Arm
from tq_lightning.report.runs import Run

LEVEL = 0.95


def number(value: float, digits: int = 1, sign: str = "") -> str:
    """Format with fixed digits and no minus zero: -0.04 -> 0.0. `sign` "+" shows the plus."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


@dataclass(frozen=True)
class Estimate:
    """A mean and the half-width of its t interval (None for one seed), in the unit of `values`.

    `values` has one value per seed. It is empty for an unpaired difference.
    """

    mean: float
    half: float | None
    values: tuple[float, ...] = ()
    digits: int = 1  # decimal places in text
    percent: bool = False  # True for a value between 0 and 100 %

    @property
    def ends(self) -> tuple[float, float]:
        """Ends of the interval; both are the mean of one seed."""
        return self.mean - (self.half or 0.0), self.mean + (self.half or 0.0)

    def text(self) -> str:
        """Return `86.3 ± 0.4`, or `86.3` for one seed."""
        interval = "" if self.half is None else f" ± {self.half:.{self.digits}f}"
        return f"{number(self.mean, self.digits)}{interval}"


@dataclass(frozen=True)
class Difference(Estimate):
    """A difference a - b with its interval; `how` is "paired", "Welch" or "one seed"."""

    how: str = "one seed"
    unit: str = "points"

    @property
    def sign(self) -> int:
        """1 if the interval is above 0, -1 if it is below, 0 if it includes 0 or is missing."""
        if self.half is None or self.ends[0] <= 0.0 <= self.ends[1]:
            return 0
        return 1 if self.mean > 0 else -1

    @property
    def interval(self) -> str:
        """The interval as text, `[+0.40, +2.00]`; empty for one seed."""
        ends = [number(end, 2, "+") for end in self.ends]
        return "" if self.half is None else f"[{', '.join(ends)}]"

    def verdict(self) -> str:
        """Return the conclusion for a table cell."""
        words = {1: "a above b", -1: "a below b", 0: "no difference shown"}
        return "one seed: no interval" if self.half is None else words[self.sign]

    def words(self, a: str, b: str) -> str:
        """Describe the difference: `floor is above round by 1.20 points [+0.40, +2.00], paired`."""
        mean = f"{a} - {b} = {number(self.mean, 2, '+')} {self.unit}"
        if self.half is None:
            return f"{mean}, one seed: no interval, no conclusion"
        if not self.sign:
            return f"no difference shown, {mean} {self.interval}, {self.how}"
        side = "above" if self.sign > 0 else "below"
        return f"{a} is {side} {b} by {abs(self.mean):.2f} {self.unit} {self.interval}, {self.how}"


def mean_interval(values: Sequence[float], metric: Metric = ACC1) -> Estimate:
    """Compute mean and t interval of values, one per seed. Example: [1, 2, 3] -> 2 ± 2.48."""
    x = np.asarray(values, dtype=float)
    half = None
    if x.size > 1:
        half = float(stdtrit(x.size - 1, 0.5 + LEVEL / 2) * x.std(ddof=1) / math.sqrt(x.size))
    return Estimate(float(x.mean()), half, tuple(x.tolist()), metric.digits, metric is ACC1)


def difference(
    a: dict[int | None, float], b: dict[int | None, float], metric: Metric = ACC1
) -> Difference:
    """Compute the difference a - b of two arms, each given as {seed: value}.

    The interval is paired by seed if both arms have the same two or more seeds. Otherwise it is
    Welch's (Welch 1947, unequal variances). There is no interval if an arm has one seed.
    """
    units: Any = {"digits": metric.digits, "unit": metric.gap_unit}
    if set(a) == set(b) and len(a) > 1 and None not in a:
        pairs = mean_interval([a[seed] - b[seed] for seed in sorted(a, key=str)])
        return Difference(pairs.mean, pairs.half, pairs.values, how="paired", **units)
    x, y = np.array(list(a.values()), dtype=float), np.array(list(b.values()), dtype=float)
    mean, half = float(x.mean() - y.mean()), 0.0
    if min(x.size, y.size) < 2:
        return Difference(mean, None, **units)
    va, vb = x.var(ddof=1) / x.size, y.var(ddof=1) / y.size
    if va + vb > 0:
        dof = (va + vb) ** 2 / (va**2 / (x.size - 1) + vb**2 / (y.size - 1))
        half = float(stdtrit(dof, 0.5 + LEVEL / 2) * math.sqrt(va + vb))
    return Difference(mean, half, how="Welch", **units)


def split_of(runs: Sequence[Run]) -> str:
    """Return "test" if every run has a complete test block, else "val"; splits are never mixed."""
    return "test" if runs and all(run.has_test for run in runs) else "val"


def by_seed(arm: Arm, source: str, width: int, split: str) -> dict[int | None, float]:
    """Return {seed: metric} of an arm, without runs that lack the width."""
    return {r.seed: v for r in arm.runs if (v := r.score(source, width, split)) is not None}


def scores(arm: Arm, source: str, widths: Iterable[int], split: str) -> dict[int, Estimate]:
    """Return {width: metric over the seeds} of an arm, without widths that no run has."""
    found = {width: by_seed(arm, source, width, split) for width in widths}
    return {w: mean_interval([*v.values()], arm.metric) for w, v in found.items() if v}


def score_float(arm: Arm, split: str) -> Estimate | None:
    """Return the metric of the float weights over the seeds, or None unless every run has it."""
    kept = [v for run in arm.runs if (v := run.score_float(split)) is not None]
    return mean_interval(kept, arm.metric) if len(kept) == len(arm.runs) else None


def compare(
    a: Arm, b: Arm, widths: Iterable[int], split: str, source_a="truncate", source_b="truncate"
) -> dict[int, Difference]:
    """Return {width: metric of (a, source_a) minus (b, source_b)}, if both have the width."""
    found = {w: (by_seed(a, source_a, w, split), by_seed(b, source_b, w, split)) for w in widths}
    return {w: difference(x, y, a.metric) for w, (x, y) in found.items() if x and y}


def gaps(arm: Arm, widths: Iterable[int], split: str) -> dict[int, Difference]:
    """Return {width: QT gap} of an arm, in the unit of its metric."""
    better, worse = SOURCES[::-1] if arm.metric.lower_is_better else SOURCES
    return compare(arm, arm, widths, split, better, worse)
