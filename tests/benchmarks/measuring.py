"""How the benchmarks time, and the table that each of them writes."""

import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# glibc gives large tensors back to the system and fetches them again page by page: up to a quarter
# of a step, on whichever side of a ratio its heap happens to stand worse
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


class Took(NamedTuple):
    """Medians of a call's seconds: by the clock, and of processor time."""

    clock: float
    busy: float


def keep_memory() -> None:
    """Restart this script with an allocator that keeps its memory, unless it has one already."""
    if not os.environ.keys() >= KEPT.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT})


def fresh_memory() -> dict[str, str]:
    """The environment for a process whose memory is measured: the system's own allocator."""
    return {key: value for key, value in os.environ.items() if key not in KEPT}


def alternately(repeats: int, **calls: Callable[[], object]) -> dict[str, Took]:
    """Time calls in turn, so that other work affects all alike, after one uncounted round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            clock, busy = time.perf_counter(), time.process_time()
            call()
            if turn:
                times[name].append((time.perf_counter() - clock, time.process_time() - busy))
    return {
        name: Took(*map(statistics.median, zip(*rows, strict=True))) for name, rows in times.items()
    }


def paired(repeats: int, base: Callable[[], object], other: Callable[[], object]) -> Took:
    """Median ratio of `other` to `base` over pairs that run one after the other.

    The order within a pair alternates. One uncounted pair comes first.
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
    return Took(*map(statistics.median, zip(*ratios, strict=True)))


class Table:
    """Rows of (case, value, unit, aim, note), printed as they come and written at the end."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, str, str, str]] = []

    def add(self, case: str, value: float, unit: str = "x", aim: str = "", note: str = "") -> None:
        """`aim` is what the value should be: "<= 1.05", ">= 5", or nothing."""
        self.rows.append((case, value, unit, aim, note))
        print(f"{case:<76} {value:>16,.3f} {unit:<9} {f'aim {aim}' if aim else ''}", flush=True)

    def write(self, path: Path | None) -> None:
        """As CSV; nothing where there is no path."""
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
    """Whether `value` is not what `aim` asks for; never where nothing is asked for."""
    sign, _, bound = aim.partition(" ")
    return (
        (value > float(bound))
        if sign == "<="
        else (value < float(bound))
        if sign == ">="
        else False
    )
