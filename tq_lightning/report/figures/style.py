"""The style of all figures, and the function that writes their files.

Colors have the same meaning in every figure. Green is a quantizer whose codes nest (floor), orange
is one whose codes do not (round); pale tones are quantized weights. Widths range from light to
dark. Caveats are red. Markers represent models and are hollow at untrained widths. Values of other
factors have the colors of SERIES, with different line styles for grayscale printing.
"""

import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.figure import SubFigure

from tq_lightning.records import Metric
from tq_lightning.report.comparisons import ComparisonGroup
from tq_lightning.report.groups import Arm
from tq_lightning.report.stats import Estimate

# From Okabe & Ito 2008, "Color Universal Design"; SERIES has no green, orange, red or pink.
ORANGE, GREEN, RED, GRAY = "#E69F00", "#009E73", "#C8102E", "#777777"
PALE = {GREEN: "#7FCEB8", ORANGE: "#F6CE7B"}
SERIES = ("#0072B2", "#8C564B", "#56B4E9", "#000000", "#A6A000", GRAY)
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 2)), (0, (3, 1, 1, 1)))
MARKERS = "os^DvPX<>*ph"
SIZES = {"font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5, "legend.fontsize": 7.5}
GRID = {"axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True}
PLAIN = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
STYLE: dict[str, Any] = {
    **{**SIZES, **GRID, **PLAIN, "lines.linewidth": 1.5, "lines.markersize": 5},
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a $ in a name is a dollar sign
    "svg.fonttype": "path",
    "svg.hashsalt": "tq_lightning",  # identical records give identical files
}
FLOAT_AT = 9.4  # position of "float" on an axis of widths 1..8
MAX_GROUPS = 12  # figures of one kind; the tables have all groups


@dataclass
class Figure:
    """A finished figure; `section` groups figures on the page, `alt` is its text alternative."""

    name: str
    section: str
    title: str
    caption: str
    alt: str
    canvas: Canvas


Drawing = tuple[list[Figure], list[str]]  # figures, and notes on data that they do not show


def limit_groups(
    groups: list[ComparisonGroup], what: str, most: int = MAX_GROUPS
) -> tuple[list[ComparisonGroup], list[str]]:
    """Return the `most` groups with the most runs, and a note on the others."""
    if len(groups) <= most:
        return groups, []
    chosen = sorted(groups, key=lambda group: -len(group.runs))[:most]
    rest = f"the {most} with the most runs are drawn; the tables list all."
    return [g for g in groups if g in chosen], [f"{what}: {len(groups)} settings, {rest}"]


def new(
    size: tuple[float, float], title: str, subtitle: str = "", flags: Iterable[str] = (), foot=""
) -> tuple[Canvas, SubFigure]:
    """Create a figure with a body of `size` inches between titles and caveats."""
    width, height = size
    heads = textwrap.wrap(title.replace(" %", "\u00a0%"), int(width * 12.5))
    subs = textwrap.wrap(subtitle, int(width * 15))
    warned = [line for flag in flags for line in textwrap.wrap(f"⚠ {flag}", int(width * 18))]
    feet = textwrap.wrap(foot, int(width * 20))
    above = 0.16 + 0.18 * len(heads) + 0.15 * len(subs)
    below = 0.04 + 0.13 * (len(warned) + len(feet))
    canvas = Canvas(figsize=(width, above + height + below), layout="constrained")
    parts: Any = canvas.subfigures(3, 1, height_ratios=[above, height, below])
    parts[0].text(0.01, 1 - 0.06 / above, "\n".join(heads), va="top", size=10, weight="bold")
    parts[0].text(0.01, 0.0, "\n".join(subs), va="bottom", fontsize=8.5, color="#444444")
    parts[2].text(0.01, 1.0, "\n".join(warned), va="top", fontsize=7, color=RED)
    parts[2].text(0.01, 0.0, "\n".join(feet), va="bottom", fontsize=6.5)
    return canvas, parts[1]


def marker(models: list[str], arm: Arm) -> str:
    """Return the marker of the model of an arm."""
    return MARKERS[models.index(str(arm["model.name"])) % len(MARKERS)]


def arm_look(models: list[str], arm: Arm, source: str = "truncate") -> dict[str, Any]:
    """Return the look of an arm: color by quantizer, tone and line style by source."""
    color, quantized = GREEN if arm.nested else ORANGE, source == "quantize"
    look = {"color": PALE[color], "linestyle": "--"} if quantized else {"color": color}
    return {"linestyle": "-", "marker": marker(models, arm), **look}


def series_look(models: list[str], arm: Arm, index: int) -> dict[str, Any]:
    """Return the look of the `index`-th value of a factor."""
    i = index % len(SERIES)
    return {"color": SERIES[i], "linestyle": DASHES[i], "marker": marker(models, arm)}


def width_color(bits: int) -> Any:
    """Return the color of a width: light for 1 bit, dark for 8 bits."""
    return matplotlib.colormaps["RdPu"](0.3 + 0.7 * min(bits, 8) / 8)


def series_offset(index: int, count: int, total: float = 0.36) -> float:
    """Return a shift in bits for one of `count` series, so that markers do not overlap."""
    return total * (index / (count - 1) - 0.5) if count > 1 else 0.0


def width_axis(axes: Axes, widths: list[int], with_float: bool = False) -> None:
    """Label the x axis with widths in even steps, and `float` on the right."""
    ticks: dict[float, str] = {w: str(w) for w in widths}
    if with_float:
        ticks[FLOAT_AT] = "float"
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set(xlim=(min(ticks) - 0.5, max(ticks) + 0.5), xlabel="width [bits]")
    axes.grid(axis="x", visible=False)


def bars(axes: Axes, at: Mapping[float, Estimate], color: Any, along="y") -> None:
    """Draw intervals, clipped to 0 and 100 % for percentages, and one dot per seed."""
    look: dict[str, Any] = {"color": color, "zorder": 2}
    for place, e in at.items():
        if e.half is not None:
            low, high = np.clip(e.ends, 0.0, 100.0) if e.percent else e.ends
            ends = [[e.mean - low], [high - e.mean]]
            point: tuple[Any, Any] = (place, e.mean)
            dots: tuple[Any, Any] = ([place] * len(e.values), e.values)
            if along != "y":
                point, dots = point[::-1], dots[::-1]
            err: Any = {f"{along}err": ends, "fmt": "none", "elinewidth": 1, "capsize": 2.5}
            axes.errorbar(point[0], point[1], **err, **look)
            axes.plot(*dots, ".", markersize=4, alpha=0.6, **look)


def line(axes: Axes, points: Mapping[int, Estimate], name: str, arm: Arm, shift=0, **look) -> None:
    """Draw means, intervals and seeds by width, with hollow markers at untrained widths."""
    if not points:
        return
    shape, color = look.pop("marker"), look["color"]
    axes.plot([], [], label=name, marker=shape, **look)  # entry of the legend
    at = {w + shift: e for w, e in points.items()}
    axes.plot(list(at), [e.mean for e in at.values()], zorder=2, **look)
    bars(axes, at, color)
    for w, e in points.items():
        fill = color if w in arm.trained else "white"
        axes.plot(w + shift, e.mean, shape, color=color, markerfacecolor=fill, zorder=3)


def clip(axes: Axes, metric: Metric, axis: str = "y") -> None:
    """Keep an axis of accuracies within 0 to 100 %; make one of perplexities logarithmic."""
    if metric.lower_is_better:
        getattr(axes, f"set_{axis}scale")("log")
        return
    low, high = getattr(axes, f"get_{axis}lim")()
    getattr(axes, f"set_{axis}lim")(max(low, -2), min(high, 102))


def write(figure: Figure, folder: Path) -> None:
    """Write `NAME.png` (200 dpi) and `NAME.svg`, without a date, for reproducible files."""
    with styled():
        figure.canvas.set_dpi(200)
        figure.canvas.draw_without_rendering()
        figure.canvas.set_layout_engine("none")  # one layout for both files
        for part in figure.canvas.subfigs:  # SVG ids depend on the last digit of a position
            part.bbox_relative.set_points(part.bbox_relative.get_points().round(4))
        for axes in figure.canvas.axes:
            left, bottom, width, height = (round(x, 4) for x in axes.get_position().bounds)
            axes.set_position((left, bottom, width, height))
        FigureCanvasAgg(figure.canvas).print_png(folder / f"{figure.name}.png")
        path = folder / f"{figure.name}.svg"
        FigureCanvasSVG(figure.canvas).print_svg(path, metadata={"Date": None})


@contextmanager
def styled() -> Iterator[None]:
    """Draw with fixed settings, regardless of the user's matplotlibrc."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]  # its keys are a Literal
        yield
