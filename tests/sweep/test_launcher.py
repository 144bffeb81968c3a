"""The crew of a `sweep` command: who takes a dead worker's place, and what it gets of the machine."""

from types import SimpleNamespace

import pytest
from optuna.exceptions import StorageInternalError

from tq_lightning.sweep import launcher as optuna_engine
from tq_lightning.sweep.launcher import WorkerPool
from tq_lightning.sweep.study import Options
from tq_lightning.sweep.worker import DONE, REPLACE


@pytest.fixture
def crew(tmp_path, monkeypatch):
    """Two workers that never end by themselves; `crew.shares` has the place of every worker started."""
    (tmp_path / "logs").mkdir()
    crew = WorkerPool(
        Options(tmp_path, "sqlite:///study.db", "study", {"loss": "minimize"}, workers=2), None
    )
    crew.shares = []
    monkeypatch.setattr(
        optuna_engine, "_share", lambda place, workers: crew.shares.append(place) or {}
    )
    monkeypatch.setattr(
        optuna_engine.subprocess, "Popen", lambda *_, **__: SimpleNamespace(poll=lambda: None)
    )
    for place in range(2):
        crew.start(place)
    return crew


class Storage:
    """A ledger that was away at the first `missed` calls, and then had one trial of the dead worker's."""

    def __init__(self, missed=0):
        self.missed = missed

    def fail_worker(self, *_):
        self.missed -= 1
        if self.missed >= 0:
            raise StorageInternalError
        return 1


@pytest.mark.parametrize("status", [REPLACE, 1, -9])
@pytest.mark.parametrize("place", [0, 1])
def test_who_takes_a_dead_workers_place_gets_its_share(crew, place, status):
    for _ in range(3):
        dead = [name for name in crew.running if crew.places[name] == place]
        assert len(dead) == 1
        crew.running[dead[0]].poll = lambda: status
        crew.replace_dead(Storage())
    assert (
        crew.shares == [0, 1, place, place, place] and len(crew.running) == 2 and crew.strikes == 0
    )


def test_a_worker_that_dies_while_the_storage_is_away_is_replaced_when_it_is_back(crew):
    dead, queue = next(iter(crew.running)), Storage(missed=2)
    crew.running[dead].poll = lambda: 1
    for _ in range(2):
        with pytest.raises(StorageInternalError):
            crew.replace_dead(queue)
        assert dead in crew.running and len(crew.running) == 2
    crew.replace_dead(queue)
    assert dead not in crew.running and crew.shares == [0, 1, 0] and len(crew.running) == 2


def test_a_worker_that_is_done_is_not_replaced(crew):
    for process in list(crew.running.values()):
        process.poll = lambda: DONE
    crew.replace_dead(Storage())
    assert not crew.running and crew.shares == [0, 1]
