"""Write a report: tables, figures and the page, as one folder that is replaced atomically."""

import json
from pathlib import Path

from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write
from tq_lightning.report import dataframe, figures, html, labels, tables
from tq_lightning.report.comparisons import Comparisons
from tq_lightning.report.figures import style
from tq_lightning.report.findings import Finding, findings
from tq_lightning.report.tables import accuracy, render

MARKER = "report.json"  # marks a folder as a report, which a new one may replace
KIND = "tq_lightning report"


def write_report(comparisons: Comparisons, out: Path, made: dict[str, str]) -> list[str]:
    """Write all files of a report to a temporary folder, rename it to `out`, and list them.

    The page and report.json state `made`: the title, the command and the version.

    Raises:
        UserError: `out` cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror} ({error.filename})"
        raise UserError(f"--out {out} cannot be written: {reason}") from error
    with atomic_write(out) as folder:
        for name in ("figures", "tables"):
            (folder / name).mkdir(parents=True)
        drawn, notes = figures.draw(comparisons)
        for figure in drawn:
            style.write(figure, folder / "figures")
        built = tables.build(comparisons)
        texts = {f"tables/{t.name}.md": render.markdown(t) for t in built if t.has_files}
        texts |= {f"tables/{t.name}.tex": render.latex(t) for t in built if t.has_files}
        answers = [finding for part in comparisons.by_metric for finding in findings(part)]
        headline = accuracy.headline(comparisons.by_metric[0])
        heading = f"# {made['title']}\n\n    {made['command']}"
        texts["summary.md"] = f"{heading}\n\n{summary(headline, answers, notes)}"
        parts = {"figures": drawn, "headline": headline, "findings": answers, "notes": notes}
        parts["tables"] = sorted(built, key=lambda t: (t.name == "left_out", not t.has_files))
        parts["files"] = [*dataframe.write(comparisons.arms, folder), "summary.md"]
        texts["index.html"] = html.page(folder / "figures", comparisons, **made, **parts)
        files = sorted([*texts, *(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))])
        left_out = comparisons.left_out
        marker = {"kind": KIND, "schema": 1, **made, "left_out": left_out, "files": files}
        texts[MARKER] = json.dumps(marker, indent=1, ensure_ascii=False) + "\n"
        for name, content in texts.items():
            (folder / name).write_text(content, encoding="utf-8")
    return files


def summary(headline: render.Table, answers: list[Finding], notes: list[str]) -> str:
    """Return the first table and the findings as Markdown."""
    lines = [render.markdown(headline).partition("\n\n")[2]] if headline.rows else []
    for finding in answers:
        lines += [f"**{finding.question}** {finding.answer}", ""]
        lines += [*(f"- {line}" for line in finding.lines), ""]
    return "\n".join([*lines, labels.METHOD, *notes, ""])
