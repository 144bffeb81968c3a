"""TODO sweep/heartbeat.py."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import optuna

from tq_lightning.sweep.trial_queue import TrialQueue


@contextlib.contextmanager
def alive(
    queue: TrialQueue, trial: "optuna.trial.FrozenTrial", parent: int | None
) -> Iterator[None]:
    """Give a trial's sign of life from a thread while the block runs; interrupt the block if process `parent` is gone.

    Likewise where the trial is another worker's by now, since this one was suspended or cut off from the storage for too long;
    `ledger.taken` says so then.
    """
    from optuna.exceptions import UpdateFinishedTrialError

    stop = threading.Event()
    queue.taken = False

    def beat() -> None:
        count = 0
        while not stop.wait(queue.stale / 6 if count else 0):
            count += 1
            try:
                queue.storage.set_trial_user_attr(trial._trial_id, "heartbeat", count)
            except UpdateFinishedTrialError:
                if not stop.is_set():
                    queue.taken = True
                    os.kill(os.getpid(), signal.SIGINT)
                return
            except Exception:  # a storage that is away for a moment must not end the training
                pass
            if parent is not None and os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)
