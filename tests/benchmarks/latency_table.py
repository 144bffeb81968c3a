"""The table of bench_latency.py: a CSV file that is written row by row, and its Markdown form."""

import csv
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from measuring import Timing

# the first five are those of every benchmark; `value` is the speedup
COLUMNS = (
    "case", "value", "unit", "aim", "note", "network", "runtime", "weights", "batch", "threads",
    "cpu_ms", "wall_ms", "wall_speedup", "bytes", "rounds", "load", "version", "processor", "date",
)  # fmt: skip
Row = dict[str, str]


def processor() -> str:
    """Return the name of the processor and its widest integer instructions."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
        name = f"{facts['model name']}, family {facts['cpu family']} model {facts['model']}"
    except (OSError, KeyError):
        pass
    known = getattr(torch.cpu, "get_capabilities", dict)()
    wide = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512_f", "avx2", "dotprod")
    best = next((flag for flag in wide if known.get(flag)), "")
    return f"{name}, {best}" if best else name


class LatencyTable:
    """Rows of a CSV file. Each is on disk as soon as it is measured.

    Args:
        path: The file, None for no file. Its rows of this processor count as measured.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.processor = path, processor()
        self.rows = read(path) if path is not None and path.exists() else []
        if path is not None and not self.rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(COLUMNS)

    def has(self, **key: object) -> bool:
        """Return True if a row of this processor has these values."""
        texts = {k: str(v) for k, v in key.items()} | {"processor": self.processor}
        return any(texts.items() <= row.items() for row in self.rows)

    def add(
        self,
        network: str,
        runtime: str,
        weights: str,
        batch: int,
        threads: int,
        took: Timing,
        floats: Timing | None,
        rounds: int,
        bytes_: int,
        version: str,
        aim: float | None = None,
    ) -> None:
        """Append a row; `floats` are the times of float in the same runtime and the same rounds."""
        plural = "s" if threads > 1 else ""
        case = f"{network}, {runtime}, {weights}, batch {batch}, {threads} thread{plural}"
        cpu = wall = ""
        if floats is not None:
            cpu, wall = f"{floats.busy / took.busy:.2f}", f"{floats.clock / took.clock:.2f}"
        values = (
            case, cpu, "x", "" if aim is None else f">= {aim}",
            "process time of float / process time", network, runtime, weights, batch, threads,
            f"{1000 * took.busy:.2f}", f"{1000 * took.clock:.2f}", wall, bytes_, rounds,
            f"{os.getloadavg()[0]:.1f}", version, self.processor, time.strftime("%Y-%m-%d"),
        )  # fmt: skip
        self.rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
        if self.path is not None:
            with self.path.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(values)
        print(f"{case:<66} {1000 * took.busy:>9.2f} ms {cpu:>6} x", flush=True)


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows: Iterable[Row]) -> list[str]:
    """Return one table per network, with a row per runtime and weights, and settings as columns."""
    rows = list(rows)
    machines = dict.fromkeys(row["processor"] for row in rows)
    versions = dict.fromkeys(row["version"] for row in rows)
    loads = [float(row["load"]) for row in rows]
    lines = [
        f"{'; '.join(machines)}. {', '.join(versions)}. Load average while measuring "
        f"{min(loads):.1f} to {max(loads):.1f}.",
        "",
        "Weights are random. Milliseconds of process time of a batch, and those of float in the "
        "same runtime over them. With two threads, process time counts both: wall time is in "
        "`latency.csv`.",
        "",
    ]
    settings = sorted({(int(row["threads"]), int(row["batch"])) for row in rows})
    heads = [f"batch {b}, {t} thread{'s' if t > 1 else ''}" for t, b in settings]
    for network in dict.fromkeys(row["network"] for row in rows):
        lines += [f"### {network}", "", f"| runtime | weights | {' | '.join(heads)} |"]
        lines += [f"|{'---|' * (2 + len(heads))}"]
        mine = [row for row in rows if row["network"] == network]
        cells = {
            (row["runtime"], row["weights"], int(row["threads"]), int(row["batch"])): _cell(row)
            for row in mine
        }
        for runtime, weights in dict.fromkeys((row["runtime"], row["weights"]) for row in mine):
            values = [cells.get((runtime, weights, *setting), "") for setting in settings]
            lines.append(f"| {runtime} | {weights} | {' | '.join(values)} |")
        lines.append("")
    return lines


def _cell(row: Row) -> str:
    speedup = f" ({row['value']}x)" if row["value"] and row["weights"] != "float" else ""
    return f"{float(row['cpu_ms']):.1f}{speedup}"
