"""Behavior that depends on the version of a dependency, for `make test-lowest`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_offline_wandb_fit_ends(tmp_path):
    """Below wandb 0.19.5 the process of an offline run never ends."""
    argv = ["fit", "--config", "conf/digits.yaml", "--trainer.max_epochs", "1", "--wandb"]
    argv += ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
    argv += ["--model.calibration_batches", "1", "--model.warmup_epochs", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "tq_lightning", *argv, "--trainer.default_root_dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob("*/wandb/offline-run-*/run-*.wandb"))) == 1


def test_lowest_versions_run_this_file():
    """The test above is slow, and the rest of `make test-lowest` excludes slow tests."""
    recipe = (ROOT / "Makefile").read_text().partition("\ntest-lowest:")[2].partition("\n\n")[0]
    assert "pytest tests/test_versions.py" in recipe
