"""A worker: takes one trial after another from the study and runs them in this process, which has paid for its imports."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tq_lightning.records import mark_superseded
from tq_lightning.sweep import search_space as twins
from tq_lightning.sweep.config import Sweep
from tq_lightning.sweep.heartbeat import alive
from tq_lightning.sweep.progress import describe
from tq_lightning.sweep.storage import StorageOutage
from tq_lightning.sweep.trial import Fit, TrialResult, go_on, new_home, run_trial
from tq_lightning.sweep.trial_queue import RETRIED, TrialQueue

if TYPE_CHECKING:
    import optuna

POLL_SECONDS = 1.0  # between two looks at a study in which nothing waits
DONE, INTERRUPTED, REPLACE = (
    0,
    130,
    75,
)  # exit statuses of a worker; the last one: CUDA is broken in it, start another


def work(
    queue: TrialQueue,
    sweep: Sweep,
    metrics: list[str],
    folder: Path,
    name: str,
    fit: Fit,
    *,
    deadline: float | None = None,
    parent: int | None = None,
) -> int:
    """Run trials until the sweep is settled, or until `deadline` (time.time()) has passed, after which none is started.

    parent: the process that tends the ledger; None where nobody else does, as with --workers 0. Returns DONE, INTERRUPTED or
    REPLACE.
    """
    os.environ.update(sweep.environment)
    stopped = False

    def interrupt(*_: Any) -> None:
        nonlocal stopped
        stopped = stopped or not queue.taken
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    away = StorageOutage()
    try:
        while deadline is None or time.time() < deadline:
            if parent is not None and os.getppid() != parent:
                return INTERRUPTED
            claimed, settled = None, False
            with away:
                if parent is None:
                    queue.tend()
                claimed = queue.claim(name)
                settled = claimed is None and queue.settled()
            if claimed is None:
                if settled:
                    return DONE
                time.sleep(POLL_SECONDS)
                continue
            ending = run_claimed(
                queue, claimed, sweep, metrics, folder, fit, parent, lambda: stopped
            )
            if stopped:
                return INTERRUPTED
            if ending is not None and ending.broken:
                print(
                    f"CUDA fails in this process from now on, so it ends: {ending.reason}",
                    flush=True,
                )
                return REPLACE
            if parent is None:  # else the parent shows it
                with away:
                    print(describe(queue, deadline), flush=True)
            for number in (
                before
            ):  # Lightning puts its own in their place; the next trial must be stoppable too
                signal.signal(number, interrupt)
        return DONE
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_claimed(
    queue: TrialQueue,
    claimed: "optuna.trial.FrozenTrial",
    sweep: Sweep,
    metrics: list[str],
    folder: Path,
    fit: Fit,
    parent: int | None,
    stopped: Any,
) -> TrialResult | None:
    """Run one trial that is ours, write down how it ended and return that; None where it was another's before it began."""
    import optuna
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError

    study, point = queue.study, claimed.user_attrs["point"]
    study.sampler, study.pruner = twins.sampler(sweep, point), twins.pruner(sweep, len(metrics))
    home = new_home(folder / "trials", claimed)

    def report(step: int, value: float) -> bool:
        with contextlib.suppress(
            StorageInternalError
        ):  # away for a moment: hours of training are worth more than one report
            try:
                trial.report(value, step)
                return trial.should_prune()
            except UpdateFinishedTrialError:
                return True  # it is another worker's now
        return False

    try:
        with alive(queue, claimed, parent):
            trial = optuna.trial.Trial(study, claimed._trial_id)
            values = twins.suggest(sweep, trial)
            argv = twins.arguments(sweep, values)
            trial.set_user_attr("run_dir", str(home))
            trial.set_user_attr("arguments", argv)
            before = go_on(study, claimed, home)
            if before is not None:
                trial.set_user_attr("resumed_step", before[1])
                if before[1] > study.trials[claimed.user_attrs["retry_of"]].user_attrs.get(
                    "resumed_step", 0
                ):
                    trial.set_user_attr(
                        "lost", 0
                    )  # the last attempt got further: this is no trial that kills each worker
            prunes = sweep.early_terminate is not None and len(metrics) == 1
            ending = run_trial(
                fit, argv, home, metrics, report if prunes else None, before and before[0]
            )
    except KeyboardInterrupt:  # between the lines above
        ending = TrialResult("interrupted", reason="stopped by the user")
    except UpdateFinishedTrialError:
        return None  # taken for dead before it began: it is another worker's now
    if (
        stopped() and ending.state == "failed"
    ):  # whatever Ctrl-C made of the fit, the parameters are not to blame
        ending = TrialResult("interrupted", reason="stopped by the user", record=ending.record)
    elif not stopped() and ending.state == "interrupted":
        # a signal from outside, or another rank that died: try it again, a few times
        ending = TrialResult(
            "lost", reason="its fit was stopped from outside", record=ending.record
        )
    _write(queue, claimed, ending)
    return ending


def _write(queue: TrialQueue, claimed: "optuna.trial.FrozenTrial", ending: TrialResult) -> None:
    """Put a trial's end into the study; a database that is away is tried again for a minute, since hours may hang on it."""
    from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
    from optuna.trial import TrialState

    for attempt in range(7):
        try:
            if ending.record is not None:
                queue.storage.set_trial_user_attr(claimed._trial_id, "record", ending.record)
            if ending.state == "complete":
                queue.study.tell(claimed.number, list(ending.values), skip_if_finished=True)
            elif ending.state == "pruned":
                queue.study.tell(claimed.number, state=TrialState.PRUNED, skip_if_finished=True)
            else:
                queue.fail(
                    claimed, "error" if ending.state == "failed" else ending.state, ending.reason
                )
            return
        except UpdateFinishedTrialError:
            trial = queue.storage.get_trial(claimed._trial_id)
            if (
                ending.record is not None
                and trial.state == TrialState.FAIL
                and trial.user_attrs.get("cause") in RETRIED
            ):
                mark_superseded(
                    ending.record
                )  # it was taken for dead and given to another worker, whose result counts
            return
        except StorageInternalError:
            if attempt == 6:
                raise
            time.sleep(2**attempt)
