"""How every figure looks: Okabe-Ito colours with markers and line styles of their own, so that grey print still reads."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.figure import SubFigure

from tq_lightning.report.stats import Estimate

matplotlib.use("Agg")

# Okabe & Ito 2008, "Color universal design", without yellow, which is too pale on paper.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
GREY = "#777777"
# (colour, marker, line style): told apart by any one of the three.
SERIES: list[tuple[str, str, Any]] = [
    (BLUE, "o", "-"),
    (RED, "s", "--"),
    (GREEN, "^", "-."),
    (ORANGE, "D", ":"),
    (PURPLE, "v", (0, (6, 2))),
    (SKY, "P", (0, (3, 1, 1, 1))),
    (BLACK, "X", (0, (1, 1))),
    (GREY, "<", (0, (5, 1, 1, 1, 1, 1))),
]
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "legend.fontsize": 7.5,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.titlesize": 10,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "tq_lightning",  # the same records give the same file, byte for byte
}
WIDTH_LABEL = "width in use [bits]"
FLOAT_AT = 9.4  # where "float" stands on an axis of widths 1..8


@dataclass
class Figure:
    """A finished figure. `alt` says in words what the picture shows; `section` groups figures on the page."""

    name: str
    section: str
    title: str
    caption: str
    alt: str
    figure: Canvas


def new(
    width: float, height: float, title: str, flags: Iterable[str] = (), foot: str = ""
) -> tuple[Canvas, SubFigure]:
    """(figure, its body of that many inches). Above the body stands the title; below it, in the figure itself, what makes
    its arms unequal, and the `foot`."""
    heads = textwrap.wrap(title, int(width * 12))
    warnings = [line for flag in flags for line in textwrap.wrap(f"⚠ {flag}", int(width * 18))]
    feet = textwrap.wrap(foot, int(width * 20))
    above, below = 0.08 + 0.18 * len(heads), 0.04 + 0.13 * (len(warnings) + len(feet))
    figure = Canvas(figsize=(width, above + height + below), layout="constrained")
    top, body, bottom = figure.subfigures(3, 1, height_ratios=[above, height, below]).ravel()  # type: ignore[union-attr]
    top.text(0.01, 0.0, "\n".join(heads), va="bottom", fontsize=10, fontweight="bold")
    bottom.text(0.01, 1.0, "\n".join(warnings), va="top", fontsize=7, color=RED)
    bottom.text(0.01, 0.0, "\n".join(feet), va="bottom", fontsize=6.5)
    return figure, body


def spread(index: int, count: int, total: float = 0.36) -> float:
    """Sideways shift in bits of the `index`-th of `count` series, so that markers at one width don't hide each other."""
    return total * (index / (count - 1) - 0.5) if count > 1 else 0.0


def width_axis(axes: Axes, widths: list[int], with_float: bool = False) -> None:
    """Widths in bits as even steps, `float` apart on the right."""
    ticks, names = [float(w) for w in widths], [str(w) for w in widths]
    if with_float:
        ticks, names = ticks + [FLOAT_AT], names + ["float"]
    axes.set_xticks(ticks, names)
    axes.set_xlim(min(ticks) - 0.5, max(ticks) + 0.5)
    axes.set_xlabel(WIDTH_LABEL)
    axes.grid(axis="x", visible=False)


def line(
    axes: Axes,
    points: dict[int, Estimate],
    series: int,
    label: str,
    trained: list[int],
    shift: float = 0.0,
    **more: Any,
) -> None:
    """Means with intervals by width; widths that were not trained have hollow markers."""
    if not points:
        return
    colour, marker, style = SERIES[series % len(SERIES)]
    look = {"color": colour, **more}
    axes.plot(
        [], [], marker=marker, linestyle=style, label=label, **look
    )  # the legend's entry: line and filled marker
    at = {w: w + shift for w in points}
    axes.plot(
        list(at.values()), [e.mean for e in points.values()], linestyle=style, zorder=2, **look
    )
    if several := {at[w]: e for w, e in points.items() if e.half is not None}:
        means, halves = (
            [e.mean for e in several.values()],
            [e.half or 0.0 for e in several.values()],
        )
        axes.errorbar(
            list(several),
            means,
            halves,
            fmt="none",
            ecolor=colour,
            elinewidth=1,
            capsize=2.5,
            zorder=2,
            **more,
        )
    for fill, picked in ((colour, set(trained)), ("white", set(points) - set(trained))):
        mine = {at[w]: e.mean for w, e in points.items() if w in picked}
        axes.plot(
            list(mine),
            list(mine.values()),
            marker,
            markerfacecolor=fill,
            linestyle="none",
            zorder=3,
            **look,
        )


def hollow_entry(axes: Axes, some: bool) -> None:
    """A legend entry that explains hollow markers, where there are some."""
    if some:
        axes.plot(
            [],
            [],
            linestyle="none",
            marker="o",
            color=GREY,
            markerfacecolor="white",
            label="hollow: width not trained",
        )


def clip(axes: Axes, low: float = 0.0, high: float = 100.0) -> None:
    """Keep an axis of per cent inside what can be, however wide an interval is."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - 2), min(top, high + 2))


def write(drawn: Figure, folder: Path) -> None:
    """`NAME.png` (200 dpi) and `NAME.svg` in `folder`; no date inside, so that equal figures are equal files."""
    with styled():
        drawn.figure.set_dpi(200)
        FigureCanvasAgg(drawn.figure).print_png(
            folder / f"{drawn.name}.png"
        )  # savefig would draw twice
        drawn.figure.set_layout_engine("none")  # laid out above; the second format keeps it
        FigureCanvasSVG(drawn.figure).print_svg(
            folder / f"{drawn.name}.svg", metadata={"Date": None}
        )


def styled() -> Any:
    """Context in which every figure is drawn and written."""
    return matplotlib.rc_context(STYLE)  # type: ignore[arg-type]  # the stubs ask for literal keys
