"""Write a report: tables, figures and the page, as one folder that is replaced atomically."""

import json
from pathlib import Path

from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write, check_replaceable
from tq_lightning.records import PPL
from tq_lightning.report import dataframe, figures, html, labels, tables
from tq_lightning.report.comparisons import Comparisons
from tq_lightning.report.figures import style
from tq_lightning.report.findings import Finding, findings
from tq_lightning.report.tables import accuracy, render

MARKER = "report.json"  # marks a folder as a report, which a new one may replace
KIND = "tq_lightning report"


def check_out(out: Path) -> None:
    """Raise UserError if `out` is a file, or a folder that is not a report."""
    check_replaceable(out, MARKER, KIND, "a report")


def write_report(
    comparisons: Comparisons, out: Path, title: str, command: str, version: str
) -> list[str]:
    """Write the report to a temporary folder, rename it to `out`, and return its files.

    Raises:
        UserError: `out` cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror} ({error.filename})"
        raise UserError(f"--out {out} cannot be written: {reason}") from error
    with atomic_write(out) as building:
        building.mkdir()
        return write_files(building, comparisons, title, command, version)


def write_files(
    folder: Path, comparisons: Comparisons, title: str, command: str, version: str
) -> list[str]:
    """Write all files of a report into `folder`."""
    (folder / "figures").mkdir()
    (folder / "tables").mkdir()
    parts = comparisons.by_metric
    drawn, notes = figures.draw(comparisons)
    for figure in drawn:
        style.write(figure, folder / "figures")
    headline, built = accuracy.headline(parts[0]), list[render.Table]()
    for part in parts:
        more = [accuracy.headline(part)] if part is not parts[0] else []
        made = [table for table in [*more, *tables.build(part)] if table.rows]
        built += [accuracy.of_metric(table, part.metric) for table in made]
    texts = {f"tables/{table.name}.md": render.markdown(table) for table in built}
    texts |= {f"tables/{table.name}.tex": render.latex(table) for table in built}
    built += [accuracy.of_metric(accuracy.runs(p), p.metric) for p in parts if p.arms]
    answers = [finding for part in parts for finding in findings(part)]
    perplexity = labels.PERPLEXITY if any(part.metric is PPL for part in parts) else {}
    texts["summary.md"] = f"# {title}\n\n    {command}\n\n{summary(headline, answers, notes)}"
    data = dataframe.write(comparisons.arms, folder) if comparisons.arms else []
    texts["index.html"] = html.page(
        folder / "figures",
        [run for arm in comparisons.arms for run in arm.runs],
        comparisons=comparisons,
        definitions=labels.DEFINITIONS | perplexity,
        figures=drawn,
        title=title,
        headline=headline,
        findings=answers,
        notes=notes,
        tables=sorted(built, key=lambda table: table.name == "left_out"),
        command=command,
        version=version,
        files=[*data, "summary.md"],
    )
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    listed = sorted([*files, *texts])
    marker = {"kind": KIND, "schema": 1, "title": title, "command": command, "version": version}
    marker |= {"left_out": comparisons.left_out, "files": listed}
    texts[MARKER] = json.dumps(marker, indent=1, ensure_ascii=False) + "\n"
    for name, content in texts.items():
        (folder / name).write_text(content, encoding="utf-8")
    return listed


def summary(headline: render.Table, answers: list[Finding], notes: list[str]) -> str:
    """Return the first table and the findings as Markdown."""
    lines = [render.markdown(headline).partition("\n\n")[2]] if headline.rows else []
    for finding in answers:
        lines += [f"**{finding.question}** {finding.answer}", ""]
        lines += [*(f"- {line}" for line in finding.lines), ""]
    return "\n".join([*lines, labels.METHOD, *notes, ""])
