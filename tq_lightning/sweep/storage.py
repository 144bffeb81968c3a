"""Where a study lives: an Optuna URL -> a storage that several processes may use and that survives their SIGKILL."""

import re
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tq_lightning.errors import TrainingError, UserError, hide_password

if TYPE_CHECKING:
    import optuna

CONNECT_SECONDS = 10  # how long an unreachable server may keep the user waiting
AWAY_SECONDS = 120  # how long a server may be away, restarting say, before a running sweep gives up
LOCKED_SECONDS = 60  # how long a SQLite writer waits for the others


def open_storage(url: str) -> "optuna.storages.BaseStorage":
    """Open `url`: any database URL of Optuna's, or journal:PATH (for file systems where SQLite's locks don't hold).

    SQLite is the default: a process that is killed between two bytes leaves a transaction that the next reader rolls back,
    and its lock dies with it. Optuna's journal has neither: half a line spoils the file, and a dead holder's
    lock stays for 30 s.
    Raises UserError where the storage can't be reached.
    """
    import optuna

    if re.fullmatch(r"sqlite(\+\w+)?://(/:memory:)?", url):
        raise UserError(
            f"the storage {url} is no file: workers can't share it and it ends with them; pass sqlite:///PATH"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        if url.startswith("journal:"):
            from optuna.storages.journal import JournalFileBackend

            return optuna.storages.JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
        return optuna.storages._CachedStorage(
            _database(url)
        )  # what create_study wraps it in; one cache for all that we ask
    except (
        Exception
    ) as error:  # each driver raises its own kinds; all mean that there is no storage
        where = hide_password(url)
        raise UserError(
            f"the storage {where} can't be reached: {_first(error)}; start it or pass another --storage"
        ) from error


class StorageOutage:
    """A context that lets a storage be away: its errors are swallowed until they have lasted AWAY_SECONDS without a success.

    For what is tried again anyway. Raises TrainingError then: trials under way can't tell their results any more.
    """

    def __init__(self, seconds: float = AWAY_SECONDS) -> None:
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
        self.since = self.since or time.monotonic()
        if time.monotonic() - self.since > self.seconds:
            raise TrainingError(
                f"the storage has been away for {self.seconds:.0f} s ({_first(error)}); start it, go on with the same command"
            ) from error
        return True


def _database(url: str) -> "optuna.storages.RDBStorage":
    """RDBStorage with the waits that many workers need, and with SQLite's transactions made atomic."""
    from optuna.storages import RDBStorage
    from sqlalchemy import event

    lite = url.startswith("sqlite")
    connect: dict[str, Any] = {"timeout": LOCKED_SECONDS} if lite else {}
    if url.startswith("postgres"):
        connect = {"connect_timeout": CONNECT_SECONDS}
    options = {
        "connect_args": connect,
        "pool_pre_ping": not lite,
    }  # a server may have dropped a connection during a long trial
    for attempt in range(5):
        try:
            storage = RDBStorage(url, engine_kwargs=options)
            break
        except Exception as error:
            # two commands that start at the same moment may both create the tables; the loser finds them on its next try
            if attempt == 4 or not re.search(
                r"already exists|unique|locked", str(error), re.IGNORECASE
            ):
                raise
            time.sleep(0.5)
    if lite:
        # Optuna pops a waiting trial with SELECT ... FOR UPDATE, which SQLite ignores: two workers could get the same one.
        # Taking the write lock as a transaction begins makes read-then-write atomic.
        @event.listens_for(storage.engine, "connect")
        def manual(connection: Any, _: Any) -> None:
            connection.isolation_level = None

        @event.listens_for(storage.engine, "begin")
        def begin(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        storage.engine.dispose()  # connections made before the listeners
    return storage


def _first(error: BaseException, limit: int = 200) -> str:
    """What a storage's error says, in one line of at most `limit` characters."""
    text = re.sub(r"^\([\w.]+\)\s*", "", " ".join(str(error.__cause__ or error).split()))
    text = hide_password(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
