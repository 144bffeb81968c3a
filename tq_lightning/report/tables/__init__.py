"""The tables of a report."""

from dataclasses import replace

from tq_lightning.records import ACC1
from tq_lightning.report.comparisons import Comparisons
from tq_lightning.report.tables import accuracy, model_cost
from tq_lightning.report.tables.render import Table

# In the order of the page, which starts with the headline of the first metric.
TABLES = (
    accuracy.headline,
    accuracy.qt_gap,
    accuracy.arms,
    accuracy.differences,
    model_cost.storage,
    model_cost.read_at,
    model_cost.energy,
    model_cost.inference,
    model_cost.constants,
    accuracy.runs,
    accuracy.left_out,
)


def build(comparisons: Comparisons) -> list[Table]:
    """Return the tables that have rows; each name and title has the metric, unless it is top-1."""
    built = []
    for i, part in enumerate(comparisons.by_metric):
        metric = part.metric
        suffixes = ("", "") if metric is ACC1 else (f"_{metric.key}", f" ({metric.name})")
        for table in (function(part) for function in TABLES):
            name, title = f"{table.name}{suffixes[0]}", f"{table.title}{suffixes[1]}"
            if table.rows and (i or table.name != "headline"):
                built.append(replace(table, name=name, title=title))
    return built
