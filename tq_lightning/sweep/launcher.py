"""Run a sweep with worker processes. Any number of machines can join a study by its name."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from tq_lightning.errors import TrainingError, first_line
from tq_lightning.sweep.config import Sweep
from tq_lightning.sweep.progress import Progress
from tq_lightning.sweep.storage import StorageOutage
from tq_lightning.sweep.study import Options, make_trial_queue, open_study
from tq_lightning.sweep.trial_queue import TrialQueue
from tq_lightning.sweep.worker import DONE, REPLACE, STOP_SIGNALS, without_launcher

CHECK_SECONDS = 1.0  # polling interval of the workers and the queue
STOP_SECONDS = 120.0  # time for the workers to end their trials after Ctrl-C
MAX_FAILED_STARTS = 3  # workers that exit without claiming a trial before the sweep fails


def run_sweep(sweep: Sweep, options: Options) -> int:
    """Run worker processes until every point has a result or the timeout is reached.

    Returns:
        0, or 128 plus the number of the signal that stopped the sweep.

    Raises:
        UserError: bad input, before any training starts.
        TrainingError: workers exit without claiming a trial, or the storage is unreachable.
    """
    study = open_study(sweep, options)
    queue = make_trial_queue(sweep, study, options)
    deadline = None if options.timeout is None else time.time() + options.timeout
    (options.folder / "logs").mkdir(parents=True, exist_ok=True)
    outage = StorageOutage()
    with outage:
        queue.refresh()
    pool = WorkerPool(options, deadline, sweep.environment)
    stopped_by: list[int] = []
    reason = "stopped by the user"

    def interrupt(number: int, _: Any) -> None:
        stopped_by.append(number)
        raise KeyboardInterrupt

    # This includes SIGINT, which a background command of a script inherits as ignored.
    before = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        with Progress(queue, deadline, options.workers) as progress:
            for slot in range(min(options.workers, queue.limit or options.workers)):
                pool.start(slot)
            while pool.running:
                with outage:
                    pool.replace_exited(queue)
                    queue.refresh()
                    progress.show()
                time.sleep(CHECK_SECONDS)
            with outage:
                progress.show()
        return 0
    except KeyboardInterrupt:
        pool.stop(signal.SIGINT if stopped_by[0] == signal.SIGINT else signal.SIGTERM)
        return 128 + stopped_by[0]
    except BaseException as error:
        reason = f"the sweep command failed: {first_line(error)}"
        raise
    finally:
        pool.kill(queue, reason)
        for number, handler in before.items():
            signal.signal(number, handler)


class WorkerPool:
    """The worker processes of one `sweep` command.

    Each worker has its own session (on Windows, a process group), so that Ctrl-C reaches only this
    process, which then signals every worker once.

    Args:
        options: options of the workers.
        deadline: `time.time()` after which no new trial is started.
        environment: variables that the file's `command` sets. The workers start with them, because
            torch reads some, such as OMP_NUM_THREADS, when it is imported.
    """

    def __init__(
        self, options: Options, deadline: float | None, environment: dict[str, str] | None = None
    ) -> None:
        self.options, self.deadline, self.environment = options, deadline, environment or {}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.slots: dict[str, int] = {}  # worker -> its share of the machine
        self.failed_starts = 0

    def start(self, slot: int) -> None:
        """Start a worker on one share of the machine. Its output goes to logs/NAME.log."""
        name = f"{socket.gethostname()}-{os.getpid()}-{slot}-{secrets.token_hex(3)}"
        given = {
            "name": name,
            "parent": os.getpid(),
            "deadline": self.deadline,
            "options": self.options.to_dict(),
        }
        with (self.options.folder / "logs" / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "tq_lightning.sweep.worker", json.dumps(given)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=without_launcher(os.environ)
                | _slot_environment(slot, self.options.workers)
                | self.environment,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                preexec_fn=None if os.name == "nt" else _default_sigint,
            )
        self.slots[name] = slot

    def replace_exited(self, queue: TrialQueue) -> None:
        """Mark the trials of exited workers as failed, and start new workers.

        If the storage is unreachable (StorageInternalError), the worker stays in `running` and
        is handled by the next call.
        """
        for name, process in list(self.running.items()):
            status = process.poll()
            if status is None:
                continue
            how = (
                f"was killed by {signal.Signals(-status).name}"
                if status < 0
                else f"exited with status {status}"
            )
            if status == DONE:
                del self.running[name]
                continue
            lost = queue.fail_worker(name, "lost", f"worker {how}")
            del self.running[name]
            # a worker exits with REPLACE or a signal only after it stored its trial's result
            if not lost and status not in (REPLACE, *(128 + number for number in STOP_SIGNALS)):
                self.failed_starts += 1
            if self.failed_starts >= MAX_FAILED_STARTS:
                log = self.options.folder / "logs" / f"{name}.log"
                last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["(no output)"]
                raise TrainingError(
                    f"{MAX_FAILED_STARTS} workers exited before their first trial; "
                    f"the last one {how}: {last[0]} (see {log})"
                )
            self.start(self.slots[name])

    def stop(self, number: int) -> None:
        """Send every worker a signal and wait until it has ended its trial.

        After SIGTERM, `fit` writes a checkpoint first. On Windows, a process group receives only
        Ctrl-Break. The wait ends on a second signal or after STOP_SECONDS.
        """
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", number))
        until = time.monotonic() + STOP_SECONDS
        with contextlib.suppress(KeyboardInterrupt):
            while (
                any(process.poll() is None for process in self.running.values())
                and time.monotonic() < until
            ):
                time.sleep(0.1)

    def kill(self, queue: TrialQueue, reason: str) -> None:
        """Kill the remaining workers with their children and fail their running trials."""
        from optuna.exceptions import StorageInternalError

        for name, process in self.running.items():
            with contextlib.suppress(ProcessLookupError):
                _kill(process)
            process.wait()
            with contextlib.suppress(StorageInternalError):  # else the heartbeat will time out
                queue.fail_worker(name, "interrupted", reason)


def _slot_environment(slot: int, workers: int) -> dict[str, str]:
    """Return environment variables for one worker's share of the machine: threads and GPUs."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    if workers == 1:
        return share
    import torch

    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        given = visible.split(",") if visible else [str(i) for i in range(count)]
        each = max(1, count // workers)
        first = slot * each % count
        share["CUDA_VISIBLE_DEVICES"] = ",".join(given[first : first + each])
    return share


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a worker with its further ranks and data loaders; on Windows, these end with it."""
    if os.name == "nt":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)


def _default_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends a worker that is still importing
