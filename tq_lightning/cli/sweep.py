"""`python -m tq_lightning sweep FILE`: the command line of the Optuna engine."""

import argparse
import os
import shlex
import sys
from importlib import import_module
from pathlib import Path

from tq_lightning.cli.parser import Parser
from tq_lightning.errors import UserError
from tq_lightning.sweep.config import GOALS, Sweep, read_sweep, with_extra
from tq_lightning.sweep.trial_queue import STALE_SECONDS

FIT = "tq_lightning.cli:run_fit"


def main(argv: list[str]) -> int:
    """Run or join the sweep of a file. Returns 0 when it is done, 1 when no trial has a result, 130 when interrupted.

    Raises UserError for bad input, before any training starts.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    again, extra = tuple(argv[:cut]), tuple(argv[cut + 1 :])
    given = parser().parse_args(again)
    sweep = with_extra(read_sweep(given.file), list(extra))
    objectives = read_objectives(given.objectives, sweep)
    for name in ("workers", "n_trials", "timeout", "stale_after"):
        value = getattr(given, name)
        if value is not None and value < (0 if name == "workers" else 1):
            raise UserError(
                f"--{name.replace('_', '-')}: expected a number from {0 if name == 'workers' else 1}, got {value}"
            )

    from tq_lightning.sweep import launcher as engine

    study_name = given.study_name or sweep.name
    folder = Path(given.dir or Path("runs") / "sweeps" / study_name)
    storage = given.storage or f"sqlite:///{folder / 'study.db'}"
    options = engine.Options(
        folder,
        storage,
        study_name,
        objectives,
        given.workers,
        given.n_trials,
        given.timeout,
        given.stale_after,
        again,
        extra,
    )
    if given.worker is not None:
        return _work(sweep, options, given)
    if given.fit == FIT:
        from tq_lightning.sweep.validation import check_arms

        check_arms(sweep, list(objectives))
    if given.storage is None:
        folder.mkdir(parents=True, exist_ok=True)  # for the database in it
    if given.workers == 0:
        study = engine.open_study(sweep, options)
        finished = _work(sweep, options, given) == 0
    else:
        finished = engine.run_sweep(sweep, options)
        study = engine.open_study(sweep, options)

    from tq_lightning.sweep.results import write_outcome

    queue = engine.make_trial_queue(sweep, study, options)
    write_outcome(sweep, queue, folder)
    if not finished or not (queue.settled() or queue.limit is None):
        why = "out of time" if finished else "interrupted"
        print(
            f"{why}; nothing is lost: go on with  python -m tq_lightning sweep {shlex.join(argv)}"
        )
    if finished and not any(t.values for t in queue.trials()):
        reasons = [t.user_attrs["reason"] for t in queue.trials() if "reason" in t.user_attrs] or [
            "none has begun"
        ]
        print(f"error: no trial has a result: {reasons[0]}", file=sys.stderr)
        return 1
    return 0 if finished else 130


def parser() -> argparse.ArgumentParser:
    """The arguments of `sweep`."""
    p = Parser(
        "sweep",
        description="Run a W&B sweep file with Optuna: no account, no network. The same command "
        "again goes on with the study; the same command elsewhere joins it (with one --storage).",
        epilog="What follows -- goes to every trial's fit, over the file's own: -- --trainer.max_epochs=2 --data.name=digits",
    )
    p.add_argument("file", help="a sweep file in the W&B format, such as sweeps/ste.yaml")
    p.add_argument(
        "--workers",
        type=int,
        default=1,
        help="worker processes here (default 1; 0: the trials run in this process)",
    )
    p.add_argument(
        "--n-trials",
        type=int,
        help="trials of the whole study, wherever they run (default: run_cap, or the grid)",
    )
    p.add_argument(
        "--timeout", type=float, help="seconds after which this command starts no further trial"
    )
    p.add_argument("--study-name", help="default: the file's name")
    p.add_argument(
        "--dir", help="the sweep's folder: trials, logs, tables, plots (default runs/sweeps/STUDY)"
    )
    p.add_argument(
        "--storage",
        help="an Optuna URL (postgresql+psycopg://user@host/db) or journal:PATH (default: SQLite in DIR)",
    )
    p.add_argument(
        "--objectives",
        help="several metrics, such as val/acc1_truncate_w2:max,storage/bytes:min; nothing is pruned",
    )
    p.add_argument(
        "--stale-after",
        type=float,
        default=STALE_SECONDS,
        help="seconds without a sign of life after which a trial is given to another worker (default %(default)g)",
    )
    for role in (
        "--worker",
        "--fit",
    ):  # what the engine tells its own workers; a stand-in for `fit` in tests
        p.add_argument(role, default=FIT if role == "--fit" else None, help=argparse.SUPPRESS)
    p.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    p.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return p


def read_objectives(text: str | None, sweep: Sweep) -> dict[str, str]:
    """Metric name -> minimize or maximize, from --objectives or else from the file's metric."""
    if text is None:
        if sweep.metric is None:
            raise UserError(
                f"{sweep.path}: no metric to judge by; give metric with name and goal, or pass --objectives NAME:max"
            )
        return {sweep.metric: sweep.goal}
    objectives = {}
    for part in text.split(","):
        name, _, goal = part.strip().rpartition(":")
        full = next((known for known in GOALS if goal in (known, known[:3])), None)
        if not name or full is None or name in objectives:
            raise UserError(
                f"--objectives: expected NAME:max or NAME:min, each name once, with commas between; got {part!r}"
            )
        objectives[name] = full
    return objectives


def _work(sweep: Sweep, options: object, given: argparse.Namespace) -> int:
    """The worker's role: take trials until the study is settled."""
    from tq_lightning.sweep import launcher as engine
    from tq_lightning.sweep.worker import REPLACE, work

    assert isinstance(options, engine.Options)
    module, _, name = given.fit.partition(":")
    fit = getattr(import_module(module), name)
    queue = engine.make_trial_queue(sweep, engine.open_study(sweep, options), options)
    deadline = given.deadline
    if deadline is None and given.timeout is not None:
        import time

        deadline = time.time() + given.timeout
    status = work(
        queue,
        sweep,
        list(options.objectives),
        options.folder,
        given.worker or "inline",
        fit,
        deadline=deadline,
        parent=given.parent,
    )
    sys.stdout.flush()
    if status == REPLACE and given.worker is not None:
        os._exit(
            status
        )  # the interpreter's own end would ask the broken context to free what it holds, and may abort
    return status
