"""Find record files in folders, globs, Optuna studies and W&B run folders."""

import glob
import os
import re
import sqlite3
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tq_lightning.errors import UserError, first_line, hide_password
from tq_lightning.files import expand_path, expand_storage, is_temporary
from tq_lightning.records import NAME
from tq_lightning.records.publish import printable

MAX_SNIFF = 64 * 2**20  # bytes; an inspect record is far smaller, so larger files are not opened
SWEEP_STUDY = "study.db"  # the study of a sweep, in its folder
URL = re.compile(r"^(sqlite|postgresql|mysql|mariadb|oracle|mssql)(\+\w+)?://")


@dataclass(frozen=True)
class Candidate:
    """A possible record file, its path as printed, and the reason not to use it."""

    path: Path
    shown: str
    refusal: str | None = None


def find(inputs: list[str]) -> list[Candidate]:
    """Return every candidate under `inputs` once (symbolic links resolved), in a stable order.

    Raises:
        UserError: an input does not exist or has no record.
    """
    found: dict[str, Candidate] = {}
    for candidate in (candidate for given in inputs for candidate in _expand(given)):
        key = str(candidate.path.resolve()) if candidate.path.name else candidate.shown
        # A study lists pruned trials, so its refusal takes precedence over the folder.
        if key not in found or (candidate.refusal and not found[key].refusal):
            found[key] = candidate
    return list(found.values())


def _expand(given: str) -> list[Candidate]:
    if URL.match(given):
        storage = expand_storage(given)
        file = storage.removeprefix("sqlite:///")
        if file != storage and not Path(file).exists():  # a sweep escapes special characters
            storage = f"sqlite:///{unquote(re.sub(r'^file:|[?]uri=true$', '', file))}"
        return _from_study(storage, None)
    given = str(expand_path(given.removeprefix("journal:")))  # as `sweep --storage` writes it
    if Path(given).exists():
        return _from_path(Path(given))
    matches = sorted(glob.glob(given, recursive=True))
    out: list[Candidate] = []
    none = "the pattern matches no" if glob.has_magic(given) else "no such"
    kinds = "run folders, record.json files, a glob or an Optuna study"
    last = f"{none} file or folder; pass {kinds}"
    for match in matches:  # files without a record are skipped, unless no match has one
        try:
            out += _from_path(Path(match))
        except UserError as error:
            last = f"none of the {len(matches)} matches has a record.json; the last: {error}"
    if not out:
        raise UserError(f"{printable(given)}: {last}")
    return out


def _from_path(path: Path) -> list[Candidate]:
    name = shown(path)
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise UserError(f"{name}: not a regular file")
    if path.suffix == ".json":
        return [Candidate(path, name)]
    try:
        with path.open("rb") as file:
            line = file.readline(2**20)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error
    if line.startswith(b"SQLite format 3"):
        return _from_study(f"sqlite:///{path}", path)
    if line.startswith(b"{") and b'"op_code":' in line:
        return _from_study(str(path), path)
    raise UserError(f"{name}: neither a JSON record nor an Optuna study (journal or SQLite file)")


def _from_folder(folder: Path) -> list[Candidate]:
    """Find `record.json` at any depth (W&B keeps it in files/), and inspect records by content."""
    out: list[Candidate] = []
    seen = 0
    for where, folders, files in os.walk(folder):
        skipped = {f for f in folders if is_temporary(f) or Path(where, f, "report.json").exists()}
        folders[:] = sorted({*folders} - skipped - {"checkpoints"})
        seen += len(files)
        for path in (Path(where) / name for name in sorted({*files, *({NAME} & {*folders})})):
            if path.name == NAME or (path.suffix == ".json" and _looks_like_inspect(path)):
                out.append(Candidate(path, shown(path)))
        # The record of a pruned trial has the status "finished", like one that stopped early.
        if SWEEP_STUDY in files:
            study = Path(where) / SWEEP_STUDY
            with suppress(UserError):  # an unreadable study excludes nothing
                out += [c for c in _from_study(f"sqlite:///{study}", study) if c.refusal]
    if not out:
        what = f"no record.json among its {seen} files" if seen else "the folder is empty"
        raise UserError(f"{shown(folder)}: {what}; pass a folder of runs or a study file")
    return out


def _looks_like_inspect(path: Path) -> bool:
    try:
        fits = path.is_file() and path.stat().st_size <= MAX_SNIFF
        return fits and re.search(rb'"kind"\s*:\s*"inspect"', path.read_bytes()) is not None
    except OSError:
        return False


def _from_study(storage: str, path: Path | None) -> list[Candidate]:
    """List the trials of every study in a storage. Their attribute "record" is the path."""
    if storage.startswith("sqlite:///") and not Path(storage.removeprefix("sqlite:///")).exists():
        raise UserError(f"{storage}: no such SQLite file; pass the storage of the sweep")
    name = shown(path) if path else hide_password(storage)
    try:
        trials = _trials(storage)
    except Exception as error:  # Optuna and its drivers raise many exception types
        reason = first_line(error.__cause__ or error).strip()  # Optuna's message has no reason
        raise UserError(f"{name}: not readable as an Optuna study: {reason}") from error
    out = [_from_trial(f"{name}, study {s}, trial {t.number}", t, path) for s, t in trials]
    if any(candidate.path.name for candidate in out):
        return out
    raise UserError(f"{name}: none of the {len(out)} trials has a record (user attribute 'record')")


def _trials(storage: str) -> list[tuple[str, Any]]:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Optuna would create its tables in any database; reading must not write.
    open_database = partial(optuna.storages.RDBStorage, skip_table_creation=True)
    if storage.startswith("sqlite:///"):
        path = storage.removeprefix("sqlite:///")  # a path with "?" is not valid in a URL
        engine = {"creator": lambda: sqlite3.connect(path)}
        backend: Any = open_database("sqlite://", engine_kwargs=engine)
    elif "://" in storage:
        backend = open_database(storage)
    else:
        backend = optuna.storages.JournalStorage(JournalFileBackend(storage))
    names = optuna.get_all_study_names(backend)
    studies = {name: optuna.load_study(study_name=name, storage=backend) for name in names}
    return [(n, trial) for n, s in studies.items() for trial in s.get_trials(deepcopy=False)]


def _from_trial(name: str, trial: Any, study_file: Path | None) -> Candidate:
    """Find the record of a trial, even if the study and its records were moved together."""
    state = trial.state.name.lower()
    given = trial.user_attrs.get("record")
    if not given:
        return Candidate(Path(), name, f"the trial ({state}) has no record")
    path = Path(given)
    if not path.exists() and study_file is not None:
        parts = path.parts[int(path.is_absolute()) :]
        tails = (study_file.parent.joinpath(*parts[i:]) for i in range(len(parts) - 1))
        path = next((tail for tail in tails if tail.exists()), path)
    if not path.exists():
        reason = f"the trial ({state}) points to {shown(path)}, which does not exist"
        return Candidate(path, name, reason)
    refusal = None if state == "complete" else f"{name}: the trial is {state}, not complete"
    return Candidate(path, shown(path), refusal)


def shown(path: Path) -> str:
    """Return a path as printed: relative if below the current folder, else its last three parts."""
    if path.is_absolute() or ".." in path.parts:
        try:
            path = path.resolve().relative_to(Path.cwd().resolve())
        except ValueError:
            path = Path("…", *path.resolve().parts[1:][-3:])
    return printable(str(path))
