"""The worker pool of `sweep`: replacement of exited workers, and CPU and GPU shares."""

import signal
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
from optuna.exceptions import StorageInternalError

from tq_lightning.errors import TrainingError
from tq_lightning.sweep import launcher, worker
from tq_lightning.sweep.launcher import WorkerPool, run_sweep
from tq_lightning.sweep.study import Options
from tq_lightning.sweep.trial import TrialResult
from tq_lightning.sweep.worker import DONE, REPLACE, without_launcher


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Two workers that do not exit; `pool.shares` lists the slots of started workers."""
    (tmp_path / "logs").mkdir()
    pool = WorkerPool(
        Options(tmp_path, "sqlite:///study.db", "study", {"loss": "minimize"}, workers=2), None
    )
    pool.shares = []
    monkeypatch.setattr(
        launcher, "_slot_environment", lambda slot, workers: pool.shares.append(slot) or {}
    )
    monkeypatch.setattr(
        launcher.subprocess, "Popen", lambda *_, **__: SimpleNamespace(poll=lambda: None)
    )
    for slot in range(2):
        pool.start(slot)
    return pool


class Queue:
    """A queue whose storage fails for `missed` calls and then has one trial of the worker."""

    def __init__(self, missed=0):
        self.missed = missed

    def fail_worker(self, *_):
        self.missed -= 1
        if self.missed >= 0:
            raise StorageInternalError
        return 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt, "stopped by the user"),
        (TrainingError("no trial starts"), "the sweep command failed: no trial starts"),
    ],
)
def test_trials_of_killed_workers_have_the_reason_of_the_end(tmp_path, monkeypatch, error, reason):
    failed = []

    class Pool(WorkerPool):
        def start(self, slot):
            self.running["worker"] = SimpleNamespace(
                pid=0, poll=lambda: DONE, wait=lambda: None, send_signal=lambda number: None
            )

        def replace_exited(self, queue):
            if error is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
            raise error

    queue = SimpleNamespace(
        limit=None, refresh=lambda: None, fail_worker=lambda *given: failed.append(given)
    )
    monkeypatch.setattr(launcher, "WorkerPool", Pool)
    monkeypatch.setattr(launcher, "open_study", lambda *_: None)
    monkeypatch.setattr(launcher, "make_trial_queue", lambda *_: queue)
    monkeypatch.setattr(launcher, "Progress", lambda *_: nullcontext())
    monkeypatch.setattr(launcher.os, "killpg", lambda *_: None)
    options = Options(tmp_path, "sqlite:///study.db", "study", {"loss": "minimize"})
    with suppress(TrainingError):
        run_sweep(SimpleNamespace(environment={}), options)
    assert failed == [("worker", "interrupted", reason)]


@pytest.mark.parametrize(
    ("parent", "reason"), [(-1, "the sweep command ended"), (None, "stopped by the user")]
)
def test_worker_whose_command_has_ended_says_so(tmp_path, monkeypatch, parent, reason):
    stored = []
    monkeypatch.setattr(worker, "heartbeat", lambda *_: nullcontext())
    queue, sweep = SimpleNamespace(trial_taken=False), SimpleNamespace(environment={})
    orphan = worker.Worker(queue, sweep, ["loss"], tmp_path, None, parent=parent)
    orphan.stopped_by = signal.SIGINT  # the heartbeat sends it to its own process
    orphan.objective = SimpleNamespace(
        run=lambda _: TrialResult("interrupted", reason="stopped by the user"),
        store=lambda _, result: stored.append(result.reason),
    )
    orphan.run_claimed(None)
    assert stored == [reason]


@pytest.mark.parametrize("status", [REPLACE, 1, -9])
@pytest.mark.parametrize("slot", [0, 1])
def test_replacement_gets_the_slot_of_the_exited_worker(pool, slot, status):
    for _ in range(3):
        dead = [name for name in pool.running if pool.slots[name] == slot]
        assert len(dead) == 1
        pool.running[dead[0]].poll = lambda: status
        pool.replace_exited(Queue())
    assert (
        pool.shares == [0, 1, slot, slot, slot]
        and len(pool.running) == 2
        and pool.failed_starts == 0
    )


def test_worker_that_dies_during_an_outage_is_replaced_afterwards(pool):
    dead, queue = next(iter(pool.running)), Queue(missed=2)
    pool.running[dead].poll = lambda: 1
    for _ in range(2):
        with pytest.raises(StorageInternalError):
            pool.replace_exited(queue)
        assert dead in pool.running and len(pool.running) == 2
    pool.replace_exited(queue)
    assert dead not in pool.running and pool.shares == [0, 1, 0] and len(pool.running) == 2


def test_finished_worker_is_not_replaced(pool):
    for process in list(pool.running.values()):
        process.poll = lambda: DONE
    pool.replace_exited(Queue())
    assert not pool.running and pool.shares == [0, 1]


def test_sweep_workers_are_not_slurm_ranks():
    kept = {"CUDA_VISIBLE_DEVICES": "1", "PATH": "/bin"}
    assert without_launcher(kept | {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}) == kept


def test_workers_start_with_the_variables_of_the_command(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    options = Options(tmp_path, "sqlite:///study.db", "study", {"loss": "minimize"})
    given = []
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(launcher.subprocess, "Popen", lambda *_, env, **__: given.append(env))
    for environment in ({"OMP_NUM_THREADS": "3"}, {}):
        WorkerPool(options, None, environment).start(0)
    assert [env["OMP_NUM_THREADS"] for env in given] == ["3", "2"]


def test_no_more_workers_than_trials(tmp_path, monkeypatch):
    started = []

    class Pool:
        running = ()

        def __init__(self, *_):
            pass

        def start(self, slot):
            started.append(slot)

        def kill(self, *_):
            pass

    queue = SimpleNamespace(limit=2, refresh=lambda: None)
    progress = SimpleNamespace(show=lambda: None)
    monkeypatch.setattr(launcher, "open_study", lambda *_: None)
    monkeypatch.setattr(launcher, "make_trial_queue", lambda *_: queue)
    monkeypatch.setattr(launcher, "Progress", lambda *_: nullcontext(progress))
    monkeypatch.setattr(launcher, "WorkerPool", Pool)
    options = Options(tmp_path, "sqlite:///study.db", "study", {"loss": "minimize"}, workers=100)
    assert run_sweep(SimpleNamespace(environment={}), options) == 0
    assert started == [0, 1]
