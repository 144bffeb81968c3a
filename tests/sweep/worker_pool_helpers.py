"""Helpers of tests with worker processes: study, calls of the stand-in, a killed worker."""

import os
import signal
import time

import optuna
from optuna.trial import TrialState

from tq_lightning.sweep.storage import open_storage


def study_of(folder, name="sweep", url=None):
    return optuna.load_study(
        study_name=name, storage=open_storage(url or f"sqlite:///{folder}/study.db")
    )


def ran(folder):
    """Return (pid, lr, seed) of every call of the stand-in, in order."""
    rows = [line.split() for line in (folder / "trials" / "ran.txt").read_text().splitlines()]
    return [(int(pid), float(lr), int(seed)) for pid, lr, seed, _ in rows]


def wait_for(condition, seconds=240.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.05)


def check_killed_worker(write_sweep, tmp_path, sweep_process, url):
    """Kill one of three workers during a trial: 12 points, 12 results, the killed trial retried."""
    parameters = {
        "seed_everything": {"values": [0, 1, 2]},
        "model.lr": {"values": [0.1, 0.2, 0.3, 0.4]},
    }
    path, folder = write_sweep(parameters=parameters, arguments=["--sleep=1.0"]), tmp_path / "out"
    where = ["--storage", url] if url else []
    process = sweep_process(path, "--dir", folder, "--workers", "3", *where)
    wait_for(lambda: (folder / "trials" / "ran.txt").exists() and len(ran(folder)) >= 2)
    pid, lr, seed = ran(folder)[-1]
    os.kill(pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    trials = study_of(folder, url=url).trials
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    assert (
        len({(t.params["seed_everything"], t.params["model.lr"]) for t in complete})
        == len(complete)
        == 12
    )
    failed = [t for t in trials if t.state != TrialState.COMPLETE]
    assert len(failed) == 1 and failed[0].user_attrs["reason"] == "worker was killed by SIGKILL"
    calls = [row[1:] for row in ran(folder)]
    assert len(calls) == 13 and calls.count((lr, seed)) == 2 and len(set(calls)) == 12
    assert len({row[0] for row in ran(folder)}) >= 3
