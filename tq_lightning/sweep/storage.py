"""The storage of a study: open an Optuna URL, and tolerate outages."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from tq_lightning.errors import TrainingError, UserError, hide_password, message_of
from tq_lightning.files import expand_storage

if TYPE_CHECKING:
    import optuna

CONNECT_SECONDS = 10  # timeout for connecting to a server
OUTAGE_SECONDS = 120.0  # how long a server may be unreachable, e.g. while it restarts
LOCK_SECONDS = 60  # timeout for SQLite's write lock
PERMANENT = re.compile(r"readonly database|disk is full|no space left|read-only", re.IGNORECASE)

T = TypeVar("T")


def sqlite_url(path: Path) -> str:
    """Return the URL of a SQLite file, for any characters in its path."""
    import sqlalchemy

    url = sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)
    if sqlalchemy.make_url(url).database == str(path) and "{" not in url:
        return url
    # SQLAlchemy 2.0 does not escape, and Optuna interprets braces as a template.
    return f"sqlite:///file:{quote(str(path))}?uri=true"


def open_storage(url: str) -> "optuna.storages.BaseStorage":
    """Open a storage that several processes can use and that survives their SIGKILL.

    SQLite is the default. If a process is killed during a write, the next reader rolls back its
    transaction, and its lock is released. With Optuna's journal, an incomplete line corrupts the
    file, and the lock of a killed process remains for 30 s.

    Args:
        url: a database URL of Optuna, or journal:PATH for file systems without working SQLite
            locks.

    Raises:
        UserError: the storage can't be reached, or workers can't share it.
    """
    import optuna

    if re.fullmatch(r"sqlite(\+\w+)?://(/:memory:)?", url):
        raise UserError(
            f"{url} is an in-memory database, which workers cannot share; pass sqlite:///PATH"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        url = expand_storage(url)
        if url.startswith("journal:"):
            from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

            # Optuna's default is a symbolic link, for which Windows demands a privilege
            path = url.removeprefix("journal:")
            lock = JournalFileOpenLock(path) if os.name == "nt" else None
            return optuna.storages.JournalStorage(JournalFileBackend(path, lock))
        # create_study uses the same wrapper, which caches reads of this process
        return optuna.storages._CachedStorage(_open_database(url))
    except Exception as error:  # each driver has its own exception types
        hint = "" if url.startswith(("sqlite", "journal:")) else "start it, or "
        raise UserError(
            f"cannot open the storage {hide_password(url)}: {reason_of(error)}; "
            f"{hint}pass another --storage"
        ) from error


class StorageOutage:
    """Context manager that suppresses storage errors until an outage has lasted too long.

    Use it for actions that can be repeated. A successful action ends the outage.

    Args:
        seconds: how long an outage may last.

    Raises:
        TrainingError: the outage has lasted longer.
        UserError: the database is read-only or its disk is full, so waiting does not help.
    """

    def __init__(self, seconds: float = OUTAGE_SECONDS) -> None:
        self.seconds = seconds
        self.since: float | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        from optuna.exceptions import StorageInternalError

        if error is None:
            self.since = None
        if not isinstance(error, StorageInternalError):
            return False
        if PERMANENT.search(reason_of(error)):
            raise UserError(
                f"cannot write to the storage: {reason_of(error)}; "
                "free the disk or pass another --storage, then run the same command to resume"
            ) from error
        self.since = self.since or time.monotonic()
        if time.monotonic() - self.since > self.seconds:
            raise TrainingError(
                f"the storage has been unreachable for {self.seconds:.0f} s ({reason_of(error)}); "
                "start it and run the same command to resume"
            ) from error
        return True


def retry_during_outage(action: Callable[[], T], seconds: float = OUTAGE_SECONDS) -> T:
    """Repeat an idempotent action until it succeeds, with the errors of `StorageOutage`."""
    outage = StorageOutage(seconds)
    while True:
        with outage:
            return action()
        time.sleep(1.0)


def _open_database(url: str) -> "optuna.storages.RDBStorage":
    """Open RDBStorage with timeouts for many workers, and with atomic transactions on SQLite."""
    import sqlalchemy
    from optuna.storages import RDBStorage
    from sqlalchemy import event

    sqlite = url.startswith("sqlite")
    connect: dict[str, Any] = {"timeout": LOCK_SECONDS} if sqlite else {}
    if url.startswith("postgres"):
        connect = {"connect_timeout": CONNECT_SECONDS}
    # pool_pre_ping: a server may have dropped the connection during a long trial
    options = {"connect_args": connect, "pool_pre_ping": not sqlite}
    file = Path(sqlalchemy.make_url(url).database or "") if sqlite else Path()
    new = not file.exists()
    for attempt in range(5):
        try:
            storage = RDBStorage(url, engine_kwargs=options)
            break
        except Exception as error:
            if new and file.is_file() and file.stat().st_size == 0:  # the disk is full
                file.unlink()
            # Two commands that start at the same time may both create the tables. The slower one
            # succeeds on its next attempt.
            race = re.search(r"already exists|unique|locked", str(error), re.IGNORECASE)
            if attempt == 4 or not race:
                raise
            time.sleep(0.5)
    if sqlite:
        # Optuna claims a waiting trial with SELECT ... FOR UPDATE, which SQLite ignores, so two
        # workers could claim the same trial. Acquiring the write lock at the start of a transaction
        # makes read-then-write atomic.
        @event.listens_for(storage.engine, "connect")
        def set_manual_transactions(connection: Any, _: Any) -> None:
            connection.isolation_level = None

        @event.listens_for(storage.engine, "begin")
        def begin_immediate(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        storage.engine.dispose()  # close connections that were opened before the listeners
    return storage


def reason_of(error: BaseException, limit: int = 200) -> str:
    """Return a storage error as one line of at most `limit` characters without passwords."""
    text = re.sub(r"^\([\w.]+\)\s*", "", message_of(error.__cause__ or error))
    text = hide_password(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
