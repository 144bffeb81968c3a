"""Whole or not at all: two writers of one file, and one that fails."""

import pytest

from tq_lightning.sweep.whole import whole


def test_two_writers_at_a_time_leave_one_whole_file(tmp_path):
    path = tmp_path / "trials.csv"
    with whole(path) as first:
        first.write_text("a,b")
        with whole(path) as second:
            second.write_text("c")
        assert path.read_text() == "c"
    assert path.read_text() == "a,b" and list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "trials.csv"
    path.write_text("before")
    with pytest.raises(OSError, match="full"), whole(path) as temporary:
        temporary.write_text("half")
        raise OSError("full")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
