"""When a rank dies, the others end within seconds and print one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

FIT = [
    *("fit", "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"),
    *("--trainer.max_epochs", "50", "--trainer.limit_val_batches", "1"),
    *("--model.name", "resnet8_cifar", "--model.widths", "8,2", "--model.calibration_batches", "1"),
    *("--data.name", "digits", "--data.batch_size", "8"),
    *("--trainer.callbacks+=fixtures.signals.Pace", "--trainer.callbacks.seconds", "0.1"),
]


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dies", [0, 1])
def test_surviving_rank_ends_with_an_error_of_one_line(tmp_path, dies):
    run, paced = tmp_path / "run", tmp_path / "paced"
    command = [sys.executable, "-m", "tq_lightning", *FIT, "--run_dir", str(run)]
    env = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*command, f"--trainer.callbacks.file={paced}"],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 200
        while not paced.exists() or len(paced.read_text().splitlines()) < 3:
            assert process.poll() is None and time.monotonic() < end, process.stderr.read()
            time.sleep(0.1)
        (other,) = [
            p for p in children(process.pid) if "fit" in Path(f"/proc/{p}/cmdline").read_text()
        ]
        os.kill((process.pid, other)[dies], signal.SIGKILL)
        _, printed = process.communicate(timeout=30)  # of both ranks, which share the pipe
    finally:
        process.kill()
    end = time.monotonic() + 10
    while Path(f"/proc/{other}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{other}").exists()
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: rank {dies} of 2 ended before the others; see its own output for the "
        f"reason; {run} has no checkpoint yet"
    ]
    assert "Traceback" not in printed
    if dies == 1:
        assert process.returncode == 1
        record = json.loads((run / "record.json").read_text())
        assert record["status"] == "failed" and record["reason"].startswith("rank 1 of 2 ended")
        assert not (run / ".lock").exists()
