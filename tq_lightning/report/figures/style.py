"""The look of every figure, and the writing of its files.

A color means the same on every figure: green for a quantizer whose codes nest (floor), orange for
one whose codes do not (round), pale where quantized and full where truncated; a ramp from light to
dark for widths of 1 to 8 bits; red for caveats. Markers stand for models and are hollow at widths
that were not trained. Values of other factors have the colors of SERIES, and line styles of their
own, so that the figures can be read in gray.
"""

import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.figure import SubFigure

from tq_lightning.report.groups import Arm
from tq_lightning.report.stats import Estimate

# Okabe & Ito 2008, "Color Universal Design".
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#C8102E", "#CC79A7"
)  # fmt: skip
GRAY = "#777777"
PALE = {GREEN: "#7FCEB8", ORANGE: "#F6CE7B"}
SERIES: list[tuple[str, Any]] = [
    (BLUE, "-"),
    (PURPLE, "--"),
    (SKY, "-."),
    (BLACK, ":"),
    ("#8C564B", (0, (6, 2))),
    (GRAY, (0, (3, 1, 1, 1))),
]
MARKERS = "os^DvPX<>*ph"
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
    "text.parse_math": False,  # a $ in a name is a dollar sign
    "svg.fonttype": "path",
    "svg.hashsalt": "tq_lightning",  # equal records give equal files
}
FLOAT_AT = 9.4  # position of "float" on an axis of widths 1..8


@dataclass
class Figure:
    """A finished figure; `section` groups figures on the page, `alt` is its text alternative."""

    name: str
    section: str
    title: str
    caption: str
    alt: str
    canvas: Canvas


def new(
    width: float,
    height: float,
    title: str,
    subtitle: str = "",
    flags: Iterable[str] = (),
    foot: str = "",
) -> tuple[Canvas, SubFigure]:
    """Create a figure and the body to draw in.

    Args:
        width: inches.
        height: inches of the body.
        title: message of the figure, set above the body.
        subtitle: what is shown, below the title.
        flags: caveats of the comparison, set below the body.
        foot: small print at the bottom.
    """
    heads = textwrap.wrap(title, int(width * 12))
    subs = textwrap.wrap(subtitle, int(width * 15))
    warned = [line for flag in flags for line in textwrap.wrap(f"⚠ {flag}", int(width * 18))]
    feet = textwrap.wrap(foot, int(width * 20))
    above = 0.1 + 0.18 * len(heads) + 0.15 * len(subs)
    below = 0.04 + 0.13 * (len(warned) + len(feet))
    canvas = Canvas(figsize=(width, above + height + below), layout="constrained")
    top, body, bottom = canvas.subfigures(3, 1, height_ratios=[above, height, below]).ravel()  # type: ignore[union-attr]
    top.text(0.01, 1.0, "\n".join(heads), va="top", fontsize=10, fontweight="bold")
    top.text(0.01, 0.0, "\n".join(subs), va="bottom", fontsize=8.5, color="#444444")
    bottom.text(0.01, 1.0, "\n".join(warned), va="top", fontsize=7, color=RED)
    bottom.text(0.01, 0.0, "\n".join(feet), va="bottom", fontsize=6.5)
    return canvas, body


def arm_look(arm: Arm, source: str, marker: str) -> dict[str, Any]:
    """Return the look of an arm: color by quantizer, tone and line style by source."""
    color = GREEN if arm.nested else ORANGE
    if source == "quantize":
        return {"color": PALE[color], "linestyle": "--", "marker": marker}
    return {"color": color, "linestyle": "-", "marker": marker}


def series_look(index: int, marker: str) -> dict[str, Any]:
    """Return the look of the `index`-th value of a factor."""
    color, dashes = SERIES[index % len(SERIES)]
    return {"color": color, "linestyle": dashes, "marker": marker}


def width_color(bits: int) -> Any:
    """Return the color of a width: light for 1 bit, dark for 8 bits."""
    return matplotlib.colormaps["RdPu"](0.3 + 0.7 * min(bits, 8) / 8)


def marker_of(models: list[str], model: Any) -> str:
    """Return the marker of a model."""
    return MARKERS[models.index(str(model)) % len(MARKERS)]


def spread(index: int, count: int, total: float = 0.36) -> float:
    """Return a shift in bits for one of `count` series, so that markers do not hide each other."""
    return total * (index / (count - 1) - 0.5) if count > 1 else 0.0


def width_axis(axes: Axes, widths: list[int], with_float: bool = False) -> None:
    """Label the x axis with widths in even steps, and `float` apart on the right."""
    ticks, names = [float(w) for w in widths], [str(w) for w in widths]
    if with_float:
        ticks, names = ticks + [FLOAT_AT], names + ["float"]
    axes.set_xticks(ticks, names)
    axes.set_xlim(min(ticks) - 0.5, max(ticks) + 0.5)
    axes.set_xlabel("width [bits]")
    axes.grid(axis="x", visible=False)


def bars(
    axes: Axes,
    at: list[float],
    estimates: list[Estimate],
    color: Any,
    percent: bool,
    along: str = "y",
) -> None:
    """Draw intervals, cut at 0 and 100 % if the values are accuracies, and one dot per seed."""
    held = [(x, e) for x, e in zip(at, estimates, strict=True) if e.half is not None]
    if held:
        ends = [
            (max(e.low, 0.0), min(e.high, 100.0)) if percent else (e.low, e.high) for _, e in held
        ]
        sides = [
            [e.mean - low for (_, e), (low, _) in zip(held, ends, strict=True)],
            [high - e.mean for (_, e), (_, high) in zip(held, ends, strict=True)],
        ]
        means, places = [e.mean for _, e in held], [x for x, _ in held]
        x, y = (places, means) if along == "y" else (means, places)
        look: dict[str, Any] = {"ecolor": color, "elinewidth": 1, "capsize": 2.5, "zorder": 2}
        axes.errorbar(x, y, fmt="none", **{f"{along}err": sides}, **look)
    dots = [(x, v) for x, e in held for v in e.values]
    if dots:
        places, values = map(list, zip(*dots, strict=True))
        x, y = (places, values) if along == "y" else (values, places)
        axes.plot(x, y, ".", color=color, markersize=3, alpha=0.7, zorder=2)


def line(
    axes: Axes,
    points: dict[int, Estimate],
    label: str,
    trained: list[int],
    shift: float = 0.0,
    percent: bool = True,
    **look: Any,
) -> None:
    """Draw means, intervals and seeds by width, with hollow markers at untrained widths."""
    if not points:
        return
    marker, color = look.pop("marker"), look["color"]
    axes.plot([], [], label=label, marker=marker, **look)  # entry of the legend
    at = {w: w + shift for w in points}
    axes.plot(list(at.values()), [e.mean for e in points.values()], zorder=2, **look)
    bars(axes, list(at.values()), list(points.values()), color, percent)
    for fill, widths in ((color, set(trained)), ("white", set(points) - set(trained))):
        own = {at[w]: e.mean for w, e in points.items() if w in widths}
        axes.plot(
            list(own), list(own.values()), marker, color=color, markerfacecolor=fill, zorder=3
        )


def hollow_entry(axes: Axes, needed: bool) -> None:
    """Add a legend entry that explains hollow markers."""
    if needed:
        look = {"linestyle": "none", "marker": "o", "color": GRAY, "markerfacecolor": "white"}
        axes.plot([], [], label="hollow: width not trained", **look)


def clip(axes: Axes, axis: str = "y") -> None:
    """Keep an axis of accuracies within 0 to 100 %."""
    low, high = getattr(axes, f"get_{axis}lim")()
    getattr(axes, f"set_{axis}lim")(max(low, -2), min(high, 102))


def write(figure: Figure, folder: Path) -> None:
    """Write `NAME.png` (200 dpi) and `NAME.svg` without a date: equal figures are equal files."""
    with styled():
        figure.canvas.set_dpi(200)
        FigureCanvasAgg(figure.canvas).print_png(folder / f"{figure.name}.png")
        figure.canvas.set_layout_engine("none")  # laid out above; the second format keeps it
        svg = FigureCanvasSVG(figure.canvas)
        svg.print_svg(folder / f"{figure.name}.svg", metadata={"Date": None})


@contextmanager
def styled() -> Iterator[None]:
    """Draw with our settings alone: a matplotlibrc of the caller changes nothing."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield
