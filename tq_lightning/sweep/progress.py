"""Sweep progress in the terminal: a live line, or one line per change when there is no TTY."""

import time
from datetime import datetime
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tq_lightning.sweep.trial_queue import TrialQueue


class Progress:
    """Show the state of a sweep while the context is open.

    Args:
        queue: the trial queue.
        deadline: `time.time()` after which no new trial is started.
        workers: worker processes of this command.
        console: console to print to; None is the terminal.
    """

    def __init__(
        self,
        queue: TrialQueue,
        deadline: float | None,
        workers: int = 1,
        console: Console | None = None,
    ) -> None:
        self.queue, self.deadline, self.workers = queue, deadline, workers
        self.console = console or Console(highlight=False)
        self.live: Live | None = None
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
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
            self.console.print(self.last, soft_wrap=True, markup=False)

    def show(self) -> None:
        """Update the live line; without a terminal, print a line if a count has changed."""
        line = describe(self.queue, self.deadline, self.workers)
        if self.live is not None:
            self.live.update(Text(line), refresh=True)
        elif line.split("; time left")[0] != self.last.split("; time left")[0]:
            self.console.print(line, soft_wrap=True, markup=False)
        self.last = line


def describe(queue: TrialQueue, deadline: float | None, workers: int = 1) -> str:
    """Return a line with the counts, the best trial and the estimated time left.

    The time left is the mean duration of a trial times the number of remaining trials, minus the
    elapsed time of the running ones, divided by `workers`. If other commands run some of the
    trials, the divisor is the number of running trials. The time left ends at `deadline`.

    Example:
        `7 of 12 done, 2 running, 1 failed, 0 pruned; best val/acc1_float 91.3 (trial 4);
        time left 3 min`
    """
    from optuna.trial import TrialState

    trials = list(queue.last_attempts().values())
    by_state = {state: [t for t in trials if t.state == state] for state in TrialState}
    failed = [t for t in by_state[TrialState.FAIL] if not queue.will_retry(t)]
    complete, running, pruned = (
        by_state[state] for state in (TrialState.COMPLETE, TrialState.RUNNING, TrialState.PRUNED)
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
        elapsed = sum(
            min(mean, max(0.0, (now - t.datetime_start).total_seconds()))
            for t in running
            if t.datetime_start
        )
        left.append(((queue.limit - done) * mean - elapsed) / max(1, workers, len(running)))
    if deadline is not None:
        left.append(max(0.0, deadline - time.time()))
    return line + (f"; time left {_duration(min(left))}" if left else "")


def _duration(seconds: float) -> str:
    """Format seconds in s, min or h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
