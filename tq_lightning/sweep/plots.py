"""The pictures of a study, as PNG: history, importances, parallel coordinates, slices and, of several objectives, the front.

Drawn here and not by Optuna's own plots, whose labels run into each other for categories and which know no units.
"""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tq_lightning.files import atomic_write

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"  # told apart by colour-blind readers too
UNITS = {"acc1": "%", "qt_gap": "percentage points", "bytes": "bytes"}
COLUMNS = 4  # panels in a row
SPREAD = 0.2  # how far lines through one choice lie apart, where choices are 1 apart


@dataclass(frozen=True)
class Shown:
    """A complete trial. values: one per objective; searched: key -> number of a range, or text of a choice."""

    number: int
    values: tuple[float, ...]
    searched: dict[str, Any]
    best: bool  # on the Pareto front


@dataclass(frozen=True)
class Axis:
    """A searched key. choices: the texts of a choice in the file's order; None for a range. log: of a range."""

    key: str
    choices: tuple[str, ...] | None = None
    log: bool = False

    def place(self, value: Any) -> float:
        """Where a value lies on a drawn axis: a choice at its number."""
        if self.choices is not None:
            return float(self.choices.index(value))
        return math.log10(value) if self.log else float(value)


@dataclass(frozen=True)
class Study:
    """What the pictures need. importances: one mapping per objective, empty where the trials tell none."""

    names: list[str]
    maximize: list[bool]
    axes: list[Axis]
    trials: list[Shown]
    importances: list[dict[str, float]]


def draw(study: Study, folder: Path) -> list[Path]:
    """Draw what there are trials for into `folder`. Returns the files."""
    if not study.trials:
        return []
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with matplotlib.rc_context(
        {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    ):
        for objective in range(len(study.names)):
            suffix = f"_{objective + 1}" if len(study.names) > 1 else ""
            for name, function in PLOTS.items():
                figure = function(study, objective)
                if figure is not None:
                    drawn.append(_save(figure, folder / f"{name}{suffix}.png"))
        if len(study.names) > 1:
            drawn.append(_save(front(study), folder / "pareto_front.png"))
    return drawn


def history(study: Study, objective: int) -> Any:
    """Every result by trial, and the best up to it."""
    figure, ax = _figure(7.0, 4.2)
    trials = sorted(study.trials, key=lambda t: t.number)
    numbers, values = [t.number for t in trials], [t.values[objective] for t in trials]
    best = list(itertools.accumulate(values, max if study.maximize[objective] else min))
    ax.step(numbers, best, where="post", color=ORANGE, label="best so far")
    ax.plot(numbers, values, "o", color=BLUE, label="trial")
    ax.set(
        xlabel="trial",
        ylabel=with_unit(study.names[objective]),
        title="Every trial and the best so far",
    )
    ax.set_xlim(-0.5, numbers[-1] + 0.5)
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def importances(study: Study, objective: int) -> Any:
    """Bars with their shares; None where the trials tell none."""
    found = study.importances[objective]
    if not found:
        return None
    figure, ax = _figure(7.0, 1.4 + 0.45 * len(found))
    rows = sorted(found.items(), key=lambda item: item[1])
    bars = ax.barh(
        [short(key) for key, _ in rows], [value for _, value in rows], color=BLUE, height=0.6
    )
    ax.bar_label(bars, [f"{value:.3f}" for _, value in rows], padding=4)
    ax.set(
        xlim=(0, 1.12),
        xlabel=f"share of the variance of {study.names[objective]} (fANOVA)",
        title="Parameter importances",
    )
    return figure


def parallel(study: Study, objective: int) -> Any:
    """A line a trial through its values on parallel axes, coloured by the result, the better ones on top."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, ax = _figure(max(7.0, 2.0 + 1.9 * len(study.axes)), 5.0)
    values = [t.values[objective] for t in study.trials]
    low, high = min(values), max(values)
    colours: Any = ScalarMappable(Normalize(low, high if high > low else low + 1), "viridis")
    ends = [_ends(axis, study.trials) for axis in study.axes]
    for t in sorted(
        study.trials, key=lambda t: t.values[objective], reverse=not study.maximize[objective]
    ):
        aside = SPREAD * (
            (t.values[objective] - low) / ((high - low) or 1) - 0.5
        )  # lines through one choice: in their order
        heights = [
            (axis.place(t.searched[axis.key]) + (aside if axis.choices is not None else 0) - first)
            / (last - first)
            for axis, (first, last) in zip(study.axes, ends, strict=True)
        ]
        ax.plot(
            [*range(len(heights)), len(heights) - 0.35],
            [*heights, heights[-1]],
            color=colours.to_rgba(t.values[objective]),
        )
    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    for x, (axis, (first, last)) in enumerate(zip(study.axes, ends, strict=True)):
        ax.axvline(x, color=GREY, linewidth=1)
        for place, text in _ticks(axis, first, last):
            ax.text(
                x + 0.03,
                (place - first) / (last - first),
                text,
                va="center",
                fontsize=9,
                bbox=box,
                zorder=5,
            )
    ax.set(
        xlim=(-0.05, len(study.axes) - 0.3),
        ylim=(-0.13, 1.13),
        yticks=[],
        title="Parallel coordinates",
    )
    ax.set_xticks(range(len(study.axes)), [short(axis.key) for axis in study.axes])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    figure.colorbar(colours, ax=ax, label=with_unit(study.names[objective]))
    return figure


def slices(study: Study, objective: int) -> Any:
    """A panel a searched key: results by its value, with the mean of each choice."""
    columns = min(COLUMNS, len(study.axes))
    lines = math.ceil(len(study.axes) / columns)
    figure, panels = _figure(max(5.0, 3.3 * columns), 3.9 * lines, lines, columns, sharey=True)
    for axis, ax in itertools.zip_longest(study.axes, panels):
        if axis is None:
            ax.set_visible(False)
            continue
        xs = [t.searched[axis.key] for t in study.trials]
        ys = [t.values[objective] for t in study.trials]
        if axis.choices is None:
            ax.plot(xs, ys, "o", color=BLUE, alpha=0.6)
            ax.set_xscale("log" if axis.log else "linear")
        else:
            seen: dict[str, int] = {}
            for x, y in zip(
                xs, ys, strict=True
            ):  # beside each other, so that equal results stay apart
                seen[x] = seen.get(x, -1) + 1
                aside = 0.3 * ((seen[x] * 0.618) % 1 - 0.5)
                ax.plot(axis.place(x) + aside, y, "o", color=BLUE, alpha=0.6)
            means = [
                (axis.place(x), statistics.mean(y for a, y in zip(xs, ys, strict=True) if a == x))
                for x in seen
            ]
            ax.plot(
                *zip(*means, strict=True), "D", color=ORANGE, markeredgecolor="white", markersize=8
            )
            crowded = sum(map(len, axis.choices)) > 22
            ax.set_xticks(
                range(len(axis.choices)),
                axis.choices,
                rotation=35 if crowded else 0,
                ha="right" if crowded else "center",
            )
            ax.set_xlim(-0.5, len(axis.choices) - 0.5)
        ax.set_xlabel(short(axis.key))
        ax.grid(alpha=0.3)
    for ax in panels[::columns]:
        ax.set_ylabel(with_unit(study.names[objective]))
    figure.align_xlabels()
    has_means = any(axis.choices is not None for axis in study.axes)
    figure.suptitle("Results by parameter" + (" (orange: mean of a choice)" if has_means else ""))
    return figure


def front(study: Study) -> Any:
    """Every pair of objectives, the trials that no other beats in all of them marked with their numbers."""
    pairs = list(itertools.combinations(range(len(study.names)), 2))
    figure, panels = _figure(6.4 * len(pairs), 4.8, 1, len(pairs))
    for (a, b), ax in zip(pairs, panels, strict=True):
        for best, colour, label in (
            (False, GREY, "other trial"),
            (True, ORANGE, "on the Pareto front (trial number)"),
        ):
            points = sorted(
                (t.values[a], t.values[b], t.number) for t in study.trials if t.best is best
            )
            if points:
                ax.plot(
                    [p[0] for p in points], [p[1] for p in points], "o", color=colour, label=label
                )
            if best:
                if len(study.names) == 2:
                    ax.plot([p[0] for p in points], [p[1] for p in points], color=colour, alpha=0.5)
                for (x, y), group in itertools.groupby(points, key=lambda p: p[:2]):
                    text = ", ".join(str(p[2]) for p in group)
                    ax.annotate(text, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
        better = ["more" if study.maximize[i] else "less" for i in (a, b)]
        ax.set(
            xlabel=f"{with_unit(study.names[a])}, {better[0]} is better",
            ylabel=f"{with_unit(study.names[b])}, {better[1]} is better",
        )
        ax.margins(0.12)
        ax.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Pareto front")
    return figure


def with_unit(name: str) -> str:
    """A metric's name with its unit."""
    unit = next((unit for part, unit in UNITS.items() if part in name), None)
    return name if unit is None or unit == name.rpartition("/")[2] else f"{name} ({unit})"


def short(key: str) -> str:
    """A searched key as it is shown: what all of them begin with left out."""
    return (
        "seed" if key == "seed_everything" else key.removeprefix("model.").removeprefix("trainer.")
    )


# file name -> function of (study, number of the objective); None is not drawn
PLOTS: dict[str, Callable[[Study, int], Any]] = {
    "optimization_history": history,
    "param_importances": importances,
    "parallel_coordinate": parallel,
    "slice": slices,
}


def _figure(
    width: float, height: float, lines: int = 1, columns: int = 0, sharey: bool = False
) -> tuple[Any, Any]:
    """(figure, its axes), or (figure, list of axes) where columns are given. No pyplot: nothing to close, no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if not columns:
        return figure, figure.subplots()
    return figure, list(figure.subplots(lines, columns, sharey=sharey, squeeze=False).flat)


def _ends(axis: Axis, trials: list[Shown]) -> tuple[float, float]:
    """(first, last) of an axis, never the same."""
    places = (
        range(len(axis.choices))
        if axis.choices is not None
        else [axis.place(t.searched[axis.key]) for t in trials]
    )
    first, last = min(places), max(places)
    return (first, last) if last > first else (first - 0.5, last + 0.5)


def _ticks(axis: Axis, first: float, last: float) -> list[tuple[float, str]]:
    """(place, text) along an axis of parallel coordinates: all choices, or five steps of a range."""
    if axis.choices is not None:
        return [(float(i), text) for i, text in enumerate(axis.choices)]
    places = [first + (last - first) * i / 4 for i in range(5)]
    return [(place, f"{10**place if axis.log else place:.3g}") for place in places]


def _save(figure: Any, path: Path) -> Path:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path
