"""The progress line: counts, the best trial, and a steady estimate of the time left."""

import io
from datetime import datetime, timedelta

import optuna
import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console

from tq_lightning.sweep.progress import Progress, describe
from tq_lightning.sweep.trial_queue import TrialQueue


def line(running, workers):
    """Return the line with two of eight trials done in 100 s each, and `running` since 40 s."""
    study = optuna.create_study(direction="maximize")
    study.set_metric_names(["val/acc1_float"])
    now = datetime.now()
    for point in range(2 + running):
        trial = create_trial(
            state=TrialState.COMPLETE, value=90.0 + point, user_attrs={"point": point, "attempt": 0}
        )
        if point < 2:
            trial.datetime_start, trial.datetime_complete = now - timedelta(seconds=100), now
        else:
            trial.state, trial.datetime_start = TrialState.RUNNING, now - timedelta(seconds=40)
            trial.values, trial.datetime_complete = None, None
        study._storage.create_new_trial(study._study_id, template_trial=trial)
    return describe(TrialQueue(study, lambda point: {}, limit=8), None, workers)


def test_time_left_subtracts_the_elapsed_time_of_running_trials():
    printed = line(running=2, workers=2)
    assert printed.startswith(
        "2 of 8 done, 2 running, 0 failed, 0 pruned; best val/acc1_float 91 (trial 1)"
    )
    assert printed.endswith("time left 4 min")  # (6 * 100 - 2 * 40) / 2 = 260 s


def test_time_left_counts_a_worker_between_two_trials():
    assert line(running=1, workers=2).endswith(
        "time left 5 min"
    )  # (600 - 40) / 2 = 280 s, not 560 s


def test_time_left_counts_workers_of_other_commands():
    assert line(running=4, workers=1).endswith("time left 2 min")  # (600 - 160) / 4 = 110 s


@pytest.mark.parametrize("terminal", [False, True])
def test_brackets_are_printed_literally(terminal):
    study = optuna.create_study(direction="maximize")
    study.set_metric_names(["val/[/v2]"])
    study.add_trial(create_trial(value=1.0, user_attrs={"point": 0, "attempt": 0}))
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with Progress(TrialQueue(study, lambda point: {}, limit=1), None, 1, console) as progress:
        progress.show()
    assert "best val/[/v2] 1 (trial 0)" in console.file.getvalue()
