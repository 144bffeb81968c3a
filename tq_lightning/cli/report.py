"""`python -m tq_lightning report RUNS_OR_STUDIES... --out results/NAME`: the report appears whole or not at all."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from tq_lightning.cli.parser import Parser
from tq_lightning.errors import UserError, hide_password
from tq_lightning.report.write import check_out, make


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = Parser(
        "report",
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
    from tq_lightning.report import comparisons as evidence
    from tq_lightning.report import runs as records

    loaded = records.load(arguments.inputs, arguments.full_paths)
    for key in arguments.ignore:
        if not any(key in run.config for run in loaded.runs):
            raise UserError(
                f"--ignore {key}: no run has the key {key}; pass one such as model.lr or data.batch_size"
            )
    found = evidence.gather(loaded, arguments.ignore)
    command = "python -m tq_lightning report " + shlex.join(argv)
    command = records.shorten(hide_password(command))
    written = make(found, out, arguments.title or out.resolve().name, command)
    show(found, out, written)
    return 0


def show(evidence: Any, out: Path, files: list[str]) -> None:
    """The arms, what was left out and where it all is: a table for a person, plain lines for a pipe."""
    from tq_lightning.report.tables import build as tabulate
    from tq_lightning.report.tables import render as tables

    table = tabulate.arms(evidence)
    cells = {c: [tables.text(row[i]) for row in table.rows] for i, c in enumerate(table.columns)}
    always = ("model", "data", "quantizer", "ste", "seeds", "8", "4", "2", "1", "split")
    telling = (
        "level",
        "activations",
        "also",
    )  # shown where arms differ in them, lest two rows look the same
    heads = [c for c in table.columns if c in always or (c in telling and len(set(cells[c])) > 1)]
    rows = list(map(list, zip(*(cells[c] for c in heads), strict=True)))
    if sys.stdout.isatty() and rows:
        from rich.console import Console
        from rich.table import Table

        shown = Table(
            *heads, title="top-1 truncated [%] by bits, mean ± 95 % t interval over seeds"
        )
        for row in rows:
            shown.add_row(*row)
        Console().print(shown)
    elif rows:
        print("\n".join("\t".join(row) for row in [heads, *rows]))
    for path, reason in evidence.left_out:
        print(f"left out: {path}: {reason}")
    runs, left_out = sum(len(arm.runs) for arm in evidence.arms), len(evidence.left_out)
    print(
        f"{runs} runs in {len(evidence.arms)} arms, {len(evidence.inspects)} inspect records, {left_out} left out"
    )
    print(f"{len(files)} files in {out}: open {out / 'index.html'}")
