"""OpenRun: a run folder that is locked while a verb uses it."""

import contextlib
import os
import shutil
from pathlib import Path

from tq_lightning.errors import UserError
from tq_lightning.records import NAME
from tq_lightning.training.run_lock import RunLock


class OpenRun:
    """A run folder that this process has locked. It is created if it does not exist.

    Args:
        folder: the run folder.

    Raises:
        UserError: another process holds the lock, or the folder can't be created.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        self._created = missing[-1] if missing else None  # the topmost folder created here
        try:
            self._lock = RunLock(folder)
        except BaseException:  # also a signal
            self._remove_empty(folder)  # it may be the run of another process by now
            raise

    def close(self, error: BaseException | None) -> None:
        """Unlock the folder, and remove it if it was created for a run that never started.

        Args:
            error: exception that ended the verb, or None. After a UserError, a folder without
                checkpoints is removed too.
        """
        self._lock.release()
        kept = "*" if error is None else "checkpoints/*" if isinstance(error, UserError) else NAME
        if not any(self.folder.glob(kept)):
            self._remove_created()

    def _remove_created(self) -> None:
        """Remove the folders that this process created, if no other run uses them."""
        if self._created is None:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self._remove_empty(self.folder.parent)

    def _remove_empty(self, lowest: Path) -> None:
        """Remove `lowest` and its parents that this process created, as far as they are empty."""
        if self._created is None:
            return
        with contextlib.suppress(OSError):  # other runs are in it by now
            for folder in (lowest, *lowest.parents):
                if folder.is_relative_to(self._created):
                    folder.rmdir()


def check_writable(root: Path) -> None:
    """Raise UserError if runs cannot be written below `root`. Creates nothing."""
    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"cannot write below {root} ({there} is not a folder, or read-only); pass another "
            "trainer.default_root_dir, or --run_dir"
        )
