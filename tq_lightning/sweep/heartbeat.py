"""Heartbeat of a running trial."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tq_lightning.sweep.trial_queue import STALE_SECONDS, TrialQueue

if TYPE_CHECKING:
    import optuna


@contextlib.contextmanager
def heartbeat(
    queue: TrialQueue, trial: "optuna.trial.FrozenTrial", parent: int | None
) -> Iterator[None]:
    """Write a trial's heartbeat from a thread while the block runs.

    The block is interrupted with SIGINT if process `parent` has exited, or if the trial was given
    to another worker because this one was suspended or cut off from the storage for too long. In
    the second case `queue.trial_taken` is True.
    """
    from optuna.exceptions import UpdateFinishedTrialError

    stop = threading.Event()
    # also often enough for a command that observes the trial with the default --stale-after
    pause = min(queue.stale_after, STALE_SECONDS) / 6
    queue.trial_taken = False

    def beat() -> None:
        count = 0
        while not stop.wait(pause if count else 0):
            count += 1
            try:
                queue.storage.set_trial_user_attr(trial._trial_id, "heartbeat", count)
            except UpdateFinishedTrialError:
                if not stop.is_set():
                    queue.trial_taken = True
                    _interrupt()
                return
            except Exception:  # a storage outage must not end the training
                pass
            if has_ended(parent):
                _interrupt()
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def has_ended(parent: int | None) -> bool:
    """Return True if the parent process has ended; always False on Windows, which can't tell."""
    return parent is not None and os.name != "nt" and os.getppid() != parent


def _interrupt() -> None:
    """Interrupt the main thread as Ctrl-C does."""
    if os.name == "nt":  # os.kill would end the process
        signal.raise_signal(signal.SIGINT)
    else:
        os.kill(os.getpid(), signal.SIGINT)
