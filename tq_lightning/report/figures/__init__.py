"""The figures of a report. Each is one function and one row of FIGURES or of FACTORS.

A function returns its figures, and notes on data that it does not draw. The list of figures is
empty if there is nothing to compare.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tq_lightning.records import ACC1
from tq_lightning.report.comparisons import FACTORS, Comparisons
from tq_lightning.report.figures import accuracy, cross_model, model_cost, pareto
from tq_lightning.report.figures.style import Drawing, Figure, styled
from tq_lightning.report.labels import short_key

# Keep the figures of a section next to each other.
FIGURES: dict[str, Callable[[Comparisons], Drawing]] = {
    "qt_gap": accuracy.qt_gap,
    "mechanism": model_cost.mechanism,
    "disagreement": cross_model.disagreement,
    "storage": model_cost.storage,
    "energy": model_cost.energy,
    **{
        short_key(k): partial(accuracy.factor, key=k)
        for k, (section, _) in FACTORS.items()
        if section
    },
    "curves": accuracy.curves,
    "robustness": cross_model.robustness,
    "pareto": pareto.pareto,
}


def draw(comparisons: Comparisons) -> Drawing:
    """Draw every figure that the comparisons allow, in the order of FIGURES."""
    drawn: list[Figure] = []
    all_notes: list[str] = []
    for part in comparisons.by_metric:
        with styled():
            made = [function(part) for function in FIGURES.values()]
        suffix = "" if part.metric is ACC1 else f"_{part.metric.key}"
        drawn += [replace(f, name=f"{f.name}{suffix}") for figures, _ in made for f in figures]
        all_notes += [note for _, notes in made for note in notes]
    return drawn, all_notes
