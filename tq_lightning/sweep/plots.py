"""Plots of a study as PNG files, drawn by `optuna.visualization.matplotlib`.

They are drawn with matplotlib's default settings and the Agg backend, regardless of MPLBACKEND and
matplotlibrc, and then laid out so that labels do not overlap.
"""

import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tq_lightning.files import atomic_write

if TYPE_CHECKING:
    import optuna

UNITS = {"acc1": "%", "qt_gap": "percentage points"}


def draw(study: "optuna.Study", folder: Path, importances: Sequence[Any] = ()) -> list[Path]:
    """Draw the plots of a study into `folder`.

    Args:
        study: an Optuna study. Only its complete trials are drawn.
        folder: output folder, created if there is anything to draw.
        importances: one mapping for each objective. An empty mapping gives no importance plot,
            because fANOVA needs two different values.

    Returns:
        The files written.
    """
    os.environ["MPLBACKEND"] = "Agg"  # the backend of a notebook may not be installed here
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")  # matplotlib may have been imported with another backend
    style: list[Any] = ["default", {"figure.constrained_layout.use": True}]
    written = []
    # Optuna marks these plots as experimental
    with pyplot.style.context(style), warnings.catch_warnings(action="ignore"):
        for name, figure in figures(study, importances):
            folder.mkdir(parents=True, exist_ok=True)
            written.append(folder / f"{name}.png")
            with atomic_write(written[-1]) as temporary:
                figure.savefig(temporary, dpi=120, format="png")
            pyplot.close(figure)
    return written


def figures(study: "optuna.Study", importances: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (file name without suffix, figure) for each plot."""
    from optuna.importance import FanovaImportanceEvaluator as Fanova
    from optuna.visualization import matplotlib as plots

    # there are no best trials without complete ones
    names = [with_unit(n) for n in study.metric_names or ["value"]] if study.best_trials else []
    for i, name in enumerate(names):
        suffix, given = "", dict[str, Any](target_name=name)
        if len(names) > 1:
            suffix, given = f"_{i + 1}", given | {"target": lambda t, i=i: t.values[i]}
        ax = plots.plot_optimization_history(study, **given)
        yield f"optimization_history{suffix}", _lay_out(ax)
        if any(importances[i : i + 1]):
            ax = plots.plot_param_importances(study, evaluator=Fanova(seed=0), **given)
            ax.set_xlabel("share of the variance (fANOVA)")
            yield f"param_importances{suffix}", _lay_out(ax)
        ax = plots.plot_parallel_coordinate(study, **given)
        yield f"parallel_coordinate{suffix}", _widen(_lay_out(ax, slanted=20))
        yield f"slice{suffix}", _lay_out(plots.plot_slice(study, **given), slanted=30)
    for a, b in itertools.combinations(range(len(names)), 2):
        two = itemgetter(a, b)
        given = {"target_names": [*two(names)], "targets": lambda t, two=two: two(t.values)}
        ax = plots.plot_pareto_front(study, **given)
        for t in study.best_trials:
            ax.annotate(str(t.number), two(t.values), xytext=(4, 4), textcoords="offset points")
        yield f"pareto_front{f'_{a + 1}_{b + 1}' if len(names) > 2 else ''}", _lay_out(ax)


def with_unit(name: str) -> str:
    """Add the unit to the name of a metric."""
    return next((f"{name} ({unit})" for part, unit in UNITS.items() if part in name), name)


def _lay_out(drawn: Any, slanted: int = 0) -> Any:
    """Move the legend below the axes, slant x labels, use integer ticks. Return the figure."""
    from matplotlib import pyplot

    figure = getattr(drawn, "flat", [drawn])[0].figure  # plot_slice returns one or an array
    figure.set_layout_engine("constrained")  # some of Optuna's plots set a tight one
    for ax in figure.axes:
        if ax.get_legend() is not None:
            ax.get_legend().remove()
            figure.legend(loc="outside lower center", ncols=2, frameon=False)
        if slanted:
            pyplot.setp(ax.get_xticklabels(), rotation=slanted, ha="right", rotation_mode="anchor")
        for axis in (ax.xaxis, ax.yaxis):
            if axis.get_label_text() == "Trial":
                axis.get_major_locator().set_params(integer=True)
    return figure


def _widen(figure: Any) -> Any:
    """Widen a parallel-coordinate plot to fit its longest label, and make it more readable."""
    from matplotlib import pyplot

    first, *others = figure.axes
    labels = [label for ax in others for label in ax.get_yticklabels()]
    longest = max(len(label.get_text()) for label in labels)
    figure.set_size_inches(3 + len(first.get_xticks()) * max(1.2, 0.085 * longest), 5)
    first.collections[0].set_cmap("viridis")
    pyplot.setp(labels, bbox={"pad": 1, "facecolor": "white", "edgecolor": "none", "alpha": 0.8})
    return figure
