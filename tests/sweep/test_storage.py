"""Outages of a storage, and storages that workers cannot share."""

import pytest
from optuna.exceptions import StorageInternalError

from tq_lightning.errors import TrainingError, UserError
from tq_lightning.sweep.storage import StorageOutage, open_storage


def test_short_outage_is_tolerated():
    outage = StorageOutage(seconds=60)
    with outage:
        raise StorageInternalError("gone")
    assert outage.since is not None
    outage.since -= 61
    with pytest.raises(TrainingError, match=r"unreachable for 60 s \(gone\); start it"), outage:
        raise StorageInternalError("gone")
    with outage:
        pass
    with outage:  # it was available in between
        raise StorageInternalError("gone")


def test_other_errors_are_raised():
    with pytest.raises(ValueError, match="mine"), StorageOutage():
        raise ValueError("mine")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    open_storage("sqlite:///~/study.db")
    open_storage("journal:~/study.log")
    assert {path.name for path in tmp_path.iterdir()} == {"study.db", "study.log"}


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite+pysqlite:///:memory:"])
def test_in_memory_storage_is_an_error(url):
    with pytest.raises(UserError, match="in-memory database"):
        open_storage(url)
