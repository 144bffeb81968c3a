"""Timing of the benchmarks, and the table that each of them writes."""

import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# glibc returns the memory of large tensors to the system and requests it again page by page. This
# can take a quarter of a step and affects both sides of a ratio differently.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


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


def paired(repeats: int, base: Callable[[], object], other: Callable[[], object]) -> Timing:
    """Return the median ratio of `other` to `base` over pairs of consecutive runs.

    The order within a pair alternates. The first pair is a warm-up.
    """
    ratios: list[tuple[float, float]] = []
    for turn in range(repeats + 1):
        took = {}
        for call in (base, other) if turn % 2 else (other, base):
            clock, busy = time.perf_counter(), time.process_time()
            call()
            took[call] = (time.perf_counter() - clock, time.process_time() - busy)
        if turn:
            pairs = zip(took[other], took[base], strict=True)
            ratios.append(tuple(a / b for a, b in pairs))  # type: ignore[arg-type]
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
