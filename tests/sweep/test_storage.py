"""Storages that go away for a while, and those that no worker could share."""

import pytest
from optuna.exceptions import StorageInternalError

from tq_lightning.errors import TrainingError, UserError
from tq_lightning.sweep.storage import StorageOutage, open_storage


def test_a_storage_may_be_away_for_a_while_but_not_for_ever():
    away = StorageOutage(seconds=60)
    with away:
        raise StorageInternalError("gone")
    assert away.since is not None
    away.since -= 61
    with pytest.raises(TrainingError, match=r"away for 60 s \(gone\); start it, go on"), away:
        raise StorageInternalError("gone")
    with away:
        pass
    with away:  # it had come back in between
        raise StorageInternalError("gone")


def test_other_errors_are_not_swallowed():
    with pytest.raises(ValueError, match="mine"), StorageOutage():
        raise ValueError("mine")


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite+pysqlite:///:memory:"])
def test_a_storage_in_memory_is_refused(url):
    with pytest.raises(UserError, match="no file"):
        open_storage(url)
