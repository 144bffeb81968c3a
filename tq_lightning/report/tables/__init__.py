"""The tables of a report."""

from tq_lightning.report.comparisons import Comparisons
from tq_lightning.report.tables import accuracy, model_cost
from tq_lightning.report.tables.render import Cell, Table


def build(comparisons: Comparisons) -> list[Table]:
    """Return every table that has rows, in the order of the page."""
    functions = (
        accuracy.qt_gap,
        accuracy.arms,
        accuracy.differences,
        model_cost.storage,
        model_cost.read_at,
        model_cost.energy,
        model_cost.inference,
        model_cost.constants,
        left_out,
    )
    return [table for function in functions if (table := function(comparisons)).rows]


def left_out(comparisons: Comparisons) -> Table:
    """Return the files that were found but not used, each with the reason."""
    rows: list[dict[str, Cell]] = [
        {"record": path, "reason": reason} for path, reason in comparisons.left_out
    ]
    return Table("left_out", "Left out", "Found, but not used in this report.", rows)
