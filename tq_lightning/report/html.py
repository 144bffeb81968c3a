"""The page: one HTML file that holds tables, figures and every run's configuration, and asks nothing of a network."""

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

from tq_lightning.report.assets import SCRIPT, STYLE
from tq_lightning.report.comparisons import Comparisons
from tq_lightning.report.figures.style import Figure
from tq_lightning.report.findings import Finding
from tq_lightning.report.groups import Arm
from tq_lightning.report.runs import Run
from tq_lightning.report.stats import METHOD
from tq_lightning.report.tables.render import Cell, Table, sort_key, text

# Nothing may be fetched: the browser itself would refuse, should a link ever slip in.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"

LONG = 36  # characters beyond which a cell may wrap


def page(
    title: str,
    evidence: Comparisons,
    tables: list[Table],
    figures: list[Figure],
    verdicts: list[Finding],
    folder: Path,
    made: dict[str, Any],
) -> str:
    """The whole page as text. `folder` holds the figures' SVG files; `made` says how the report was made."""
    runs = [run for arm in evidence.arms for run in arm.runs]
    sections = [
        ("summary", "Summary", _summary(evidence, verdicts, made)),
        ("figures", "Figures", _figures(figures, folder)),
        *((t.name, t.title, _table(t)) for t in tables if t.name != "left_out"),
        *([("runs", "Runs", _table(run_table(evidence.arms)))] if runs else []),
        *((t.name, t.title, _table(t)) for t in tables if t.name == "left_out"),
    ]
    links = "".join(f'<li><a href="#{name}">{_e(words)}</a></li>' for name, words, _ in sections)
    body = "".join(
        f'<section id="{n}" aria-labelledby="{n}-h"><h2 id="{n}-h">{_e(w)}</h2>{inner}</section>'
        for n, w, inner in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{_e(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header><h1>{_e(title)}</h1><button id="theme" type="button" aria-label="Colours: system">Colours: system</button></header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main id="main" tabindex="-1">{body}</main>
<dialog id="run" aria-labelledby="run-h"><form method="dialog"><h2 id="run-h">Run</h2><button autofocus>Close</button></form>
<div id="run-body"></div></dialog>
<script type="application/json" id="records">{_json({run.id: _details(run) for run in runs})}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _e(words: Any) -> str:
    return html.escape(str(words), quote=True)


def _json(value: Any) -> str:
    """JSON that a browser reads (no NaN) and that can stand inside a script element: no text of a record can end it."""
    made = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return made.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _summary(evidence: Comparisons, verdicts: list[Finding], made: dict[str, Any]) -> str:
    runs = sum(len(arm.runs) for arm in evidence.arms)
    left_out = len(evidence.left_out)
    counts = f"{runs} runs in {len(evidence.arms)} arms, {len(evidence.inspects)} inspect records, {left_out} left out."
    parts = [f"<p>{_e(counts)}</p>"]
    for verdict in verdicts:
        lines = "".join(f"<li>{_e(line)}</li>" for line in verdict.lines)
        rests = f"<details><summary>What this rests on ({len(verdict.lines)})</summary><ul>{lines}</ul></details>"
        parts.append(
            f'<div class="verdict"><h3>{_e(verdict.question)}</h3><p>{_e(verdict.answer)}</p>{rests}</div>'
        )
    parts += [
        f"<p>{_e(METHOD)}</p>",
        *(f'<p class="note">{_e(note)}</p>' for note in evidence.notes),
    ]
    files = ", ".join(f'<a href="{_e(name)}">{_e(name)}</a>' for name in made["files"])
    parts.append(
        f"<p>Made by <code>{_e(made['command'])}</code>, tq_lightning {_e(made['version'])}. Beside this page: {files}.</p>"
    )
    return "".join(parts)


def _figures(figures: list[Figure], folder: Path) -> str:
    if not figures:
        return "<p>No figure can be drawn from these records.</p>"
    sections = dict.fromkeys(drawn.section for drawn in figures)
    parts = [
        [f"<h3>{_e(name)}</h3>", *(_figure(d, folder) for d in figures if d.section == name)]
        for name in sections
    ]
    return "".join(piece for part in parts for piece in part)


def _figure(drawn: Figure, folder: Path) -> str:
    data = base64.b64encode((folder / f"{drawn.name}.svg").read_bytes()).decode()
    name = _e(drawn.name)
    image = f'<img alt="{_e(drawn.alt)}" src="data:image/svg+xml;base64,{data}">'
    links = f'<a href="figures/{name}.png">PNG</a> <a href="figures/{name}.svg">SVG</a>'
    words = f"<strong>{_e(drawn.title)}.</strong> {_e(drawn.caption)} {links}"
    return f'<figure id="fig-{name}"><div class="frame">{image}</div><figcaption>{words}</figcaption></figure>'


def _table(table: Table) -> str:
    """A table with sortable heads, a text filter and a drop-down for each facet; all rows are in the page, script or not."""
    where, name = {column: i for i, column in enumerate(table.columns)}, _e(table.name)
    heads = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{_e(c)}</button></th>'
        for c in table.columns
    )
    rows = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in table.rows)
    picks = "".join(_facet(table, column, where[column]) for column in table.facets)
    box = f'<input type="search" placeholder="words, all must match" aria-controls="t-{name}">'
    count = f'<output aria-live="polite">{len(table.rows)} of {len(table.rows)} rows</output>'
    body = f"<caption>{_e(table.caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody>"
    notes = (
        f"<ul>{''.join(f'<li>{_e(note)}</li>' for note in table.notes)}</ul>" if table.notes else ""
    )
    return (
        f'<div class="table" data-name="{name}"><div class="controls"><label>Filter {box}</label>{picks}{count}</div>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_e(table.title)}"><table id="t-{name}">{body}</table>'
        f"</div>{notes}</div>"
    )


def _facet(table: Table, name: str, column: int) -> str:
    values = list(dict.fromkeys(text(row[column]) for row in table.rows))
    if not 2 <= len(values) <= 40:
        return ""
    options = "".join(f"<option>{_e(v)}</option>" for v in values)
    return f'<label>{_e(name)} <select data-column="{column}"><option value="">all</option>{options}</select></label>'


def _cell(cell: Cell) -> str:
    key = sort_key(cell)
    if isinstance(cell, Link):
        return f'<td><button type="button" class="run" data-run="{_e(cell.run)}">{_e(cell)}</button></td>'
    number = isinstance(key, int | float) and not isinstance(key, bool)
    if number:
        return f'<td class="n" data-key="{key}">{_e(text(cell))}</td>'
    return (
        f'<td class="long">{_e(text(cell))}</td>'
        if len(text(cell)) > LONG
        else f"<td>{_e(text(cell))}</td>"
    )


class Link(str):
    """A cell that opens a run's details."""

    run: str


def _link(words: str, run: str) -> Link:
    link = Link(words)
    link.run = run
    return link


def run_table(arms: list[Arm]) -> Table:
    """One row a run; its first cell opens the exact configuration."""
    widths = sorted({w for arm in arms for run in arm.runs for w in run.widths}, reverse=True)
    rows: list[list[Cell]] = []
    for number, arm in enumerate(arms):
        for run in arm.runs:
            record = run.record
            part = "test" if run.has_test else "val"
            facts = [
                str(arm[k])
                for k in ("model.name", "data.name", "model.quantizer", "model.ste", "model.level")
            ]
            values = [run.acc1("truncate", w, part) for w in widths]
            gap = [g for w in arm.trained if (g := _gap(run, w, part)) is not None]
            tail = [record.epochs, record.seconds, str(record.commit)[:8]]
            rows.append(
                [
                    _link(run.id[:10], run.id),
                    number,
                    *facts,
                    run.seed,
                    *values,
                    max(gap, default=None),
                    part,
                    *tail,
                ]
            )
    head = ["run", "arm", "model", "data", "quantizer", "ste", "level", "seed"]
    columns = [*head, *map(str, widths), "largest gap", "split", "epochs", "seconds", "commit"]
    caption = (
        "Top-1 in per cent of the truncated weights by width in bits, and the largest QT gap at a trained width in points. "
        "The button of a run opens its configuration, seed, commit and versions. The full table, a row a run, source and "
        "width, is runs.csv."
    )
    return Table(
        "runs",
        "Runs",
        caption,
        columns,
        rows,
        ("model", "data", "quantizer", "ste", "level", "seed"),
    )


def _gap(run: Run, width: int, part: str) -> float | None:
    quantized, truncated = run.acc1("quantize", width, part), run.acc1("truncate", width, part)
    return None if quantized is None or truncated is None else quantized - truncated


def _details(run: Run) -> dict[str, Any]:
    """What the dialog of a run shows: its record but for the curves and for metrics that `widths` and `test` repeat."""
    tree = run.record.tree(("curves", "config", "schema", "last", "best"))
    best = run.record.best
    kept = {"epoch": best.epoch, "monitor": best.monitor} if best is not None else {}
    return {"path": run.path, "config": run.record.config, "record": {**tree, "best": kept}}
