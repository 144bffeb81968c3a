"""Atomic writes: concurrent and failing writers, folders, a full disk, leftover files."""

import contextlib
import os
import stat
import subprocess
import sys
import time

import pytest

from tq_lightning import files
from tq_lightning.errors import UserError
from tq_lightning.files import (
    atomic_write,
    check_replaceable,
    expand_path,
    expand_storage,
    remove_temporaries,
)


def test_file_is_replaced_by_a_rename_in_its_folder(tmp_path):
    path = tmp_path / "trials.csv"
    for text in ("a", "b"):
        with atomic_write(str(path)) as temporary:
            temporary.write_text(text)
            assert temporary.parent == tmp_path  # a rename between file systems is not atomic
        assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_concurrent_writers_leave_one_complete_file(tmp_path):
    path = tmp_path / "trials.csv"
    with atomic_write(path) as first:
        first.write_text("a,b")
        with atomic_write(path) as second:
            second.write_text("c")
        assert path.read_text() == "c"
    assert path.read_text() == "a,b" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError("full"), UserError),
        (RuntimeError("broken"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_failed_write_keeps_the_old_file(tmp_path, error, seen):
    path = tmp_path / "trials.csv"
    path.write_text("before")
    with pytest.raises(seen), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_folder_is_replaced_atomically(tmp_path):
    target = tmp_path / "report"
    target.mkdir()
    (target / "old.html").write_text("old")
    with atomic_write(target) as building:
        (building / "figures").mkdir(parents=True)
        (building / "figures" / "new.svg").write_text("new")
        assert [p.name for p in target.iterdir()] == ["old.html"]
    assert [p.name for p in target.iterdir()] == ["figures"]
    assert list(tmp_path.iterdir()) == [target]


def test_folder_that_cannot_be_replaced_is_kept(tmp_path, monkeypatch):
    target = tmp_path / "report"
    target.mkdir()
    (target / "old.html").write_text("old")
    real = os.replace

    def replace(source, goal):
        if str(source).endswith(".tmp"):
            raise PermissionError(13, "Permission denied")
        real(source, goal)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(files, "_exchange", lambda one, two: False)
    with pytest.raises(UserError, match="Permission denied"), atomic_write(target) as building:
        building.mkdir()
    assert (target / "old.html").read_text() == "old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_an_error_of_one_line(tmp_path):
    path = tmp_path / "trials.csv"
    path.write_text("before")
    with pytest.raises(UserError) as caught, atomic_write(path) as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("x" * 100_000)
    assert str(caught.value) == (
        f"cannot write {path} (No space left on device); nothing was changed"
    )
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_an_error_of_one_line(tmp_path):
    with (
        pytest.raises(UserError, match=r"no folder .*absent to write a\.csv to; create it first"),
        atomic_write(tmp_path / "absent" / "a.csv") as temporary,
    ):
        temporary.write_text("a")


def test_only_leftover_files_of_a_killed_writer_are_removed(tmp_path):
    code = (
        "import sys, time; from tq_lightning.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as t: t.write_text('half'); time.sleep(60)"
    )
    path = tmp_path / "last.ckpt"
    path.write_text("before")
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    until = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    writer.kill()
    writer.wait()
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".hidden.tmp").write_text("a user's")
    remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden.tmp", "last.ckpt"]
    assert path.read_text() == "before"
    remove_temporaries(tmp_path / "absent")


def test_write_removes_temporaries_of_its_target_once_they_are_old(tmp_path, monkeypatch):
    """The times of a change can't be set, so this test shortens the age."""
    old = tmp_path / ".model.safetensors.0123abcd.tmp"
    old.write_text("half")
    folder = tmp_path / ".report.0123abcd.old"
    (folder / "figures").mkdir(parents=True)
    others = [".other.safetensors.0123abcd.tmp", ".model.safetensors.backup.tmp"]
    for name in others:
        (tmp_path / name).touch()
    with atomic_write(tmp_path / "model.safetensors") as temporary:
        temporary.write_text("before")
    assert old.is_file(), "its writer may be alive"
    monkeypatch.setattr(files, "STALE_HOURS", 0.0)
    time.sleep(0.05)
    with atomic_write(tmp_path / "model.safetensors") as temporary:
        temporary.write_text("after")
    with atomic_write(tmp_path / "report") as building:
        building.mkdir()
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "report", *others}
    assert (tmp_path / "model.safetensors").read_text() == "after"


def test_device_is_not_replaced(tmp_path):
    """As root, a rename over /dev/null would succeed."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a regular file"), atomic_write(tmp_path / "pipe"):
        raise AssertionError("nothing is to be written")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    for nothing in (".", "/", ""):
        with pytest.raises(UserError, match="is not a regular file"), atomic_write(nothing):
            raise AssertionError("nothing is to be written")


def test_write_to_a_link_replaces_its_target(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "link", "real"]


@pytest.mark.parametrize(
    ("url", "expanded"),
    [
        ("sqlite:///~/x.db", "sqlite:////home/me/x.db"),
        ("sqlite+pysqlite:///~/x.db?timeout=9", "sqlite+pysqlite:////home/me/x.db?timeout=9"),
        ("sqlite:///file:~/x.db?uri=true", "sqlite:///file:/home/me/x.db?uri=true"),
        ("journal:~/x.log", "journal:/home/me/x.log"),
        ("journal:x.log", "journal:x.log"),
        ("sqlite:///x~.db", "sqlite:///x~.db"),
        ("sqlite:////data/~/x.db", "sqlite:////data/~/x.db"),
        ("postgresql+psycopg://me@host/~", "postgresql+psycopg://me@host/~"),
    ],
)
def test_home_is_expanded_in_the_path_of_a_storage(monkeypatch, url, expanded):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_storage(url) == expanded


def test_empty_path_is_an_error():
    with pytest.raises(UserError, match="empty path"):
        expand_path("")
    with pytest.raises(UserError, match="empty path"):
        expand_storage("journal:")


def replace_folder(path, text):
    with atomic_write(path) as temporary:
        temporary.mkdir()
        (temporary / "page").write_text(text)
        (temporary / "kind.json").write_text('{"kind": "page"}')


@pytest.fixture(params=["exchange", "two renames"])
def swap(request, monkeypatch):
    """Replace folders in one step, or as on systems that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda one, two: False)
    elif sys.platform != "linux":
        pytest.skip("exchange of folders is tested on Linux")
    return request.param


def test_replaced_folder_leaves_nothing_behind(tmp_path, swap):
    for text in ("old", "new"):
        replace_folder(tmp_path / "out", text)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "page").read_text() == "new"


def kill_at_rename(number, monkeypatch, out):
    """Replace a folder; from the n-th rename on, the process does nothing more."""
    rename, calls = os.replace, []

    def until(one, two):
        calls.append(one)
        if len(calls) >= number:
            raise KeyboardInterrupt
        rename(one, two)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until)
        patch.setattr(files, "_remove", lambda path: None)
        with contextlib.suppress(KeyboardInterrupt):
            replace_folder(out, "new")


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("start", ["write", "check", "remove_temporaries"])
def test_next_start_finds_a_folder_after_a_kill(tmp_path, swap, monkeypatch, start, number):
    out = tmp_path / "out"
    replace_folder(out, "old")
    kill_at_rename(number, monkeypatch, out)
    assert out.exists() == (swap == "exchange" or number != 2)
    if start == "write":
        with pytest.raises(ValueError, match="stop"), atomic_write(out):
            raise ValueError("stop")
    elif start == "check":
        check_replaceable(out, "kind.json", "page", "a page")
    else:
        remove_temporaries(tmp_path)
        assert list(tmp_path.iterdir()) == [out]
    new = swap == "exchange" or number == 3
    assert (out / "page").read_text() == ("new" if new else "old")


def test_signal_between_two_renames_restores_the_folder(tmp_path, monkeypatch):
    out, rename, calls = tmp_path / "out", os.replace, []
    replace_folder(out, "old")

    def interrupted(one, two):
        calls.append(one)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(one, two)

    monkeypatch.setattr(files, "_exchange", lambda one, two: False)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(out, "new")
    assert (out / "page").read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_old_folder_is_removed_if_the_new_one_is_there(tmp_path):
    replace_folder(tmp_path / "out", "new")
    replace_folder(tmp_path / ".out.0123abcd.old", "old")
    remove_temporaries(tmp_path)
    assert (tmp_path / "out" / "page").read_text() == "new" and len(list(tmp_path.iterdir())) == 1
