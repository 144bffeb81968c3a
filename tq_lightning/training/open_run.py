"""OpenRun: the folder of a run while a verb works in it."""

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
        UserError: another process writes it, or it can't be created.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        self._created = missing[-1] if missing else None  # the topmost folder made here
        try:
            self._lock = RunLock(folder)
        except UserError:
            self._remove_created()
            raise

    def close(self, error: BaseException | None) -> None:
        """Unlock the folder, and remove it if it was made for a run that never began.

        Args:
            error: what ended the verb. After a UserError, a folder that holds only a record is
                removed.
        """
        self._lock.release()
        kept = "*" if error is None else "checkpoints/*" if isinstance(error, UserError) else NAME
        if not any(self.folder.glob(kept)):
            self._remove_created()

    def _remove_created(self) -> None:
        """Remove the run folder, and those above it, as far as this process created them."""
        if self._created is None:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # other runs are in it by now
            for folder in self.folder.parents:
                if folder.is_relative_to(self._created):
                    folder.rmdir()


def check_writable(root: Path) -> None:
    """Raise UserError if no run can be written below `root`, without creating anything."""
    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"cannot write below {root} ({there} is not a folder, or read-only); pass another "
            "trainer.default_root_dir, or --run_dir"
        )
