"""RunLock: at most one process writes a run folder, on one machine or on several that share it.

Three mechanisms, each for the cases that the one before does not cover:

1. A POSIX record lock (`fcntl.lockf`) on RUN/.lock. The kernel, or the NFS server, frees it when
   its holder dies. Forked data loader workers do not inherit it.
2. The file names its holder: host, process and SLURM job. If the file system has no locks or keeps
   them to one host (NFS mounted with `nolock` or `local_lock`, Lustre with `localflock`), a holder
   on this host is looked up by its process id. A holder on another host touches the file every
   `BEAT_SECONDS`, and the file is free if it stands still for `STALE_SECONDS`. The newcomer watches
   it, so no clocks are compared.
3. SLURM starts a requeued job after the earlier attempt has ended or its node was given up. A lock
   of the same job with a lower restart count is taken over at once. If that node comes back, the
   old holder notices at its next heartbeat and ends.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.training.cluster import slurm_job

try:
    import fcntl
except ImportError:  # Windows: process ids and heartbeats alone
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
BEAT_SECONDS = 5.0
STALE_SECONDS = 30.0
_LOCAL_LOCKS = {"nolock", "local_lock=all", "local_lock=posix", "localflock"}  # mount options


class RunLock:
    """The exclusive right to write a run folder, until `release` or the end of the process.

    Args:
        folder: the run folder; it is created if it does not exist.

    Raises:
        UserError: another process writes it, or the folder can't be created.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is not a folder; pass another --run_dir")
        self.path = folder / NAME
        self._token = secrets.token_hex(8)
        self._ended = threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._acquire()
        except OSError as error:
            raise UserError(f"cannot write in {folder} ({error.strerror or error})") from error
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def _acquire(self) -> int:
        """Open and lock the file; returns its handle."""
        until = time.monotonic() + 2.0
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                reach, holder = _try_lock(handle), _read(handle)
                if reach is None and holder is None and time.monotonic() < until:
                    os.close(handle)  # its holder is about to write its name, or to remove the file
                    time.sleep(0.1)
                    continue
                earlier = holder is not None and _earlier_attempt(holder)
                if reach is None and not earlier:
                    raise UserError(_refusal(self.path.parent, holder or {}))
                if reach == _THIS_HOST and holder and not earlier and _alive(self.path, holder):
                    raise UserError(_refusal(self.path.parent, holder))
                if (
                    reach is None
                ):  # of an attempt whose node was given up: the server still keeps it
                    os.close(handle)
                    handle = self._replace()
                if self._is_current(handle):
                    try:
                        self._write(handle)
                    except OSError:  # a full disk
                        self.path.unlink(missing_ok=True)
                        raise
                    return handle
                os.close(handle)  # its holder removed it in between
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(handle)
                raise

    def _replace(self) -> int:
        """Put a new, locked file in the place of one that is locked; returns its handle."""
        fresh = self.path.with_name(f"{NAME}.{self._token[:8]}.tmp")
        handle = os.open(fresh, os.O_RDWR | os.O_CREAT, 0o644)
        _try_lock(handle)
        os.replace(fresh, self.path)
        return handle

    def _is_current(self, handle: int) -> bool:
        """Return True if RUN/.lock is still the file behind `handle`."""
        try:
            return os.path.samestat(os.fstat(handle), self.path.stat())
        except FileNotFoundError:
            return False

    def _write(self, handle: int) -> None:
        holder = {"token": self._token, "host": socket.gethostname(), "pid": os.getpid()}
        job, restarts = slurm_job()
        text = json.dumps(holder | {"job": job, "restarts": restarts}).encode()
        os.ftruncate(handle, 0)
        os.pwrite(handle, text, 0)
        os.fsync(handle)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                # by the open handle: closing a second one would drop the lock
                ours = (_read(self._file) or {}).get("token") == self._token
                if (not ours or not self._is_current(self._file)) and not self._ended.is_set():
                    print(
                        f"error: {self.path.parent} was taken over by another process",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)
                os.utime(self.path)
            except OSError:  # the file system is away for a moment
                continue

    def release(self) -> None:
        """Remove the lock file, if it is still ours, and let go of the lock."""
        if self._ended.is_set():
            return
        self._ended.set()
        with contextlib.suppress(OSError):
            if self._is_current(self._file):
                self.path.unlink()
        os.close(self._file)


_EVERYWHERE, _THIS_HOST = "everywhere", "this host"


def _try_lock(handle: int) -> str | None:
    """Lock `handle`. Returns how far the lock reaches, or None if another process has it."""
    if fcntl is None:
        return _THIS_HOST
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return None
    except OSError:  # no locks on this file system
        return _THIS_HOST
    return _THIS_HOST if _LOCAL_LOCKS & _mount_options(handle) else _EVERYWHERE


def _mount_options(handle: int) -> set[str]:
    """Return the mount options of an open file's file system; empty without Linux's /proc."""
    device = os.fstat(handle).st_dev
    number = f"{os.major(device)}:{os.minor(device)}" if hasattr(os, "major") else ""
    options: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[2] == number:
                options |= {*fields[5].split(","), *fields[-1].split(",")}
    return options


def _read(handle: int) -> dict[str, Any] | None:
    """The holder named in a lock file; None if it is empty or half written."""
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None


def _earlier_attempt(holder: dict[str, Any]) -> bool:
    """Return True for the lock of an earlier attempt of this SLURM job, which has ended."""
    job, restarts = slurm_job()
    return job is not None and holder.get("job") == job and holder.get("restarts", 0) < restarts


def _alive(path: Path, holder: dict[str, Any]) -> bool:
    """Return True if a holder lives: by its process on this host, by its heartbeat elsewhere."""
    if holder.get("host") == socket.gethostname():
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            return True
        return int(holder["pid"]) != os.getpid()
    before, until = path.stat().st_mtime_ns, time.monotonic() + STALE_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, STALE_SECONDS / 5))
        try:
            if path.stat().st_mtime_ns != before:
                return True
        except FileNotFoundError:  # released
            return False
    return False


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'another host')}"
    if holder.get("job"):
        who += f" (SLURM job {holder['job']})"
    return f"{folder} is in use by {who}; wait for it to end, or pass another --run_dir"
