"""The page: one HTML file with tables, figures and every run's configuration, without requests."""

import base64
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tq_lightning.report import labels
from tq_lightning.report.comparisons import Comparisons
from tq_lightning.report.figures.style import Figure
from tq_lightning.report.runs import Run
from tq_lightning.report.tables.render import LONG, Link, Table, sort_key, text

HERE = Path(__file__).parent
MAX_FACET = 40  # values of a drop-down filter


def page(folder: Path, comparisons: Comparisons, figures: list[Figure], **parts: Any) -> str:
    """Render the page.

    Args:
        folder: holds the SVG files of the figures.
        comparisons: the arms whose runs the page describes.
        figures: the figures, in order.
        **parts: the other variables of `templates/report.html.j2`.
    """
    loader = FileSystemLoader([HERE / "templates", HERE / "static"], encoding="utf-8")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {"text": text, "sort_key": sort_key, "facet": facet}
    environment.tests |= {"link": lambda c: isinstance(c, Link), "number": _is_number}
    environment.globals["static"] = lambda name: Markup((HERE / "static" / name).read_text("utf-8"))
    sections = {name: [f for f in figures if f.section == name] for name in _sections(figures)}
    runs = [run for arm in comparisons.arms for run in arm.runs]
    return environment.get_template("report.html.j2").render(
        comparisons=comparisons,
        sections=sections,
        images={figure.name: _data(folder / f"{figure.name}.svg") for figure in figures},
        records=_finite({run.id: _details(run) for run in runs}),
        runs=runs,
        labels=labels,
        long=LONG,
        **parts,
    )


def _sections(figures: list[Figure]) -> list[str]:
    return list(dict.fromkeys(figure.section for figure in figures))


def _data(path: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def facet(table: Table, column: str) -> list[str]:
    """Return the values of a drop-down filter, or none if they are too many or too few."""
    values = list(dict.fromkeys(text(row[column]) for row in table.rows))
    return values if 2 <= len(values) <= MAX_FACET else []


def _finite(value: Any) -> Any:
    """Return JSON types that a browser reads: it knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _details(run: Run) -> dict[str, Any]:
    """Return the record without its curves, and without metrics that `widths` and `test` repeat."""
    tree = run.record.tree(without=("curves", "config", "schema", "last", "best"))
    best = run.record.best
    shown = {"epoch": best.epoch, "monitor": best.monitor} if best else {}
    return {"path": run.path, "config": run.record.config, "record": {**tree, "best": shown}}
