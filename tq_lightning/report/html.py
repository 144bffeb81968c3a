"""The page: one self-contained HTML file with tables, figures and every run's configuration."""

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tq_lightning.records import PPL
from tq_lightning.report import labels
from tq_lightning.report.comparisons import Comparisons
from tq_lightning.report.runs import Run
from tq_lightning.report.tables.render import LONG, sort_key, text

HERE = Path(__file__).parent


def page(svg_folder: Path, comparisons: Comparisons, **parts: Any) -> str:
    """Render `templates/report.html.j2` with the SVG files of a folder and the details of runs."""
    loader = FileSystemLoader([HERE / "templates", HERE / "static"], encoding="utf-8")
    layout: Any = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **layout)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {"text": text, "sort_key": sort_key}
    environment.globals["labels"] = labels
    images = {p.stem: base64.b64encode(p.read_bytes()).decode() for p in svg_folder.glob("*.svg")}
    # JSON in browsers does not support NaN and infinity, so they become strings.
    runs = {run.id: _details(run) for arm in comparisons.arms for run in arm.runs}
    parts |= {"records": json.loads(json.dumps(runs), parse_constant=str), "long": LONG}
    parts |= {"comparisons": comparisons, "images": images}
    perplexity = any(part.metric is PPL for part in comparisons.by_metric)
    parts["definitions"] = labels.DEFINITIONS | (labels.PERPLEXITY if perplexity else {})
    return environment.get_template("report.html.j2").render(parts)


def _details(run: Run) -> dict[str, Any]:
    """Return the record without curves and without metrics that `widths` and `test` repeat."""
    tree = run.record.tree(without=("curves", "config", "schema", "last", "best"))
    tree["best_epoch"] = run.record.best.epoch if run.record.best else None
    return {"path": run.path, "config": run.record.config, "record": tree}
