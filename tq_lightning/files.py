"""Atomic file writes, safe with concurrent writers."""

import ctypes
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tq_lightning.errors import UserError

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(tmp|old)")
STALE_HOURS = 24.0  # age of a temporary file whose writer must have been killed


def expand_path(path: str | Path) -> Path:
    """Return a path with `~` and `~user` expanded, as in a shell.

    Raises:
        UserError: the path is empty, e.g. because of an unset shell variable.
    """
    if not os.fspath(path):
        raise UserError("got an empty path; pass a file or a folder")
    return Path(os.path.expanduser(path))


def expand_storage(url: str) -> str:
    """Return the URL of an Optuna storage with `~` expanded in the path of a file.

    Raises:
        UserError: the path of a journal is empty.
    """
    match = re.match(r"journal:|sqlite(\+\w+)?:///(file:)?(?=~)", url)
    return f"{match[0]}{expand_path(url[match.end() :])}" if match else url


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`. Its content replaces `path` on success.

    The caller creates a file or a folder at the yielded path. It is flushed to disk and then
    renamed, so a reader (or the next start after a crash) sees either the old or the new content.
    If the block raises, `path` does not change and the temporary path is removed. Each writer has
    its own temporary name. The temporary file of a killed writer remains until
    `remove_temporaries` deletes it, or a write of the same `path` that is `STALE_HOURS` later.

    Args:
        path: target file or folder. Its parent folder must exist. For a symbolic link, its target
            is replaced.

    Raises:
        UserError: the parent folder does not exist, the disk is full, or `path` is not writable or
            is a special file, such as /dev/null.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    if not path.name or (path.exists() and not path.is_file() and not path.is_dir()):
        raise UserError(f"cannot write {path} (it is not a regular file); pass another name")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        check_parent(path)
        restore_folder(path)
        yield temporary
        _sync(temporary)
        if temporary.is_dir():
            _swap_folder(temporary, path)
        else:
            os.replace(temporary, path)
        _sync(path.parent, deep=False)
        _remove_stale(path)
    except OSError as error:
        reason = (error.strerror or str(error)).splitlines()[0]
        raise UserError(f"cannot write {path} ({reason}); nothing was changed") from error
    finally:
        _remove(temporary)


def check_parent(path: Path) -> None:
    """Raise UserError if the folder of a file to write does not exist."""
    path = path.resolve() if path.is_symlink() else path
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent} to write {path.name} to; create it first")


def check_replaceable(out: Path, marker: str, kind: str, what: str) -> None:
    """Check that a folder can be written to `out`: it is new, empty, or contains an earlier one.

    Args:
        out: target folder, as given with --out.
        marker: JSON file whose "kind" is the kind of a folder.
        kind: the kind that may be replaced.
        what: name of the kind in messages, e.g. "a report".

    Raises:
        UserError: `out` is a file, or a folder with other content.
    """
    restore_folder(out)
    if not out.is_dir() and (out.exists() or out.is_symlink()):
        raise UserError(f"--out {out} is a file; pass a new folder or one with {what}")
    try:
        content = json.loads((out / marker).read_text(encoding="utf-8"))
        found = content["kind"]
    except (OSError, ValueError, LookupError, TypeError):
        found = None
    if found != kind and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: the folder exists and is not {what}; pass a new folder")


def is_temporary(name: str) -> bool:
    """Return True for the name of a temporary file or folder of `atomic_write`."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporaries(folder: Path) -> None:
    """Delete the temporary files of killed writers; no other process may be writing to `folder`."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := _TEMPORARY.fullmatch(path.name):
            restore_folder(folder / match[1])
            _remove(path)


def restore_folder(path: Path) -> None:
    """Rename an old folder back to `path` if its writer was killed before the new one was there.

    This is a step of `atomic_write`, whose readers would find no folder otherwise.
    """
    if os.path.lexists(path) or not path.parent.is_dir():
        return
    for old in path.parent.iterdir():
        match = _TEMPORARY.fullmatch(old.name)
        if match and (match[1], match[2]) == (path.name, "old") and old.is_dir():
            os.replace(old, path)
            return


def _remove_stale(path: Path) -> None:
    """Delete old temporary files of `path`, which was just written.

    Their age, not the process id, tells the writers that were killed: another host may write too.
    Both times are those of the file system, so the clock of this host does not count. They are the
    times of the last change, which unlike those of the content can't be set.
    """
    with suppress(OSError):
        latest = path.stat().st_ctime - 3600 * STALE_HOURS
        for other in path.parent.iterdir():
            match = _TEMPORARY.fullmatch(other.name)
            if match and match[1] == path.name and other.lstat().st_ctime < latest:
                _remove(other)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _sync(path: Path, deep: bool = True) -> None:
    """Flush a file, or a folder with (`deep`) or without the files below it, to disk."""
    if path.is_dir():
        for entry in path.iterdir() if deep else ():
            _sync(entry)
        if os.name == "nt":  # Windows cannot open a folder
            return
    # Windows flushes only files that are open for writing
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap_folder(new: Path, target: Path) -> None:
    """Replace a folder by another one; the old one is restored if the rename fails.

    Where the system can't exchange two folders in one step, there is none at `target` between two
    renames. `restore_folder` repairs a kill between them.
    """
    if not target.exists():
        os.replace(new, target)
        return
    if _exchange(new, target):  # `new` is the old folder now, which `atomic_write` removes
        return
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    os.replace(target, aside)
    try:
        os.replace(new, target)
    except BaseException:  # also a signal
        os.replace(aside, target)
        raise
    # under a name that is not restored, because a kill may leave a part of it
    removed = aside.with_suffix(".tmp")
    with suppress(OSError):
        os.replace(aside, removed)
    _remove(removed)


def _exchange(one: Path, two: Path) -> bool:
    """Exchange two paths in one step. Return False if the system or the file system can't."""
    names = os.fsencode(one), os.fsencode(two)
    try:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "renameat2"):  # Linux; AT_FDCWD, RENAME_EXCHANGE
            return bool(libc.renameat2(-100, names[0], -100, names[1], 2) == 0)
        return bool(libc.renamex_np(*names, 2) == 0)  # macOS; RENAME_SWAP
    except (AttributeError, OSError, TypeError):
        return False
