"""The trials of a study as a queue that many workers share, on every Optuna storage.

A sweep is a sequence of points 0..n-1: the points of a grid, or slots that the sampler fills. Each
point is a waiting trial with the user attributes `point` and `attempt`. Every storage changes a
trial from WAITING to RUNNING atomically, so a point has one worker.

A trial is marked as failed with the cause `lost` if its worker died, or `interrupted` if the user
stopped it. Missing points are always derived from the trials, so any process can enqueue the next
attempt, even if the process that marked the trial died right after. If two commands enqueue the
same attempt at the same time, the trial with the lower number is kept and the other fails as
`duplicate`.

Optuna's heartbeat supports only databases and `Study.optimize`. Workers therefore write their own,
a counter in the user attribute `heartbeat`. An observer measures with its own clock how long the
counter has not changed. Clocks of different machines are never compared.
"""

import contextlib
import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

STALE_SECONDS = 60.0  # default heartbeat timeout
MAX_LOST = 3  # a point that killed this many workers, e.g. out of memory, is not retried
MAX_WAITING = 100  # largest number of waiting trials in the storage
RETRIED_CAUSES = ("lost", "interrupted")


class TrialQueue:
    """The queue of one study in one process.

    Args:
        study: the Optuna study.
        fixed_params: point -> values of its parameters that are fixed in advance.
        limit: number of points; None for an endless sweep.
        stale_after: heartbeat timeout in seconds.

    Attributes:
        trial_taken: True if the trial that runs in this process was given to another worker; see
            `heartbeat`.
    """

    def __init__(
        self,
        study: "optuna.Study",
        fixed_params: Callable[[int], dict[str, Any]],
        limit: int | None,
        stale_after: float = STALE_SECONDS,
    ) -> None:
        self.study, self.fixed_params = study, fixed_params
        self.limit, self.stale_after = limit, stale_after
        self.storage = study._storage
        self.trial_taken = False
        self._beats: dict[int, tuple[Any, float]] = {}  # trial -> (heartbeat, time of last change)

    def trials(self) -> list["optuna.trial.FrozenTrial"]:
        """Return the trials of all points by number, without duplicates."""
        return [
            t
            for t in self.study.get_trials(deepcopy=False)
            if "point" in t.user_attrs and t.user_attrs.get("cause") != "duplicate"
        ]

    def attempts(self) -> dict[int, list["optuna.trial.FrozenTrial"]]:
        """Return the attempts at each point, first to last."""
        found: dict[int, list[optuna.trial.FrozenTrial]] = {}
        for trial in self.trials():
            found.setdefault(trial.user_attrs["point"], []).append(trial)
        for attempts in found.values():
            attempts.sort(key=lambda t: (t.user_attrs["attempt"], -t.number))
        return found

    def last_attempts(self) -> dict[int, "optuna.trial.FrozenTrial"]:
        """Return the last attempt at each point."""
        return {point: attempts[-1] for point, attempts in self.attempts().items()}

    def refresh(self) -> None:
        """Mark the trials of dead workers as failed and enqueue points that need an attempt."""
        from optuna.exceptions import StorageInternalError
        from optuna.trial import TrialState

        try:
            trials = self.trials()
        except StorageInternalError:
            self._beats.clear()  # workers can't write heartbeats during the outage either
            raise
        running = {t.number: t for t in trials if t.state == TrialState.RUNNING}
        now = time.monotonic()
        self._beats = {number: beat for number, beat in self._beats.items() if number in running}
        for number, trial in running.items():
            count = trial.user_attrs.get("heartbeat")
            if number not in self._beats or self._beats[number][0] != count:
                self._beats[number] = (count, now)
            elif now - self._beats[number][1] > self.stale_after:
                reason = f"worker heartbeat timed out after {self.stale_after:.0f} s"
                self.fail(trial, "lost", reason)
        self._enqueue()

    def claim(self, worker: str) -> "optuna.trial.FrozenTrial | None":
        """Claim the waiting trial of the lowest point for a worker; None if no trial is waiting."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        trials = self.trials()
        first: dict[tuple[int, int], int] = {}
        for t in trials:
            first.setdefault((t.user_attrs["point"], t.user_attrs["attempt"]), t.number)
        for t in sorted(trials, key=lambda t: t.user_attrs["point"]):  # retries before new points
            point, attempt = t.user_attrs["point"], t.user_attrs["attempt"]
            if t.state != TrialState.WAITING or (self.limit is not None and point >= self.limit):
                continue
            if first[point, attempt] != t.number:
                self.fail(t, "duplicate", "another trial has the same point")
                continue
            with contextlib.suppress(UpdateFinishedTrialError):
                if self.storage.set_trial_state_values(t._trial_id, state=TrialState.RUNNING):
                    self.storage.set_trial_user_attr(t._trial_id, "worker", worker)
                    return self.storage.get_trial(t._trial_id)
        return None

    def fail(self, trial: "optuna.trial.FrozenTrial", cause: str, reason: str) -> None:
        """Mark an unfinished trial as failed. Does nothing if it has finished in the meantime."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with contextlib.suppress(UpdateFinishedTrialError):
            # Set the attributes first, because a finished trial is read-only.
            self.storage.set_trial_user_attr(trial._trial_id, "cause", cause)
            self.storage.set_trial_user_attr(trial._trial_id, "reason", reason)
            self.storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)

    def fail_worker(self, worker: str, cause: str, reason: str) -> int:
        """Mark the running trials of an exited worker as failed. Return their number."""
        from optuna.trial import TrialState

        running = [
            t
            for t in self.trials()
            if t.state == TrialState.RUNNING and t.user_attrs.get("worker") == worker
        ]
        for trial in running:
            self.fail(trial, cause, reason)
        return len(running)

    def will_retry(self, trial: "optuna.trial.FrozenTrial") -> bool:
        """Return True if a failed trial is retried: its parameters are probably not the cause."""
        from optuna.trial import TrialState

        if trial.state != TrialState.FAIL or trial.user_attrs.get("cause") not in RETRIED_CAUSES:
            return False
        return _lost_attempts(trial) < MAX_LOST

    def finished(self) -> bool:
        """Return True if every point is complete, pruned, or failed without a retry."""
        if self.limit is None:
            return False
        last = self.last_attempts()
        return len(last) >= self.limit and all(
            point in last and last[point].state.is_finished() and not self.will_retry(last[point])
            for point in range(self.limit)
        )

    def _enqueue(self) -> None:
        """Add waiting trials for retries and for points without a trial."""
        from optuna.trial import TrialState

        last = self.last_attempts()
        waiting = sum(t.state == TrialState.WAITING for t in last.values())
        following = max(last, default=-1) + 1
        retries = [point for point, trial in last.items() if self.will_retry(trial)]
        missing = [point for point in range(following) if point not in last]
        new = range(following, self.limit if self.limit is not None else following + 1)
        room = max(0, (MAX_WAITING if self.limit is not None else 1) - waiting)
        for point in itertools.islice(itertools.chain(retries, missing, new), room):
            earlier = last.get(point)
            attrs: dict[str, Any] = {"point": point, "attempt": 0}
            params = self.fixed_params(point)
            if earlier is not None:
                params = earlier.params or params  # a retry repeats the parameters
                attrs |= {
                    "attempt": earlier.user_attrs["attempt"] + 1,
                    "lost": _lost_attempts(earlier),
                    "retry_of": earlier.number,
                }
            self.study.enqueue_trial(params, user_attrs=attrs)


def _lost_attempts(trial: "optuna.trial.FrozenTrial") -> int:
    """Return the number of consecutive workers that a point has lost, including `trial`."""
    return int(trial.user_attrs.get("lost", 0)) + (trial.user_attrs["cause"] == "lost")
