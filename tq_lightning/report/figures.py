"""The figures of the report: one function each, one row each in FIGURES. Where it has no records, a function draws nothing."""

from collections.abc import Callable
from functools import partial

from tq_lightning.report import draw_accuracy, draw_across, draw_models
from tq_lightning.report.evidence import Evidence
from tq_lightning.report.labels import ACTIVATIONS_SOURCE
from tq_lightning.report.style import Drawn, styled

FIGURES: dict[str, Callable[[Evidence], list[Drawn]]] = {
    "qt_gap": draw_accuracy.qt_gap,
    "mechanism": draw_models.mechanism,
    "disagreement": draw_across.disagreement,
    "storage": draw_models.storage,
    "energy": draw_models.energy,
    "ste": partial(draw_accuracy.factor, key="model.ste", title="STE ablation"),
    "level": partial(draw_accuracy.factor, key="model.level", title="Levels"),
    "activations": partial(draw_accuracy.factor, key="model.activations", title="Activations"),
    "activations_source": partial(
        draw_accuracy.factor, key=ACTIVATIONS_SOURCE, title="Activations truncated like the weights, or requantized"
    ),
    "normalizer": partial(draw_accuracy.factor, key="model.normalizer", title="Normalisers"),
    "widths": partial(draw_accuracy.factor, key="model.widths", title="Width sets"),
    "teacher": partial(draw_accuracy.factor, key="model.teacher", title="Teachers"),
    "curves": draw_accuracy.curves,
    "robustness": draw_across.robustness,
    "pareto": draw_across.pareto,
}


def draw(evidence: Evidence) -> list[Drawn]:
    """Every figure that the evidence allows, in the order of FIGURES."""
    with styled():
        return [drawn for function in FIGURES.values() for drawn in function(evidence)]
