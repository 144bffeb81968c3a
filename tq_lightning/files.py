"""Atomic file writes, safe with concurrent writers."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tq_lightning.errors import UserError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success, what was written there replaces `path`.

    The caller creates a file or a folder at the yielded path. It is flushed to disk before it is renamed, so a reader (or
    the next start after a crash) sees either the old content or the new one. If the block raises, `path` is unchanged and
    the temporary path is removed. Each writer has a temporary name of its own.

    Args:
        path: target file or folder. Its parent folder must exist.

    Raises:
        UserError: the parent folder does not exist, the disk is full, or the target can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if not path.parent.is_dir():
            raise UserError(f"no folder {path.parent} to write {path.name} to; create it first")
        yield temporary
        _sync(temporary)
        if temporary.is_dir():
            _swap_folder(temporary, path)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); nothing was changed"
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    if path.is_dir() and os.name == "nt":  # Windows can't open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap_folder(new: Path, target: Path) -> None:
    """Rename a folder over another one; the old one is moved aside first and restored if the rename fails."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(new, target)
        return
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    os.replace(target, aside)
    try:
        os.replace(new, target)
    except OSError:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
