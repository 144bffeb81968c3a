"""How a sweep stands, in the terminal: one live line, or a printed one at every change where there is no terminal."""

import time
from datetime import datetime
from types import TracebackType

from rich.console import Console
from rich.live import Live

from tq_lightning.sweep.trial_queue import TrialQueue


class Progress:
    """Trials done, running, failed and pruned, the best so far and the time left. A context manager."""

    def __init__(
        self,
        queue: TrialQueue,
        deadline: float | None,
        workers: int = 1,
        console: Console | None = None,
    ) -> None:
        self.queue, self.deadline, self.workers = queue, deadline, workers
        self.console = console or Console(highlight=False)
        self.live = (
            Live(console=self.console, auto_refresh=False, transient=True)
            if self.console.is_terminal
            else None
        )
        self.last = ""

    def __enter__(self) -> "Progress":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.stop()
            self.console.print(describe(self.queue, self.deadline, self.workers), soft_wrap=True)

    def show(self) -> None:
        """Draw the current line; without a terminal, print it when a count has changed."""
        line = describe(self.queue, self.deadline, self.workers)
        counts = line.split("; time left")[0]
        if self.live is not None:
            self.live.update(line, refresh=True)
        elif counts != self.last:
            self.console.print(line, soft_wrap=True)
        self.last = counts


def describe(queue: TrialQueue, deadline: float | None, workers: int = 1) -> str:
    """`7 of 12 done, 2 running, 1 failed, 0 pruned; best val/acc1_float 91.3 (trial 4); time left 3 min`.

    The time left: what is to be done at the mean seconds of a trial, less what the running ones have had, shared by `workers`
    of this command, or by as many as run where others have joined. deadline: time.time() after which no trial is started.
    """
    from optuna.trial import TrialState

    trials = list(queue.latest().values())
    by_state = {state: [t for t in trials if t.state == state] for state in TrialState}
    failed = [t for t in by_state[TrialState.FAIL] if not queue.to_retry(t)]
    complete, running, pruned = (
        by_state[TrialState.COMPLETE],
        by_state[TrialState.RUNNING],
        by_state[TrialState.PRUNED],
    )
    done = len(complete) + len(pruned) + len(failed)
    of = "" if queue.limit is None else f" of {queue.limit}"
    line = f"{done}{of} done, {len(running)} running, {len(failed)} failed, {len(pruned)} pruned"
    names = queue.study.metric_names or ["value"]
    if complete and len(names) == 1:
        sign = 1 if queue.study.direction.name == "MINIMIZE" else -1
        best = min(complete, key=lambda t: sign * (t.value or 0.0))
        line += f"; best {names[0]} {best.value:.6g} (trial {best.number})"
    elif complete:
        line += f"; {len(queue.study.best_trials)} on the Pareto front"
    seconds = [t.duration.total_seconds() for t in complete + pruned if t.duration is not None]
    left = []
    if seconds and queue.limit is not None and done < queue.limit:
        mean, now = sum(seconds) / len(seconds), datetime.now()
        had = sum(
            min(mean, max(0.0, (now - t.datetime_start).total_seconds()))
            for t in running
            if t.datetime_start
        )
        left.append(((queue.limit - done) * mean - had) / max(1, workers, len(running)))
    if deadline is not None:
        left.append(max(0.0, deadline - time.time()))
    return line + (f"; time left {_span(min(left))}" if left else "")


def _span(seconds: float) -> str:
    """Seconds in the unit one would say them in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
