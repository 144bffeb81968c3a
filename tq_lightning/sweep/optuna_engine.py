"""The Optuna engine: one study, N worker processes, one process that tends them. Any number of machines may join by name."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tq_lightning.errors import TrainingError, UserError
from tq_lightning.sweep import space, twins
from tq_lightning.sweep.ledger import STALE_SECONDS, Ledger
from tq_lightning.sweep.progress import Progress
from tq_lightning.sweep.storage import Patience, hide_password, open_storage
from tq_lightning.sweep.worker import DONE, REPLACE

if TYPE_CHECKING:
    import optuna

TEND_SECONDS = 1.0
END_SECONDS = 120.0  # what the workers get to end a trial after Ctrl-C
STRIKES = 3  # workers that may die without having taken a trial


@dataclass(frozen=True)
class Options:
    """What the command line says besides the file. timeout in seconds; objectives: name -> goal."""

    folder: Path
    storage: str
    study_name: str
    objectives: dict[str, str]
    workers: int = 1
    n_trials: int | None = None
    timeout: float | None = None
    stale: float = STALE_SECONDS
    again: tuple[str, ...] = ()  # the arguments of this command, which make its workers
    extra: tuple[str, ...] = ()  # those after --


def open_study(sweep: space.Sweep, options: Options) -> "optuna.Study":
    """The study of this name: created, or joined where it is of the same sweep.

    Raises UserError where the sweep has no end, the storage can't be reached or a study of this name has other parameters.
    """
    import optuna

    point_count(sweep, options)
    storage = open_storage(options.storage)
    directions: Any = list(options.objectives.values())
    mine, where = sweep.source | {"objectives": options.objectives}, hide_password(options.storage)
    existing = {s.study_name: s for s in storage.get_all_studies()}.get(options.study_name)
    if existing is not None:
        theirs: Any = existing.user_attrs.get("sweep")
        if theirs is None and storage.get_n_trials(existing._study_id):
            raise UserError(
                f"the study {options.study_name} in {where} is not one of a sweep file's; pass another --study-name"
            )
        both = [] if theirs is None else [*mine, *(key for key in theirs if key not in mine)]
        different = [key for key in both if json.dumps(theirs.get(key)) != json.dumps(mine.get(key))]
        if different:
            names = " and ".join("arguments after --" if key == "extra" else key for key in different)
            raise UserError(
                f"the study {options.study_name} exists in {where} with other {names} than {sweep.path}: "
                f"{_difference(theirs.get(different[0]), mine.get(different[0]))}; "
                "pass another --study-name, or what it was begun with"
            )
    study = optuna.create_study(storage=storage, study_name=options.study_name, directions=directions, load_if_exists=True)
    if existing is None or "sweep" not in existing.user_attrs:
        with warnings.catch_warnings():  # "experimental" since 3.2
            warnings.simplefilter("ignore")
            study.set_metric_names(list(options.objectives))
        study.set_user_attr("file", sweep.path)
        study.set_user_attr("sweep", mine)
    return study


def point_count(sweep: space.Sweep, options: Options) -> int | None:
    """How many points the sweep has: a grid its own, random and bayes as many as --n-trials or run_cap say; None: no end.

    Raises UserError where neither a count nor a timeout ends the sweep.
    """
    cap = options.n_trials if options.n_trials is not None else sweep.run_cap
    if sweep.method == "grid":
        points = len(space.grid(sweep))
        return points if cap is None else min(cap, points)
    if cap is None and options.timeout is None:
        raise UserError(
            f"{sweep.path}: a {sweep.method} sweep has no end of its own; pass --n-trials or --timeout, or give run_cap"
        )
    return cap


def make_ledger(sweep: space.Sweep, study: "optuna.Study", options: Options) -> Ledger:
    """The ledger of a sweep: a grid's points are fixed, those of random and bayes are drawn when their turn comes."""
    points = space.grid(sweep) if sweep.method == "grid" else None

    def fixed(point: int) -> dict[str, Any]:
        return twins.fixed(sweep, point) if points is None else twins.encode(sweep, points[point])

    return Ledger(study, fixed, point_count(sweep, options), options.stale)


def run_sweep(sweep: space.Sweep, options: Options) -> bool:
    """Run the sweep with worker processes until it is settled or its time is over. Returns False when interrupted.

    Raises UserError before any training starts, TrainingError where workers die without having begun a trial.
    """
    study = open_study(sweep, options)
    ledger = make_ledger(sweep, study, options)
    deadline = None if options.timeout is None else time.time() + options.timeout
    (options.folder / "logs").mkdir(parents=True, exist_ok=True)
    ledger.tend()
    crew = Crew(options, deadline)
    # SIGINT too: a command started in the background of a script inherits it as ignored
    before = {number: signal.signal(number, _raise_interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Progress(ledger, deadline, options.workers) as progress:
            for place in range(options.workers):
                crew.start(place)
            away = Patience()
            while crew.running:
                with away:
                    crew.replace_dead(ledger)
                    ledger.tend()
                    progress.show()
                time.sleep(TEND_SECONDS)
            progress.show()
        return True
    except KeyboardInterrupt:
        crew.end()
        return False
    finally:
        crew.kill(ledger)
        for number, handler in before.items():
            signal.signal(number, handler)


class Crew:
    """The worker processes of one `sweep` command. Each is the same command again in the worker's role.

    They have their own sessions, so that Ctrl-C reaches this process alone and each worker is told once.
    """

    def __init__(self, options: Options, deadline: float | None) -> None:
        self.options, self.deadline = options, deadline
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.places: dict[str, int] = {}  # whose share of the machine a worker has
        self.strikes = 0

    def start(self, place: int) -> None:
        """Start the worker number `place`; what it prints goes to logs/NAME.log in the sweep's folder."""
        name = f"{socket.gethostname()}-{os.getpid()}-{place}-{secrets.token_hex(3)}"
        role = ["--worker", name, "--parent", str(os.getpid())]
        if self.deadline is not None:
            role += ["--deadline", str(self.deadline)]
        extra = ["--", *self.options.extra] if self.options.extra else []
        command = [sys.executable, "-m", "tq_lightning", "sweep", *self.options.again, *role, *extra]
        with (self.options.folder / "logs" / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | _share(place, self.options.workers),
                start_new_session=True,
                preexec_fn=_default_sigint,
            )
        self.places[name] = place

    def replace_dead(self, ledger: Ledger) -> None:
        """Give the trials of workers that died to others, at once, and start new workers in their place.

        Where the storage is away (StorageInternalError) a dead worker stays in `running`, and the next call tends to it.
        """
        for name, process in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
            # the trial of a worker to REPLACE has its reason; the next one needs a fresh process
            if status not in (DONE, REPLACE) and not ledger.fail_worker(name, "lost", f"its worker {how}"):
                self.strikes += 1
            del self.running[name]
            if self.strikes >= STRIKES:
                log = self.options.folder / "logs" / f"{name}.log"
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
                raise TrainingError(
                    f"{STRIKES} workers ended before their first trial; the last {how} and said {last[0]!r}; see {log}"
                )
            if status != DONE:
                self.start(self.places[name])

    def end(self) -> None:
        """Ctrl-C: let every worker end its trial cleanly; a second Ctrl-C, or two minutes, end the waiting."""
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        until = time.monotonic() + END_SECONDS
        with contextlib.suppress(KeyboardInterrupt):
            while any(process.poll() is None for process in self.running.values()) and time.monotonic() < until:
                time.sleep(0.1)

    def kill(self, ledger: Ledger) -> None:
        """Leave no worker behind, and no trial of theirs `running`."""
        from optuna.exceptions import StorageInternalError

        for name, process in self.running.items():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started: the other ranks, the data loaders
            process.wait()
            with contextlib.suppress(StorageInternalError):  # away: whoever goes on finds the trial silent
                ledger.fail_worker(name, "interrupted", "stopped by the user")


def _share(index: int, workers: int) -> dict[str, str]:
    """One worker's share of the machine: threads, and where several GPUs are at hand, its own."""
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))}
    if workers == 1:
        return share
    import torch

    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        given = visible.split(",") if visible else [str(i) for i in range(count)]
        each = max(1, count // workers)
        first = index * each % count
        share["CUDA_VISIBLE_DEVICES"] = ",".join(given[first : first + each])
    return share


def _default_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a worker that is still importing must end by it as well


def _raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _difference(theirs: Any, mine: Any) -> str:
    """The first difference between two values of a sweep file, in words."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *(key for key in mine if key not in theirs)]:
            if theirs.get(key) != mine.get(key):
                return f"{key}: {_difference(theirs.get(key), mine.get(key))}"
    return f"the study has {json.dumps(theirs)}, the file {json.dumps(mine)}"
