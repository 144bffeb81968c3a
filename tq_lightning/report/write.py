"""Write a report: tables, figures and the page, as one folder that is replaced atomically."""

import json
from pathlib import Path
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write

MARKER = "report.json"  # what makes a folder a report of ours, which a new one may replace


KIND = "tq_lightning report"


def check_out(out: Path) -> None:
    """Refuse, before any work, a target that is a file or a folder that is not a report of ours."""
    if out.is_dir():
        if any(out.iterdir()) and not is_report(out):
            raise UserError(
                f"--out {out}: the folder exists and is not a report; pass a new folder (nothing was touched)"
            )
    elif out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: that is a file; pass a folder that is new or holds a report")


def is_report(folder: Path) -> bool:
    """True where the folder bears our marker."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return marker.get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def make(evidence: Any, out: Path, title: str, command: str) -> list[str]:
    """Write the report beside `out` and move it there when it is whole; returns the names of its files."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {out}: can't be written: {error.strerror} ({error.filename})"
        ) from error
    with atomic_write(out) as building:
        building.mkdir()
        return fill(building, evidence, title, command)


def fill(folder: Path, evidence: Any, title: str, command: str) -> list[str]:
    """All files of a report into `folder`."""
    from tq_lightning import __version__
    from tq_lightning.report import dataframe as tidy
    from tq_lightning.report import figures
    from tq_lightning.report import findings as verdicts
    from tq_lightning.report import html as page
    from tq_lightning.report.figures import style
    from tq_lightning.report.tables import build as tabulate
    from tq_lightning.report.tables import render as tables

    (folder / "figures").mkdir()
    (folder / "tables").mkdir()
    drawn = figures.draw(evidence)
    for figure in drawn:
        style.write(figure, folder / "figures")
    made_tables = tabulate.tables(evidence)
    for table in made_tables:
        (folder / "tables" / f"{table.name}.md").write_text(
            tables.markdown(table), encoding="utf-8"
        )
        (folder / "tables" / f"{table.name}.tex").write_text(tables.latex(table), encoding="utf-8")
    said = verdicts.verdicts(evidence)
    (folder / "summary.md").write_text(
        summary(title, command, said, evidence.notes), encoding="utf-8"
    )
    beside = [*(tidy.write(evidence.arms, folder) if evidence.arms else []), "summary.md"]
    made = {"command": command, "version": __version__, "files": beside}
    text = page.page(title, evidence, made_tables, drawn, said, folder / "figures", made)
    (folder / "index.html").write_text(text, encoding="utf-8")
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    marker = {
        "kind": KIND,
        "schema": 1,
        "title": title,
        "command": command,
        "version": __version__,
        "left_out": evidence.left_out,
        "files": files,
    }
    (folder / MARKER).write_text(
        json.dumps(marker, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return files


def summary(title: str, command: str, said: list[Any], notes: list[str]) -> str:
    """The verdicts as Markdown."""
    lines = [f"# {title}", "", f"    {command}", ""]
    for verdict in said:
        lines += [
            f"**{verdict.question}** {verdict.answer}",
            "",
            *(f"- {line}" for line in verdict.lines),
            "",
        ]
    return "\n".join([*lines, *notes, ""])
