"""The Optuna engine: one study, N worker processes, one process that tends them. Any number of machines may join by name."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from tq_lightning.errors import TrainingError
from tq_lightning.sweep import config as space
from tq_lightning.sweep.progress import Progress
from tq_lightning.sweep.storage import StorageOutage
from tq_lightning.sweep.study import Options, make_trial_queue, open_study
from tq_lightning.sweep.trial_queue import TrialQueue
from tq_lightning.sweep.worker import DONE, REPLACE

if TYPE_CHECKING:
    pass

TEND_SECONDS = 1.0
END_SECONDS = 120.0  # what the workers get to end a trial after Ctrl-C
STRIKES = 3  # workers that may die without having taken a trial


def run_sweep(sweep: space.Sweep, options: Options) -> bool:
    """Run the sweep with worker processes until it is settled or its time is over. Returns False when interrupted.

    Raises UserError before any training starts, TrainingError where workers die without having begun a trial.
    """
    study = open_study(sweep, options)
    queue = make_trial_queue(sweep, study, options)
    deadline = None if options.timeout is None else time.time() + options.timeout
    (options.folder / "logs").mkdir(parents=True, exist_ok=True)
    queue.tend()
    crew = WorkerPool(options, deadline)
    # SIGINT too: a command started in the background of a script inherits it as ignored
    before = {
        number: signal.signal(number, _raise_interrupt)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with Progress(queue, deadline, options.workers) as progress:
            for place in range(options.workers):
                crew.start(place)
            away = StorageOutage()
            while crew.running:
                with away:
                    crew.replace_dead(queue)
                    queue.tend()
                    progress.show()
                time.sleep(TEND_SECONDS)
            progress.show()
        return True
    except KeyboardInterrupt:
        crew.end()
        return False
    finally:
        crew.kill(queue)
        for number, handler in before.items():
            signal.signal(number, handler)


class WorkerPool:
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
        command = [
            sys.executable,
            "-m",
            "tq_lightning",
            "sweep",
            *self.options.again,
            *role,
            *extra,
        ]
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

    def replace_dead(self, queue: TrialQueue) -> None:
        """Give the trials of workers that died to others, at once, and start new workers in their place.

        Where the storage is away (StorageInternalError) a dead worker stays in `running`, and the next call tends to it.
        """
        for name, process in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            how = (
                f"was killed by {signal.Signals(-status).name}"
                if status < 0
                else f"ended with exit status {status}"
            )
            # the trial of a worker to REPLACE has its reason; the next one needs a fresh process
            if status not in (DONE, REPLACE) and not queue.fail_worker(
                name, "lost", f"its worker {how}"
            ):
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
            while (
                any(process.poll() is None for process in self.running.values())
                and time.monotonic() < until
            ):
                time.sleep(0.1)

    def kill(self, queue: TrialQueue) -> None:
        """Leave no worker behind, and no trial of theirs `running`."""
        from optuna.exceptions import StorageInternalError

        for name, process in self.running.items():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(
                    process.pid, signal.SIGKILL
                )  # and what it started: the other ranks, the data loaders
            process.wait()
            with contextlib.suppress(
                StorageInternalError
            ):  # away: whoever goes on finds the trial silent
                queue.fail_worker(name, "interrupted", "stopped by the user")


def _share(index: int, workers: int) -> dict[str, str]:
    """One worker's share of the machine: threads, and where several GPUs are at hand, its own."""
    share = {
        "OMP_NUM_THREADS": os.environ.get(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers))
        )
    }
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
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a worker that is still importing must end by it as well


def _raise_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
