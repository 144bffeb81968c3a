"""RunLock: at most one process writes a run folder, on one machine or on several that share it.

It uses three mechanisms, each for cases that the previous one does not cover:

1. A POSIX record lock (`fcntl.lockf`) on RUN/.lock. The kernel, or the NFS server, releases it when
   its holder dies. Forked data loader workers do not inherit it. Windows locks one byte behind the
   text (`msvcrt.locking`), because other processes can't read locked bytes there.
2. The file names its holder: host, process and SLURM job. Some file systems have no locks or keep
   them local to a host (NFS mounted with `nolock` or `local_lock`, Lustre with `localflock`). On
   these, a holder on this host is looked up by its process id, except on Windows. Any other holder
   touches the file every `BEAT_SECONDS`; it is considered dead if the file does not change for
   `STALE_SECONDS`. The new process watches the file during that time, so no clocks are compared.
3. SLURM starts a requeued job after the earlier attempt has ended or its node has failed. A lock
   of the same job with a lower restart count is taken over at once. If that node comes back, the
   old holder notices at its next heartbeat and exits.
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
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
BEAT_SECONDS = 5.0
STALE_SECONDS = 30.0
_MAX_BYTES = 4096  # of the text in the file
_LOCAL_LOCKS = {"nolock", "local_lock=all", "local_lock=posix", "localflock"}  # mount options


class RunLock:
    """Exclusive lock on a run folder, until `release` or the end of the process.

    Args:
        folder: the run folder; it is created if it does not exist.

    Raises:
        UserError: another process holds the lock, or the folder can't be created.
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
        """Open and lock the file. Return its handle."""
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
                    raise UserError(_locked_message(self.path.parent, holder or {}))
                if reach == _THIS_HOST and holder and not earlier and _alive(self.path, holder):
                    raise UserError(_locked_message(self.path.parent, holder))
                if reach is None:
                    # the lock of an attempt on a failed node, which the NFS server still keeps
                    os.close(handle)
                    handle = self._replace()
                if self._is_current(handle):
                    break
                os.close(handle)  # the holder removed the file in the meantime
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(handle)
                raise
        try:
            self._write(handle)
        except BaseException:  # a full disk, a signal
            self._remove(handle)
            raise
        return handle

    def _replace(self) -> int:
        """Replace a locked file by a new one that this process locks. Return its handle."""
        fresh = self.path.with_name(f"{NAME}.{self._token[:8]}.tmp")
        handle = os.open(fresh, os.O_RDWR | os.O_CREAT, 0o644)
        _try_lock(handle)
        os.replace(fresh, self.path)
        return handle

    def _is_current(self, handle: int) -> bool:
        """Return True if RUN/.lock is still the file behind `handle`."""
        if fcntl is None:  # Windows keeps open files in place
            return True
        try:
            return os.path.samestat(os.fstat(handle), self.path.stat())
        except FileNotFoundError:
            return False

    def _write(self, handle: int) -> None:
        holder = {"token": self._token, "host": socket.gethostname(), "pid": os.getpid()}
        job, restarts = slurm_job()
        text = json.dumps(holder | {"job": job, "restarts": restarts}).encode()
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, text)
        os.fsync(handle)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                # reads the open handle: closing a second handle would release the lock
                ours = (_read(self._file) or {}).get("token") == self._token
                if (not ours or not self._is_current(self._file)) and not self._ended.is_set():
                    print(
                        f"error: {self.path.parent} was taken over by another process",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)
                os.utime(self.path)
            except OSError:  # the file system is temporarily unavailable
                continue

    def release(self) -> None:
        """Remove the lock file, if this process still holds it, and release the lock."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._remove(self._file)

    def _remove(self, handle: int) -> None:
        """Close `handle`, and remove the lock file if it is still the one behind it."""
        current = False
        with contextlib.suppress(OSError):
            current = self._is_current(handle)
            if current and fcntl is not None:  # another process could lock a closed file
                self.path.unlink()
        os.close(handle)
        if current and fcntl is None:  # Windows can't remove an open file
            with contextlib.suppress(OSError):
                self.path.unlink()


_EVERYWHERE, _THIS_HOST = "everywhere", "this host"


def _try_lock(handle: int) -> str | None:
    """Lock `handle`. Return the scope of the lock, or None if another process holds it."""
    try:
        if fcntl is not None:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(handle, _MAX_BYTES, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except (BlockingIOError, PermissionError):
        return None
    except OSError:  # no locks on this file system
        return _THIS_HOST
    return _THIS_HOST if _LOCAL_LOCKS & _mount_options(handle) else _EVERYWHERE


def _mount_options(handle: int) -> set[str]:
    """Return the mount options of the file system of `handle`; empty without Linux's /proc."""
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
    """Return the holder named in a lock file; None if the file is empty or partly written."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        holder = json.loads(os.read(handle, _MAX_BYTES))
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None


def _earlier_attempt(holder: dict[str, Any]) -> bool:
    """Return True if the holder is an earlier, ended attempt of this SLURM job."""
    job, restarts = slurm_job()
    return job is not None and holder.get("job") == job and holder.get("restarts", 0) < restarts


def _alive(path: Path, holder: dict[str, Any]) -> bool:
    """Return True if a holder is alive, by its process id or by its heartbeat."""
    # os.kill ends a process on Windows
    if holder.get("host") == socket.gethostname() and fcntl is not None:
        try:
            os.kill(int(holder["pid"]), 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # a process of another user
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


def _locked_message(folder: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', 'another host')}"
    if holder.get("job"):
        who += f" (SLURM job {holder['job']})"
    return f"{folder} is in use by {who}; wait for it to end, or pass another --run_dir"
