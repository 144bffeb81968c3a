"""The verb `sweep`: run a W&B sweep file with Optuna."""

import argparse
import contextlib
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from tq_lightning.cli.parser import Parser
from tq_lightning.errors import UserError, hide_password, program_name
from tq_lightning.files import expand_path
from tq_lightning.sweep.config import GOALS, Sweep, read_sweep, with_extra
from tq_lightning.sweep.study import FIT, Options, make_trial_queue, open_study, trial_limit
from tq_lightning.sweep.trial_queue import STALE_SECONDS

MAX_WORKERS = 1024  # processes of one command


def main(argv: list[str], fit: str = FIT) -> int:
    """Run or join the sweep of a file.

    Args:
        argv: arguments as on the command line, after `sweep`.
        fit: function that runs a trial, as MODULE:NAME. The arguments of the trials are checked
            only for the default, the real `fit`.

    Returns:
        0 if the sweep is complete or timed out, 1 if no trial has a result, 128 plus the
        signal number if it was interrupted.

    Raises:
        UserError: bad input, before any training starts; a folder that can't be written.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    given, extra = parser().parse_args(argv[:cut]), argv[cut + 1 :]
    sweep = with_extra(read_sweep(given.file), extra)
    options = read_options(given, sweep, extra, fit)
    trial_limit(sweep, options)
    if fit == FIT:
        from tq_lightning.sweep.validation import check_arms, check_goals

        check_goals(sweep, options.objectives)
        check_arms(sweep, list(options.objectives))
    try:
        return run(sweep, options, argv)
    except OSError as error:
        where = error.filename or options.folder
        raise UserError(f"cannot write {where}: {error.strerror}; pass another --dir") from error


def run(sweep: Sweep, options: Options, argv: list[str]) -> int:
    """Run the sweep and write its tables and plots. Return the exit status of `main`."""
    from tq_lightning.sweep.launcher import run_sweep
    from tq_lightning.sweep.results import write_results
    from tq_lightning.sweep.storage import sqlite_url
    from tq_lightning.sweep.worker import run_inline

    new = not options.folder.exists()
    if options.storage == sqlite_url(options.folder / "study.db"):
        options.folder.mkdir(parents=True, exist_ok=True)
    try:
        status = run_inline(sweep, options) if options.workers == 0 else run_sweep(sweep, options)
    except UserError:
        if new:
            _remove_unused(options.folder)
        raise
    queue = make_trial_queue(sweep, open_study(sweep, options), options)
    write_results(sweep, queue, options.folder)
    if status or not (queue.finished() or queue.limit is None):
        why = "interrupted" if status else "out of time"
        print(f"{why}. Progress is saved. Resume with: {resume_command(argv)}")
    if not status and not any(t.values for t in queue.trials()):
        reasons = [t.user_attrs["reason"] for t in queue.trials() if "reason" in t.user_attrs]
        first = (reasons or ["none has started"])[0]
        print(f"error: no trial has a result: {first}", file=sys.stderr)
        return 1
    return status


def _remove_unused(folder: Path) -> None:
    """Remove the folder of a sweep that never started and contains only files of a database."""
    with contextlib.suppress(OSError):  # never created
        files = list(folder.iterdir())
        if all(path.name.startswith("study.db") for path in files):
            for path in files:
                path.unlink()
            folder.rmdir()


def resume_command(argv: list[str]) -> str:
    """Return the command that resumes a sweep, with passwords masked and a note about them."""
    shown = [hide_password(argument) for argument in argv]
    hint = "" if shown == argv else "  (replace *** by the password of --storage)"
    return f"{program_name()} sweep {shlex.join(shown)}{hint}"


def parser() -> argparse.ArgumentParser:
    """Build the parser of `sweep`."""
    p = Parser(
        "sweep",
        description="Run a W&B sweep file with Optuna, without an account or a network. Run the "
        "same command again to resume. Run it on another machine, with the same --storage, to add "
        "workers.",
        epilog="Arguments after -- are passed to the fit of every trial and override the file: "
        "-- --trainer.max_epochs=2 --data.name=digits",
    )
    p.add_argument("file", help="sweep file in the W&B format, e.g. sweeps/digits.yaml")
    p.add_argument(
        "--workers",
        type=_integer(0, MAX_WORKERS),
        default=1,
        help="worker processes on this machine (default: 1; 0 runs the trials in this process)",
    )
    p.add_argument(
        "--n-trials",
        type=_integer(1),
        help="number of trials of the study, on all machines (default: run_cap, or the full grid)",
    )
    p.add_argument(
        "--timeout", type=_seconds, help="seconds after which this command starts no new trials"
    )
    p.add_argument("--study-name", type=_text, help="default: `name` of the file, or its file name")
    p.add_argument(
        "--dir",
        type=_text,
        help="folder for trials, logs, tables and plots (default: runs/sweeps/STUDY-NAME)",
    )
    p.add_argument(
        "--storage",
        type=_text,
        help="Optuna storage: postgresql+psycopg://user@host/db, or journal:PATH "
        "(default: SQLite in --dir)",
    )
    p.add_argument(
        "--objectives",
        help="several metrics, e.g. val/acc1_truncate_w2:max,storage/bytes:min; disables pruning",
    )
    p.add_argument(
        "--stale-after",
        type=_seconds,
        default=STALE_SECONDS,
        help="seconds without a heartbeat after which another worker retries a trial "
        "(default: %(default)g)",
    )
    return p


def read_options(
    given: argparse.Namespace, sweep: Sweep, extra: list[str], fit: str = FIT
) -> Options:
    """Complete the parsed arguments with the defaults of the sweep file."""
    from tq_lightning.sweep.storage import sqlite_url

    study_name = given.study_name or sweep.name
    folder = expand_path(given.dir) if given.dir else default_folder(study_name, sweep)
    for option, text in (("--study-name", study_name), ("--dir", str(folder))):
        try:
            text.encode()
        except UnicodeEncodeError:  # databases store UTF-8
            raise UserError(f"{option}: got {text!a}, pass a name in UTF-8") from None
    return Options(
        folder=folder,
        storage=given.storage or sqlite_url(folder / "study.db"),
        study_name=study_name,
        objectives=read_objectives(given.objectives, sweep),
        file=sweep.path,
        extra=tuple(extra),
        workers=given.workers,
        n_trials=given.n_trials,
        timeout=given.timeout,
        stale_after=given.stale_after,
        fit=fit,
    )


def default_folder(study_name: str, sweep: Sweep) -> Path:
    """Return runs/sweeps/STUDY_NAME.

    Raises:
        UserError: the name is not a valid folder name.
    """
    printable = study_name.isprintable() and not set(study_name) & set("/\\")
    if not printable or study_name in (".", "..") or len(study_name.encode()) > 200:
        where = f"{sweep.path}: name" if study_name == sweep.name else "--study-name"
        raise UserError(
            f"{where}: {study_name[:80]!r} cannot name a folder; pass --dir, or use another name"
        )
    return Path("runs") / "sweeps" / study_name


def read_objectives(text: str | None, sweep: Sweep) -> dict[str, str]:
    """Return {metric: minimize or maximize} of --objectives, or of the metric of the file."""
    if text is None:
        if sweep.metric is None:
            raise UserError(
                f"{sweep.path}: no metric; add metric with name and goal, "
                "or pass --objectives NAME:max"
            )
        return {sweep.metric: sweep.goal}
    objectives: dict[str, str] = {}
    for part in text.split(","):
        name, _, goal = part.strip().rpartition(":")
        full = next((known for known in GOALS if goal in (known, known[:3])), None)
        if not name or full is None or name in objectives:
            raise UserError(
                "--objectives: expected NAME:max or NAME:min, each name once, "
                f"separated by commas; got {part!r}"
            )
        objectives[name] = full
    return objectives


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected an integer >= {least}, got {text}")
        if most is not None and number > most:
            raise argparse.ArgumentTypeError(f"expected an integer <= {most}, got {text}")
        return number

    return integer


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"got {text!r}; pass a value, or omit the option")
    return text


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (1 <= number < math.inf):
        raise argparse.ArgumentTypeError(f"expected seconds >= 1, got {text}")
    return number
