"""Chart of latency, accuracy and bytes of one network in every runtime at every width.

    python tests/benchmarks/latency_chart.py [--latency results/benchmarks/latency.csv] \\
        [--accuracy results/integer/accuracy.csv] [--network resnet20_cifar] \\
        [--model resnet20_cifar10] [--out results/benchmarks]

Latency is that of one image on one thread (bench_latency.py), accuracy that of the trained network
on the whole test split in the same runtime (integer_accuracy.py). Both tables are in the
repository.
"""

import argparse
import csv
from pathlib import Path
from typing import Any, NamedTuple

from latency_table import Row, read

from tq_lightning.report.figures.style import SERIES, Figure, new, styled, write

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
# runtime in the table of latency -> in that of accuracy
RUNTIMES = {
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
    "PyTorch": "pytorch",
    "ExecuTorch": "executorch",
}
AREA = 420.0  # of the largest mark, in square points


class Point(NamedTuple):
    """A mark: `label` is the width, or "float"."""

    runtime: str
    label: str
    ms: float
    top1: float
    bytes: int


def points_of(latency: list[Row], accuracy: list[Row], network: str, model: str) -> list[Point]:
    """Return the runs with a row in both tables; top-1 of float is that of 8-bit weights."""
    top1 = {
        (row["runtime"], row["bits"]): float(row["top1"])
        for row in accuracy
        if row["model"] == model
    }
    points = []
    for row in latency:
        if (row["network"], row["batch"], row["threads"]) != (network, "1", "1"):
            continue
        label = row["weights"].split()[0]
        key = ("float", "8") if label == "float" else (RUNTIMES.get(row["runtime"], ""), label)
        if row["runtime"] in RUNTIMES and key in top1:
            ms, size = float(row["cpu_ms"]), int(row["bytes"])
            points.append(Point(row["runtime"], label, ms, top1[key], size))
    return points


def figure_of(points: list[Point], title: str, subtitle: str) -> Figure:
    with styled():
        canvas, body = new((6.4, 3.9), title, subtitle)
        draw(body.subplots(), points)
    widths = ", ".join(dict.fromkeys(p.label for p in points))
    return Figure(
        "latency_accuracy_bytes",
        "latency",
        title,
        subtitle,
        f"Top-1 over latency in {len({p.runtime for p in points})} runtimes at {widths} bits; the "
        "area of a mark is the bytes read",
        canvas,
    )


def draw(axes: Any, points: list[Point]) -> None:
    most = max(p.bytes for p in points)
    runtimes = list(dict.fromkeys(p.runtime for p in points))
    for i, runtime in enumerate(runtimes):
        color = SERIES[i]
        mine = [p for p in points if p.runtime == runtime]
        integers = [p for p in mine if p.label != "float"]
        axes.plot([p.ms for p in integers], [p.top1 for p in integers], color=color, lw=0.8)
        for p in mine:
            whole = p.label == "float"
            face = "white" if whole else color
            axes.scatter(p.ms, p.top1, AREA * p.bytes / most, facecolor=face, edgecolor=color)
            axes.annotate(
                p.label,
                (p.ms, p.top1),
                (8, 0) if not whole else (0, 0),
                textcoords="offset points",
                ha="left" if not whole else "center",
                va="center",
                fontsize=9 if not whole else 7,
                color=color,
            )
        axes.plot([], [], "o", color=color, label=runtime)
    axes.set_xscale("log")
    axes.set(xlabel="latency of one image, one thread [ms]", ylabel="top-1 [%]")
    axes.margins(0.1)
    axes.legend(loc="lower right")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latency", type=Path, default=RESULTS / "benchmarks" / "latency.csv")
    parser.add_argument("--accuracy", type=Path, default=RESULTS / "integer" / "accuracy.csv")
    parser.add_argument("--network", default="resnet20_cifar", help="in the table of latency")
    parser.add_argument("--model", default="resnet20_cifar10", help="in the table of accuracy")
    parser.add_argument("--out", type=Path, default=RESULTS / "benchmarks")
    a = parser.parse_args(argv)
    with a.accuracy.open(newline="") as file:
        accuracy = list(csv.DictReader(file))
    points = points_of(read(a.latency), accuracy, a.network, a.model)
    if not points:
        print(f"no chart: no width of {a.network} and {a.model} is in both tables")
        return
    subtitle = "number: bits of the weights; area: bytes read; open: float32 in the same runtime"
    write(figure_of(points, "ResNet-20 on CIFAR-10: latency, accuracy, bytes", subtitle), a.out)


if __name__ == "__main__":
    main()
