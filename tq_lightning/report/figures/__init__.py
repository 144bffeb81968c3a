"""The figures of the report: one function each, one row each in FIGURES. Where it has no records, a function draws nothing."""

from collections.abc import Callable
from functools import partial

from tq_lightning.report.comparisons import Comparisons
from tq_lightning.report.figures import accuracy as draw_accuracy
from tq_lightning.report.figures import cross_model as draw_across
from tq_lightning.report.figures import model_cost as draw_models
from tq_lightning.report.figures.style import Figure, styled
from tq_lightning.report.labels import ACTIVATIONS_SOURCE

FIGURES: dict[str, Callable[[Comparisons], list[Figure]]] = {
    "qt_gap": draw_accuracy.qt_gap,
    "mechanism": draw_models.mechanism,
    "disagreement": draw_across.disagreement,
    "storage": draw_models.storage,
    "energy": draw_models.energy,
    "ste": partial(draw_accuracy.factor, key="model.ste", title="STE ablation"),
    "level": partial(draw_accuracy.factor, key="model.level", title="Levels"),
    "activations": partial(draw_accuracy.factor, key="model.activations", title="Activations"),
    "activations_source": partial(
        draw_accuracy.factor,
        key=ACTIVATIONS_SOURCE,
        title="Activations truncated like the weights, or requantized",
    ),
    "normalizer": partial(draw_accuracy.factor, key="model.normalizer", title="Normalisers"),
    "widths": partial(draw_accuracy.factor, key="model.widths", title="Width sets"),
    "teacher": partial(draw_accuracy.factor, key="model.teacher", title="Teachers"),
    "curves": draw_accuracy.curves,
    "robustness": draw_across.robustness,
    "pareto": draw_across.pareto,
}


def draw(evidence: Comparisons) -> list[Figure]:
    """Every figure that the evidence allows, in the order of FIGURES."""
    with styled():
        return [drawn for function in FIGURES.values() for drawn in function(evidence)]
