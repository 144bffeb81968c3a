"""Fixtures of the sweep tests: sweep files, and the `sweep` command with a stand-in for fit."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tq_lightning.cli import sweep as sweep_verb
from tq_lightning.sweep.study import FIT

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the helper modules beside the tests
COMMAND = ["${env}", "python", "-m", "tq_lightning", "fit", "${args}"]


@pytest.fixture
def write_sweep(tmp_path):
    """Return a function that writes a sweep file (a grid over model.lr) and returns its path."""

    def write(name="sweep.yaml", arguments=(), **keys):
        keys = {
            "method": "grid",
            "metric": {"name": "val/acc1_truncate_mean", "goal": "maximize"},
            "parameters": {"model.lr": {"values": [0.1, 0.2, 0.3]}},
            "command": [*COMMAND[:-1], *arguments, COMMAND[-1]],
        } | keys
        path = tmp_path / name
        path.write_text(
            yaml.safe_dump({k: v for k, v in keys.items() if v is not None}, sort_keys=False)
        )
        return path

    return write


@pytest.fixture
def replace_fit(monkeypatch):
    """Return a function that replaces the fit of `sweep` by a stand-in (MODULE:NAME)."""
    real = sweep_verb.main

    def replace(fit):
        monkeypatch.setattr(sweep_verb, "main", functools.partial(real, fit=fit))

    return replace


@pytest.fixture
def no_results(monkeypatch):
    """Disable tables and plots of `sweep`, which take longer than everything else."""
    monkeypatch.setattr("tq_lightning.sweep.results.write_results", lambda *_: None)


@pytest.fixture
def sweep_process():
    """Return a function that starts `sweep ...` with a stand-in for fit. Kill it at the end."""
    started = []

    def start(*argv, fit="stand_in:fit"):
        module = ["-m", "tq_lightning", "sweep"] if fit == FIT else [HERE / "sweep_command.py", fit]
        process = subprocess.Popen(
            [sys.executable, *map(str, module), *map(str, argv)],
            env=os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent.parent}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
