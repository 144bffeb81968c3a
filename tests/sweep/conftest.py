"""What the tests of sweeps share: sweep files made on the spot, and the `sweep` command in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # crew, stand_in and wandb_stand_in are modules beside the tests
COMMAND = ["${env}", "python", "-m", "tq_lightning", "fit", "${args}"]


@pytest.fixture
def write_sweep(tmp_path):
    """A function that writes a sweep file (a grid over model.lr, if nothing else is said) and returns its path."""

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
def sweep_process():
    """A function that starts `python -m tq_lightning sweep ...` with the stand-in fit; kills what is left at the end."""
    started = []

    def start(*argv, fit="stand_in:fit"):
        process = subprocess.Popen(
            [sys.executable, "-m", "tq_lightning", "sweep", *map(str, argv), "--fit", fit],
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
