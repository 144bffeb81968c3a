"""Timing of the benchmarks, and the table that each of them writes."""

import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

# glibc returns the memory of large tensors to the system and requests it again page by page. This
# can take a quarter of a step and affects both sides of a ratio differently.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


# a call, or calls whose times are added
Calls = Callable[[], object] | Sequence[Callable[[], object]]


class Timing(NamedTuple):
    """Median seconds of a call: wall time and processor time."""

    clock: float
    busy: float


def keep_memory() -> None:
    """Restart this script with an allocator that does not return memory to the system."""
    if not os.environ.keys() >= KEPT.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT})


def alternately(repeats: int, **calls: Callable[[], object]) -> dict[str, Timing]:
    """Time calls in turn, so that other load affects all of them equally, after a warm-up round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            clock, busy = time.perf_counter(), time.process_time()
            call()
            if turn:
                times[name].append((time.perf_counter() - clock, time.process_time() - busy))
    return {
        name: Timing(*map(statistics.median, zip(*rows, strict=True)))
        for name, rows in times.items()
    }


def paired(repeats: int, base: Calls, other: Calls) -> Timing:
    """Return the median ratio of `other` to `base` over pairs of consecutive runs.

    Of sequences, each call of one is timed next to that of the other. The order within a pair
    alternates. The first turn is a warm-up.
    """
    sides = [[calls] if callable(calls) else calls for calls in (base, other)]
    ratios: list[tuple[float, float]] = []
    for turn in range(repeats + 1):
        took = [[0.0, 0.0], [0.0, 0.0]]  # of base and other: wall time, processor time
        for pair in zip(*sides, strict=True):
            for side in (0, 1) if turn % 2 else (1, 0):
                clock, busy = time.perf_counter(), time.process_time()
                pair[side]()
                took[side][0] += time.perf_counter() - clock
                took[side][1] += time.process_time() - busy
        if turn:
            ratios.append((took[1][0] / took[0][0], took[1][1] / took[0][1]))
    return Timing(*map(statistics.median, zip(*ratios, strict=True)))


class Table:
    """Rows of (case, value, unit, aim, note), printed when added and written at the end."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, str, str, str]] = []

    def add(self, case: str, value: float, unit: str = "x", aim: str = "", note: str = "") -> None:
        """Add a row; `aim` is a bound of the value such as "<= 1.05" or ">= 5", or empty."""
        self.rows.append((case, value, unit, aim, note))
        words = f"{case:<76} {value:>16,.3f} {unit:<9} {f'aim {aim}' if aim else '':<11} {note}"
        print(words.rstrip(), flush=True)

    def write(self, path: Path | None) -> None:
        """Write the rows as CSV if there is a path."""
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("case", "value", "unit", "aim", "note"))
            writer.writerows(
                (case, f"{value:.4f}".rstrip("0").rstrip("."), *rest)
                for case, value, *rest in self.rows
            )


def missed(value: float, aim: str) -> bool:
    """Return True if `value` violates the bound `aim`; an empty bound is never violated."""
    sign, _, bound = aim.partition(" ")
    return (
        (value > float(bound))
        if sign == "<="
        else (value < float(bound))
        if sign == ">="
        else False
    )
