"""Worker: run trials of the queue one after another in one process, which imports torch once.

The launcher starts it as `python -m tq_lightning.sweep.worker JSON`. `sweep --workers 0` runs it
in the process of the command.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tq_lightning.errors import TrainingError, UserError
from tq_lightning.sweep.config import Sweep, read_sweep, with_extra
from tq_lightning.sweep.heartbeat import has_ended, heartbeat
from tq_lightning.sweep.objective import Objective
from tq_lightning.sweep.progress import describe
from tq_lightning.sweep.storage import StorageOutage, retry_during_outage
from tq_lightning.sweep.study import Options, make_trial_queue, open_study
from tq_lightning.sweep.trial import Fit, TrialResult
from tq_lightning.sweep.trial_queue import TrialQueue

if TYPE_CHECKING:
    import optuna

POLL_SECONDS = 1.0  # polling interval of a queue without waiting trials
# Signals that stop a sweep. Schedulers send SIGUSR1 as a warning. Windows has SIGBREAK instead.
STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")
    if hasattr(signal, name)
)
DONE = 0  # exit status: all points have a result, or the timeout was reached
REPLACE = 75  # exit status: CUDA is broken in this process; start a new one


class Worker:
    """Run the trials of a queue in this process.

    Args:
        queue: the trial queue of the study.
        sweep: the sweep file.
        metrics: names of the objectives.
        folder: the sweep's folder; trial folders are created in its subfolder `trials`.
        fit: runs one trial.
        name: identifies the worker in the study.
        deadline: `time.time()` after which no new trial is started.
        parent: process id of the launcher, which refreshes the queue; None if this process does.
    """

    def __init__(
        self,
        queue: TrialQueue,
        sweep: Sweep,
        metrics: list[str],
        folder: Path,
        fit: Fit,
        *,
        name: str = "inline",
        deadline: float | None = None,
        parent: int | None = None,
    ) -> None:
        self.queue, self.environment = queue, sweep.environment
        self.objective = Objective(queue, sweep, metrics, folder / "trials", fit)
        self.name, self.deadline, self.parent = name, deadline, parent
        self.stopped_by: int | None = None  # number of the signal that stops this worker

    def run(self) -> int:
        """Run trials until the queue is finished. Return DONE, REPLACE or 128 plus a signal."""
        os.environ.update(self.environment)
        before = {number: signal.signal(number, self._interrupt) for number in STOP_SIGNALS}
        outage = StorageOutage()
        try:
            while self.deadline is None or time.time() < self.deadline:
                if has_ended(self.parent):
                    return 128 + signal.SIGTERM
                claimed, finished = None, False
                with outage:
                    if self.parent is None:
                        self.queue.refresh()
                    claimed = self.queue.claim(self.name)
                    finished = claimed is None and self.queue.finished()
                if finished:
                    return DONE
                if claimed is None:
                    time.sleep(POLL_SECONDS)
                    continue
                result = self.run_claimed(claimed)
                if self.stopped_by is not None:
                    return 128 + self.stopped_by
                if result is not None and result.cuda_is_broken:
                    reason = f"CUDA no longer works in this process: {result.reason}"
                    print(reason, flush=True)
                    return REPLACE
                if self.parent is None:  # else the launcher shows the progress
                    with outage:
                        print(describe(self.queue, self.deadline), flush=True)
                for number in STOP_SIGNALS:  # fit has installed Lightning's handlers
                    signal.signal(number, self._interrupt)
            return DONE
        except KeyboardInterrupt:
            return 128 + (self.stopped_by or signal.SIGINT)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run_claimed(self, claimed: "optuna.trial.FrozenTrial") -> TrialResult | None:
        """Run one trial that this worker claimed and store its result.

        Returns:
            The result; None if the trial was given to another worker before it started.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            with heartbeat(self.queue, claimed, self.parent):
                result = self.objective.run(claimed)
        except KeyboardInterrupt:  # outside of fit
            result = TrialResult("interrupted", reason="stopped by the user")
        except UpdateFinishedTrialError:
            return None
        if result.signum is not None:  # fit handled the signal that was sent to this process
            self.stopped_by = self.stopped_by or result.signum
        if self.stopped_by is not None and result.state == "failed":
            # a stopped fit may fail in any way; its parameters are not the cause
            result = TrialResult("interrupted", reason="stopped by the user", record=result.record)
        elif self.stopped_by is None and result.state == "interrupted":
            # only fit received a signal, or another rank died
            reason = "fit was stopped by another process"
            result = TrialResult("lost", reason=reason, record=result.record)
        if result.state == "interrupted" and has_ended(self.parent):
            # the heartbeat stopped the trial
            result = replace(result, reason="the sweep command ended")
        retry_during_outage(lambda: self.objective.store(claimed, result))
        return result

    def _interrupt(self, number: int, _: Any) -> None:
        if not self.queue.trial_taken:  # if it was taken, the heartbeat interrupts only the trial
            self.stopped_by = self.stopped_by or number
        raise KeyboardInterrupt


def load_fit(name: str) -> Fit:
    """Import the function that runs a trial, given as MODULE:NAME."""
    module, _, function = name.partition(":")
    fit: Fit = getattr(import_module(module), function)
    return fit


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Remove the variables of `srun`, because a worker is not one of its ranks."""
    return {key: value for key, value in environment.items() if not key.startswith("SLURM_")}


def run_inline(sweep: Sweep, options: Options) -> int:
    """Run a sweep in this process. Return 0, or 128 plus a signal; broken CUDA counts as SIGINT."""
    job = dict(os.environ)
    try:
        for key in job.keys() - without_launcher(job).keys():
            del os.environ[key]
        return _run_inline(sweep, options)
    finally:
        os.environ.update(job)


def _run_inline(sweep: Sweep, options: Options) -> int:
    worker = _make_worker(sweep, options)
    if options.timeout is not None:
        worker.deadline = time.time() + options.timeout
    status = worker.run()
    return 128 + signal.SIGINT if status == REPLACE else status


def main(argv: list[str]) -> int:
    """Run a worker process. `argv` holds one JSON string, written by the launcher."""
    given = json.loads(argv[0])
    options = Options.from_dict(given.pop("options"))
    try:
        sweep = with_extra(read_sweep(options.file), list(options.extra))
        status = _make_worker(sweep, options, **given).run()
    except (UserError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    sys.stdout.flush()
    if status == REPLACE:
        os._exit(status)  # destroying a broken CUDA context may abort the process
    return status


def _make_worker(sweep: Sweep, options: Options, **given: Any) -> Worker:
    queue = make_trial_queue(sweep, open_study(sweep, options), options)
    metrics, fit = list(options.objectives), load_fit(options.fit)
    return Worker(queue, sweep, metrics, options.folder, fit, **given)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
