"""What of a study is to be run, by whom, and what became of it: one bookkeeping for every storage.

A sweep is a row of points 0..n-1: a grid's points, or slots that the sampler fills. Each is a trial that waits in the study,
with the user attributes `point` and `attempt`; a storage makes WAITING -> RUNNING atomic, so a point has one worker. A trial
whose worker died is FAILED with cause `lost`, one stopped by the user with cause `interrupted`, and what is missing is always
worked out from the trials themselves: whoever comes next enqueues the next attempt, even if its finder died while at it.
Should two commands enqueue the same attempt at the same moment, the lower trial number has it and the other is a `duplicate`.

Optuna's own heartbeat covers databases only and `Study.optimize` only, so a worker gives its sign of life itself: the user
attribute `heartbeat`, a count. Who looks on measures by its own clock how long the count
has stood still; no clocks are compared.
"""

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

STALE_SECONDS = 60.0  # without a sign of life for so long, a trial's worker counts as dead
MAX_LOST = 3  # a point that killed so many workers (memory, mostly) is left as failed
AHEAD = 100  # trials that wait in the storage at most; more are enqueued as these are taken
RETRIED = ("lost", "interrupted")


class TrialQueue:
    """The bookkeeping of one study, seen from one process.

    study: the Optuna study. fixed: point number -> parameters fixed for it (as stored). limit: the number of points; None
    goes on until somebody stops. stale: see STALE_SECONDS.
    """

    def __init__(
        self,
        study: "optuna.Study",
        fixed: Callable[[int], dict[str, Any]],
        limit: int | None,
        stale: float = STALE_SECONDS,
    ) -> None:
        self.study, self.fixed, self.limit, self.stale = study, fixed, limit, stale
        self.storage = study._storage
        self.taken = False  # whether the trial that runs in this process was given to another worker: see `alive`
        self._seen: dict[
            int, tuple[Any, float]
        ] = {}  # running trial's number -> (its heartbeat, when this was first seen)

    def trials(self) -> list["optuna.trial.FrozenTrial"]:
        """All trials of points by number, but for duplicates."""
        trials = self.study.get_trials(deepcopy=False)
        return [
            t
            for t in trials
            if "point" in t.user_attrs and t.user_attrs.get("cause") != "duplicate"
        ]

    def latest(self) -> dict[int, "optuna.trial.FrozenTrial"]:
        """Point -> its last attempt."""
        last: dict[int, optuna.trial.FrozenTrial] = {}
        for t in self.trials():
            point = t.user_attrs["point"]
            if point not in last or t.user_attrs["attempt"] > last[point].user_attrs["attempt"]:
                last[point] = t
        return last

    def tend(self) -> None:
        """Fail the trials whose workers are dead, and enqueue every point that waits for its first or its next attempt."""
        from optuna.exceptions import StorageInternalError
        from optuna.trial import TrialState

        try:
            trials = self.trials()
        except StorageInternalError:
            self._seen.clear()  # who couldn't look has seen nobody silent
            raise
        running = {t.number: t for t in trials if t.state == TrialState.RUNNING}
        now = time.monotonic()
        self._seen = {number: seen for number, seen in self._seen.items() if number in running}
        for number, trial in running.items():
            beat = trial.user_attrs.get("heartbeat")
            if number not in self._seen or self._seen[number][0] != beat:
                self._seen[number] = (beat, now)
            elif now - self._seen[number][1] > self.stale:
                self.fail(trial, "lost", f"its worker gave no sign of life for {self.stale:.0f} s")
        self._enqueue()

    def claim(self, worker: str) -> "optuna.trial.FrozenTrial | None":
        """Take the waiting trial of the lowest point; None where nothing waits. No other worker can get the same one."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        trials = self.trials()
        first: dict[tuple[int, int], int] = {}
        for t in trials:
            first.setdefault((t.user_attrs["point"], t.user_attrs["attempt"]), t.number)
        for t in sorted(
            trials, key=lambda t: t.user_attrs["point"]
        ):  # a retry before what has not begun
            if t.state != TrialState.WAITING or (
                self.limit is not None and t.user_attrs["point"] >= self.limit
            ):
                continue
            if first.get((t.user_attrs["point"], t.user_attrs["attempt"])) != t.number:
                self.fail(t, "duplicate", "another trial has the same point")
                continue
            with contextlib.suppress(UpdateFinishedTrialError):
                if self.storage.set_trial_state_values(t._trial_id, state=TrialState.RUNNING):
                    self.storage.set_trial_user_attr(t._trial_id, "worker", worker)
                    return self.storage.get_trial(t._trial_id)
        return None

    def fail(self, trial: "optuna.trial.FrozenTrial", cause: str, reason: str) -> None:
        """End an unfinished trial as failed. Does nothing where it ended otherwise in the meantime."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with contextlib.suppress(UpdateFinishedTrialError):
            # the attributes first: a finished trial takes none, and one that isn't FAILED in the end is not judged by them
            self.storage.set_trial_user_attr(trial._trial_id, "cause", cause)
            self.storage.set_trial_user_attr(trial._trial_id, "reason", reason)
            self.storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)

    def fail_worker(self, worker: str, cause: str, reason: str) -> int:
        """Fail what a worker was running when it ended. Returns the number of such trials."""
        from optuna.trial import TrialState

        left = [
            t
            for t in self.trials()
            if t.state == TrialState.RUNNING and t.user_attrs.get("worker") == worker
        ]
        for trial in left:
            self.fail(trial, cause, reason)
        return len(left)

    def to_retry(self, trial: "optuna.trial.FrozenTrial") -> bool:
        """Whether a trial ended without a result, through no fault of its parameters as far as one can tell."""
        from optuna.trial import TrialState

        if trial.state != TrialState.FAIL or trial.user_attrs.get("cause") not in RETRIED:
            return False
        return trial.user_attrs.get("lost", 0) + (trial.user_attrs["cause"] == "lost") < MAX_LOST

    def settled(self) -> bool:
        """Whether every point has its result (a value, pruned, or failed for good)."""
        if self.limit is None:
            return False
        last = self.latest()
        return all(
            point in last and last[point].state.is_finished() and not self.to_retry(last[point])
            for point in range(self.limit)
        )

    def _enqueue(self) -> None:
        """Add waiting trials for what is missing."""
        from optuna.trial import TrialState

        last = self.latest()
        waiting = sum(t.state == TrialState.WAITING for t in last.values())
        following = max(last, default=-1) + 1
        retries = [point for point, trial in last.items() if self.to_retry(trial)]
        missing = [point for point in range(following) if point not in last]
        new = range(following, self.limit if self.limit is not None else following + 1)
        for point in [*retries, *missing, *new][
            : max(0, (AHEAD if self.limit is not None else 1) - waiting)
        ]:
            before = last.get(point)
            attrs: dict[str, Any] = {"point": point, "attempt": 0}
            params = self.fixed(point)
            if before is not None:
                params = (
                    before.params or params
                )  # what the sampler drew for the first attempt holds for the next
                lost = before.user_attrs.get("lost", 0) + (before.user_attrs["cause"] == "lost")
                attrs |= {
                    "attempt": before.user_attrs["attempt"] + 1,
                    "lost": lost,
                    "retry_of": before.number,
                }
            self.study.enqueue_trial(params, user_attrs=attrs)
