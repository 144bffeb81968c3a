"""The package runs with what Windows has: fixtures/windows/sitecustomize.py hides the rest."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fixtures.fits import TWO_STEPS

REPOSITORY = Path(__file__).parents[1]
STAND_IN = REPOSITORY / "tests" / "fixtures" / "windows"
PYTHONPATH = os.pathsep.join([str(STAND_IN), str(REPOSITORY)])

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in needs Linux")

SWEEP = {
    "method": "grid",
    "metric": {"name": "val/acc1_truncate_mean", "goal": "maximize"},
    "parameters": {"model.lr": {"values": [0.1, 0.2]}},
    "command": ["${env}", "python", "-m", "tq_lightning", "fit", *TWO_STEPS, "${args}"],
}


def start(*command, folder):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*command, folder):
    process = start(*command, folder=folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def test_files_and_folders_are_written(tmp_path):
    (tmp_path / "empty").mkdir()
    code = """
from tq_lightning.files import atomic_write
for _ in range(2):
    with atomic_write("file") as path:
        path.write_text("text")
    for name in ("new", "empty"):
        with atomic_write(name) as path:
            path.mkdir()
            (path / "file").write_text("text")
"""
    run("-c", code, folder=tmp_path)
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert written == ["empty", "empty/file", "file", "new", "new/file"]


@pytest.mark.slow
def test_run_folder_is_locked(tmp_path):
    hold = """
import sys
from pathlib import Path
from tq_lightning.training.run_lock import RunLock
lock = RunLock(Path("run"))
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""
    first = start(
        "-c", hold.replace("sys.stdin.readline()", "import time; time.sleep(600)"), folder=tmp_path
    )
    assert first.stdout.readline() == "held\n"
    second = start("-c", hold, folder=tmp_path)
    output, _ = second.communicate()
    assert second.returncode == 1 and f"in use by process {first.pid} on" in output
    first.kill()
    first.communicate()
    assert "held" in run("-c", hold, folder=tmp_path)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_commands_run(tmp_path):
    fit = ("-m", "tq_lightning", "fit", *TWO_STEPS, "--run_dir", "run", "--ckpt_path", "auto")
    run(*fit, folder=tmp_path)
    run(*fit, "--trainer.max_epochs", "2", folder=tmp_path)
    test = ("test", "--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt")
    run("-m", "tq_lightning", *test, folder=tmp_path)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "finished" and record["epochs"] == 2 and record["test"]
    export = ("export", "run/checkpoints/last.ckpt", "--out", "model.safetensors")
    run("-m", "tq_lightning", *export, folder=tmp_path)
    for _ in range(2):
        run("-m", "tq_lightning", "report", "run", "--out", "report", folder=tmp_path)
    assert (tmp_path / "report" / "index.html").is_file()
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.slow
def test_sweep_runs_with_a_worker_process(tmp_path):
    (tmp_path / "sweep.yaml").write_text(json.dumps(SWEEP))
    sweep = ("sweep", "sweep.yaml", "--workers", "1", "--dir", "sweep")
    storage = ("--storage", "journal:study.log")
    assert "2 of 2 done" in run("-m", "tq_lightning", *sweep, *storage, folder=tmp_path)


@pytest.mark.slow
def test_stopped_sweep_stops_its_worker(tmp_path):
    fit = [*TWO_STEPS, "--trainer.max_epochs", "500"]
    (tmp_path / "sweep.yaml").write_text(
        json.dumps(SWEEP | {"command": [*SWEEP["command"][:5], *fit, "${args}"]})
    )
    sweep = ("sweep", "sweep.yaml", "--workers", "1", "--dir", "sweep")
    process = start("-m", "tq_lightning", *sweep, folder=tmp_path)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("sweep/trials/*/*/metrics.csv")) and time.monotonic() < until:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    (record,) = tmp_path.glob("sweep/trials/*/*/record.json")
    assert json.loads(record.read_text())["status"] == "interrupted"
