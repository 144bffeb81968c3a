"""A run folder has one writer. A dead writer loses it, and a requeued job takes it over."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tq_lightning.errors import Interrupted, UserError
from tq_lightning.training import run_lock
from tq_lightning.training.open_run import OpenRun
from tq_lightning.training.run_lock import NAME, RunLock

HOLD = """
import sys, time
from pathlib import Path
from tq_lightning.training.run_lock import RunLock
if len(sys.argv) > 2:
    from tq_lightning.training import run_lock
    run_lock.BEAT_SECONDS = 0.1
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Return a function that starts processes which hold the lock of tmp_path/run."""
    started = []

    def start(*more, **env):
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), *more]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def no_job(monkeypatch):
    for key in [key for key in os.environ if key.startswith("SLURM")]:
        monkeypatch.delenv(key)


@pytest.fixture
def without_locks(monkeypatch):
    """Simulate a file system without working locks."""
    monkeypatch.setattr(run_lock, "_try_lock", lambda handle: run_lock._THIS_HOST)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.5)


@pytest.mark.slow
def test_live_holder_is_named_and_dead_holder_is_ignored(tmp_path, no_job, holder):
    run = tmp_path / "run"
    process = holder()
    with pytest.raises(UserError, match=f"{run} is in use by process {process.pid} on "):
        RunLock(run)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run / NAME).exists()
    lock = RunLock(run)
    lock.release()
    lock.release()
    assert list(run.iterdir()) == []


@pytest.mark.slow
def test_requeued_job_takes_the_lock_of_its_earlier_attempt(tmp_path, monkeypatch, holder):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    process = holder("fast")
    with pytest.raises(UserError, match="SLURM job 7"):  # another step of the same attempt
        RunLock(tmp_path / "run")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start = time.monotonic()
    lock = RunLock(tmp_path / "run")
    assert time.monotonic() - start < 2.5, "a requeue does not wait"
    assert process.wait(timeout=20) == 1
    assert "taken over" in process.stderr.read()
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / NAME]
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_tasks_of_an_array_are_different_jobs(tmp_path, monkeypatch, holder):
    job = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    holder(**job)
    for key, value in (job | {"SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "1"}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="SLURM job 7_1"):
        RunLock(tmp_path / "run")


def other_host(run, pid):
    run.mkdir()
    (run / NAME).write_text(json.dumps({"token": "x", "host": "elsewhere", "pid": pid}))


def test_holder_on_another_host_is_alive_while_its_heartbeat_advances(
    tmp_path, no_job, without_locks
):
    run = tmp_path / "run"
    other_host(run, 1)
    RunLock(run).release()  # it does not advance
    other = tmp_path / "other"
    other_host(other, 1)
    beat = "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(0.05)"
    process = subprocess.Popen([sys.executable, "-c", beat, str(other / NAME)])
    try:
        time.sleep(0.3)
        with pytest.raises(UserError, match="in use by process 1 on elsewhere"):
            RunLock(other)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_without_file_locks_the_process_of_the_holder_is_checked(
    tmp_path, no_job, without_locks, holder
):
    process = holder()
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path / "run")
    process.kill()
    process.wait()
    start = time.monotonic()
    RunLock(tmp_path / "run").release()
    assert time.monotonic() - start < 0.5


def test_folder_that_cannot_be_created_is_an_error_of_one_line(tmp_path, no_job):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write in"):
        RunLock(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("options", "reach"), [({"rw", "vers=4.2"}, "everywhere"), ({"rw", "nolock"}, "this host")]
)
def test_lock_scope_from_mount_options(tmp_path, monkeypatch, options, reach):
    monkeypatch.setattr(run_lock, "_mount_options", lambda handle: options)
    with (tmp_path / "file").open("w") as file:
        assert run_lock._try_lock(file.fileno()) == reach


def test_mount_options_of_a_file_are_found(tmp_path):
    with (tmp_path / "file").open("w") as file:
        assert {"rw", "ro"} & run_lock._mount_options(file.fileno())


@pytest.mark.parametrize("exists", [False, True])
def test_signal_during_locking_leaves_no_files(tmp_path, no_job, monkeypatch, exists):
    run = tmp_path / "runs" / "a"
    if exists:
        run.mkdir(parents=True)
    before = list(tmp_path.rglob("*"))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(Interrupted(signal.SIGTERM)))
    with pytest.raises(Interrupted):
        OpenRun(run)
    assert list(tmp_path.rglob("*")) == before


def test_process_that_loses_the_race_for_a_new_folder_leaves_the_run_alone(
    tmp_path, no_job, monkeypatch
):
    """The other process creates and locks the folder after this one found it missing."""
    run = tmp_path / "runs" / "a"

    def lock(folder):
        folder.mkdir(parents=True)
        (folder / "record.json").write_text("{}")
        raise UserError("in use")

    monkeypatch.setattr("tq_lightning.training.open_run.RunLock", lock)
    with pytest.raises(UserError, match="in use"):
        OpenRun(run)
    assert (run / "record.json").read_text() == "{}"
