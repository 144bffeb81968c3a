"""Whole or not at all: two writers of one file, and one that fails."""

import pytest

from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write


def test_two_writers_at_a_time_leave_one_whole_file(tmp_path):
    path = tmp_path / "trials.csv"
    with atomic_write(path) as first:
        first.write_text("a,b")
        with atomic_write(path) as second:
            second.write_text("c")
        assert path.read_text() == "c"
    assert path.read_text() == "a,b" and list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "trials.csv"
    path.write_text("before")
    with pytest.raises(UserError, match="full"), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise OSError("full")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
