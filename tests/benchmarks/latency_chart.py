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

import matplotlib
from latency_table import Row, read
from matplotlib.lines import Line2D

from tq_lightning.report.figures.style import GRAY, Figure, new, styled, width_color, write

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
# runtime in the table of latency -> in that of accuracy
RUNTIMES = {
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
    "PyTorch": "pytorch",
    "ExecuTorch": "executorch",
}
AREA = 300.0  # of the largest mark, in square points
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
# width -> offset and alignment of its number; the marks of 8 and 4 bits often overlap
LABELS = {"8": (-2, 13, "center"), "4": (-9, -3, "right"), "2": (9, 0, "left"), "1": (9, 0, "left")}
SIZES = {"font.size": 9.5, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9}


class Point(NamedTuple):
    """A mark: `label` is the width, or "float"."""

    runtime: str
    label: str
    ms: float
    top1: float
    bytes: int
    images: int


def points_of(latency: list[Row], accuracy: list[Row], network: str, model: str) -> list[Point]:
    """Return the runs with a row in both tables; top-1 of float is that of 8-bit weights."""
    known: dict[tuple[str, str], dict[int, float]] = {}
    for row in accuracy:
        if row["model"] == model:
            scored = known.setdefault((row["runtime"], row["bits"]), {})
            scored[int(row["images"])] = float(row["top1"])
    points = []
    for row in latency:
        if (row["network"], row["batch"], row["threads"]) != (network, "1", "1"):
            continue
        own, label = RUNTIMES.get(row["runtime"], ""), row["weights"].split()[0]
        if (own, "8") not in known:
            continue
        images = max(known[own, "8"])  # float is scored on the images of its runtime
        scored = known.get(("float", "8") if label == "float" else (own, label), {})
        if images in scored:
            ms, size = float(row["cpu_ms"]), int(row["bytes"])
            points.append(Point(row["runtime"], label, ms, scored[images], size, images))
    return points


def figure_of(points: list[Point], title: str, subtitle: str) -> Figure:
    runtimes = list(dict.fromkeys(p.runtime for p in points))
    rows = -(-len(runtimes) // 2)
    with styled():
        matplotlib.rcParams.update(SIZES)
        canvas, body = new((4.8, 0.55 + 1.75 * rows), title, subtitle)
        grid = body.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
        for axes, runtime in zip(grid.flat, runtimes, strict=False):
            draw(axes, runtime, [p for p in points if p.runtime == runtime], points)
        for axes in grid.flat[len(runtimes) :]:
            axes.set_visible(False)
        for axes in grid.flat[len(runtimes) - 2 : len(runtimes)]:
            axes.tick_params(labelbottom=True)
        body.supxlabel("latency of one image, one thread [ms]", fontsize=9)
        body.supylabel("top-1 [%]", fontsize=9)
        body.legend(handles=entries(points), loc="outside upper center", ncols=3, columnspacing=1)
    return Figure(
        "latency_accuracy_bytes",
        "latency",
        title,
        subtitle,
        f"Top-1 over latency at 8, 4, 2 and 1 bits and in float, in {', '.join(runtimes)}; the "
        "area of a mark is the bytes read",
        canvas,
    )


def look(point: Point, most: int) -> dict[str, Any]:
    """A filled mark in the color of its width, an open one for float; its area is its bytes."""
    if point.label == "float":
        return {"s": AREA * point.bytes / most, "facecolor": "none", "edgecolor": GRAY}
    color = width_color(int(point.label))
    return {"s": AREA * point.bytes / most, "facecolor": color, "edgecolor": "white"}


def draw(axes: Any, runtime: str, mine: list[Point], points: list[Point]) -> None:
    most = max(p.bytes for p in points)
    for p in sorted(mine, key=lambda p: -p.bytes):
        axes.scatter(p.ms, p.top1, linewidth=0.8, zorder=3, **look(p, most))
        if p.label in LABELS:
            x, y, side = LABELS[p.label]
            place = {"xytext": (x, y), "textcoords": "offset points", "ha": side, "va": "center"}
            axes.annotate(p.label, (p.ms, p.top1), **place)
    fewer = mine[0].images < max(p.images for p in points)
    axes.set_title(f"{runtime}, {mine[0].images:,} images" if fewer else runtime, fontsize=10)
    ticks = [t for t in TICKS if min(p.ms for p in points) / 2 < t < 2 * max(p.ms for p in points)]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(p.ms for p in points) / 1.5, max(p.ms for p in points) * 1.5)
    axes.margins(y=0.3)  # room for the number above a mark


def entries(points: list[Point]) -> list[Any]:
    """Entries of the legend: the width and its bytes, as one runtime reads them."""
    sizes: dict[str, Point] = {}
    for p in points:
        sizes.setdefault(p.label, p)
    found = []
    for label, p in sorted(sizes.items(), key=lambda item: -item[1].bytes):
        name = label if label == "float" else f"{label} bit{'s' * (label != '1')}"
        face = look(p, p.bytes)["facecolor"]
        edge = GRAY if label == "float" else face
        style = {"linestyle": "", "markerfacecolor": face, "markeredgecolor": edge}
        found.append(Line2D([], [], marker="o", label=f"{name}: {p.bytes / 1000:,.0f} kB", **style))
    return found


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
    subtitle = "numbers: bits; area: bytes; open: float32 in the same runtime"
    write(figure_of(points, "ResNet-20, CIFAR-10: latency, accuracy, bytes", subtitle), a.out)


if __name__ == "__main__":
    main()
