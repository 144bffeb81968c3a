"""`python -m tq_lightning report RUNS_OR_STUDIES... --out results/NAME`: the report appears whole or not at all."""

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from tq_lightning.errors import UserError

MARKER = "report.json"  # what makes a folder a report of ours, which a new one may replace
KIND = "tq_lightning report"


class Parser(argparse.ArgumentParser):
    """One line for a wrong argument, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`; the command line prints it and exits with status 2."""
        raise UserError(f"report: {message}; --help lists the arguments")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = Parser(
        prog="python -m tq_lightning report",
        description="Tables, figures and one self-contained page from run records (record.json).",
    )
    made.add_argument(
        "inputs",
        nargs="+",
        metavar="RUNS_OR_STUDIES",
        help="run folders, globs, record files, W&B run folders, Optuna studies (file or URL)",
    )
    made.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="the report's folder, e.g. results/NAME; a report that is already there is replaced",
    )
    made.add_argument("--title", help="title of the page (default: the folder's name)")
    made.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="KEY",
        help="key left aside when arms are matched, e.g. model.lr (repeatable)",
    )
    made.add_argument(
        "--full-paths",
        action="store_true",
        help="keep absolute paths of the machine in configurations (default: shortened)",
    )
    return made


def main(argv: list[str]) -> int:
    """Make a report; exit status 0. Raises `UserError` (printed by the command line, exit status 2) for bad input."""
    arguments = parser().parse_args(argv)
    out = Path(arguments.out)
    check_out(out)
    from tq_lightning.report import evidence, records

    loaded = records.load(arguments.inputs, arguments.full_paths)
    for key in arguments.ignore:
        if not any(key in run.config for run in loaded.runs):
            raise UserError(f"--ignore {key}: no run has the key {key}; pass one such as model.lr or data.batch_size")
    found = evidence.gather(loaded, arguments.ignore)
    command = records.shorten("python -m tq_lightning report " + shlex.join(argv))
    written = make(found, out, arguments.title or out.resolve().name, command)
    show(found, out, written)
    return 0


def check_out(out: Path) -> None:
    """Refuse, before any work, a target that is a file or a folder that is not a report of ours."""
    if out.is_dir():
        if any(out.iterdir()) and not is_report(out):
            raise UserError(f"--out {out}: the folder exists and is not a report; pass a new folder (nothing was touched)")
    elif out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: that is a file; pass a folder that is new or holds a report")


def is_report(folder: Path) -> bool:
    """True where the folder bears our marker."""
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8")).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False


def make(evidence: Any, out: Path, title: str, command: str) -> list[str]:
    """Write the report beside `out` and move it there when it is whole; returns the names of its files."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"--out {out}: can't be written: {error.strerror} ({error.filename})") from error
    try:
        building.chmod(0o755)  # mkdtemp's is for the owner alone
        files = fill(building, evidence, title, command)
        swap(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return files


def fill(folder: Path, evidence: Any, title: str, command: str) -> list[str]:
    """All files of a report into `folder`."""
    from importlib.metadata import PackageNotFoundError, version

    from tq_lightning.report import figures, page, style, tables, tabulate, tidy, verdicts

    try:
        ours = version("tq_lightning")
    except PackageNotFoundError:
        ours = "unknown"
    (folder / "figures").mkdir()
    (folder / "tables").mkdir()
    drawn = figures.draw(evidence)
    for figure in drawn:
        style.write(figure, folder / "figures")
    made_tables = tabulate.tables(evidence)
    for table in made_tables:
        (folder / "tables" / f"{table.name}.md").write_text(tables.markdown(table), encoding="utf-8")
        (folder / "tables" / f"{table.name}.tex").write_text(tables.latex(table), encoding="utf-8")
    said = verdicts.verdicts(evidence)
    (folder / "summary.md").write_text(summary(title, command, said, evidence.notes), encoding="utf-8")
    beside = [*(tidy.write(evidence.arms, folder) if evidence.arms else []), "summary.md"]
    made = {"command": command, "version": ours, "files": beside}
    text = page.page(title, evidence, made_tables, drawn, said, folder / "figures", made)
    (folder / "index.html").write_text(text, encoding="utf-8")
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    marker = {
        "kind": KIND,
        "schema": 1,
        "title": title,
        "command": command,
        "version": ours,
        "left_out": evidence.left_out,
        "files": files,
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return files


def summary(title: str, command: str, said: list[Any], notes: list[str]) -> str:
    """The verdicts as Markdown."""
    lines = [f"# {title}", "", f"    {command}", ""]
    for verdict in said:
        lines += [f"**{verdict.question}** {verdict.answer}", "", *(f"- {line}" for line in verdict.lines), ""]
    return "\n".join([*lines, *notes, ""])


def swap(building: Path, out: Path) -> None:
    """Put the finished folder in its place; an older report is moved aside first and comes back should the move fail."""
    if not out.exists() or not any(out.iterdir()):
        os.replace(building, out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    os.replace(out, aside / "report")
    try:
        os.replace(building, out)
    except OSError:
        os.replace(aside / "report", out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def show(evidence: Any, out: Path, files: list[str]) -> None:
    """The arms, what was left out and where it all is: a table for a person, plain lines for a pipe."""
    from tq_lightning.report import tables, tabulate

    table = tabulate.arms(evidence)
    cells = {c: [tables.text(row[i]) for row in table.rows] for i, c in enumerate(table.columns)}
    always = ("model", "data", "quantizer", "ste", "seeds", "8", "4", "2", "1", "split")
    telling = ("level", "activations", "also")  # shown where arms differ in them, lest two rows look the same
    heads = [c for c in table.columns if c in always or (c in telling and len(set(cells[c])) > 1)]
    rows = list(map(list, zip(*(cells[c] for c in heads), strict=True)))
    if sys.stdout.isatty() and rows:
        from rich.console import Console
        from rich.table import Table

        shown = Table(*heads, title="top-1 truncated [%] by bits, mean ± 95 % t interval over seeds")
        for row in rows:
            shown.add_row(*row)
        Console().print(shown)
    elif rows:
        print("\n".join("\t".join(row) for row in [heads, *rows]))
    for path, reason in evidence.left_out:
        print(f"left out: {path}: {reason}")
    runs, left_out = sum(len(arm.runs) for arm in evidence.arms), len(evidence.left_out)
    print(f"{runs} runs in {len(evidence.arms)} arms, {len(evidence.inspects)} inspect records, {left_out} left out")
    print(f"{len(files)} files in {out}: open {out / 'index.html'}")
