"""The verb `report`: write tables, figures and an HTML page of runs."""

import argparse
import shlex
import sys
from pathlib import Path

import pandas as pd

from tq_lightning.cli.parser import Parser
from tq_lightning.errors import UserError, hide_password
from tq_lightning.files import check_replaceable
from tq_lightning.provenance import __version__
from tq_lightning.records.publish import printable, shorten
from tq_lightning.report.comparisons import Comparisons, group_runs
from tq_lightning.report.findings import title
from tq_lightning.report.labels import counted
from tq_lightning.report.runs import load
from tq_lightning.report.tables.accuracy import arms
from tq_lightning.report.write import KIND, MARKER, write_report

ALWAYS = ("model", "data", "quantizer", "ste", "seeds", "split")
BITS = ("8 bits", "4 bits", "2 bits", "1 bit")
WIDTHS = (*(f"{bits} [%]" for bits in BITS), *BITS)  # accuracies, and perplexities
IF_DIFFERENT = ("level", "activations", "also")  # printed only if arms differ in them


def parser() -> argparse.ArgumentParser:
    """Build the parser of the verb."""
    what = "Tables, figures and one self-contained page from run records (record.json)."
    made = Parser("report", description=what)
    inputs = "run folders, globs, record files, W&B run folders, Optuna studies (file or URL)"
    made.add_argument("inputs", nargs="+", metavar="RUNS_OR_STUDIES", help=inputs)
    out = "folder of the report, e.g. results/NAME; an existing report is replaced"
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER", help=out)
    made.add_argument("--title", help="title of the page (default: the first result)")
    ignore = "compare arms although they differ in this key, e.g. model.lr (repeatable)"
    made.add_argument("--ignore", action="append", default=[], metavar="KEY", help=ignore)
    full_paths = "keep absolute paths of this machine (default: shorten them)"
    made.add_argument("--full-paths", action="store_true", help=full_paths)
    return made


def main(argv: list[str]) -> int:
    """Write a report and return exit status 0.

    Raises:
        UserError: bad input; the command line prints it and exits with status 2.
    """
    arguments = parser().parse_args(argv)
    out = arguments.out
    check_replaceable(out, MARKER, KIND, "a report")
    loaded = load(arguments.inputs, arguments.full_paths)
    for key in arguments.ignore:
        if not any(key in run.config for run in loaded.runs):
            raise UserError(f"--ignore {key}: no run has this key; pass one such as model.lr")
    comparisons = group_runs(loaded, arguments.ignore)
    # not program_name(): the same inputs give the same report, however it was started
    command = shorten(hide_password("python -m tq_lightning report " + shlex.join(argv)))
    about = {"title": printable(arguments.title or title(comparisons.by_metric[0]))}
    about |= {"command": command, "version": __version__}
    show(comparisons, out, write_report(comparisons, out, about))
    return 0


def show(comparisons: Comparisons, out: Path, files: list[str]) -> None:
    """Print the arms, the skipped inputs and the folder, as a table or as plain lines."""
    frame = pd.concat([arms(part).shown for part in comparisons.by_metric]).fillna("")
    frame = frame.replace(r"\s+", " ", regex=True)  # a name may contain a line break
    varying = [column for column in frame if frame[column].nunique() > 1]
    shown = (*ALWAYS, *WIDTHS, *(column for column in IF_DIFFERENT if column in varying))
    frame = frame[[column for column in frame if column in shown]]
    if sys.stdout.isatty() and len(frame):
        from rich.console import Console
        from rich.table import Column, Table

        # values that all arms share are one line, so that the table fits a narrow terminal
        same = [column for column in frame if column not in (*WIDTHS, *varying)]
        differing = frame.drop(columns=same)
        names = " and ".join(part.metric.name for part in comparisons.by_metric)
        title = f"{names} truncated, mean ± 95 % t interval over seeds"
        table = Table(*(Column(name, overflow="fold") for name in differing), title=title)
        for row in differing.to_numpy():
            table.add_row(*row)
        console = Console(highlight=False)
        console.print(table)
        if same:
            console.print(", ".join(f"{column} {frame[column].iloc[0]}" for column in same))
    elif len(frame):
        print("\n".join("\t".join(row) for row in [frame.columns, *frame.to_numpy()]))
    for path, reason in comparisons.left_out:
        print(f"left out: {path}: {reason}")
    runs, left_out = sum(len(arm.runs) for arm in comparisons.arms), len(comparisons.left_out)
    counts = f"{counted(runs, 'run')} in {counted(len(comparisons.arms), 'arm')}"
    print(f"{counts}, {counted(len(comparisons.inspects), 'inspect record')}, {left_out} left out")
    print(f"{len(files)} files in {out}: open {out / 'index.html'}")
