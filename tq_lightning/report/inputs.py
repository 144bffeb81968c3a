"""Where records lie: folders, globs, single files, Optuna studies, W&B run folders -> files to read.

Only paths are dealt with here; `records` reads and judges what the files hold.
"""

import glob
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tq_lightning.errors import UserError, first_line, hide_password

MAX_SNIFF = (
    64 * 2**20
)  # bytes; an inspect record is far smaller, so a bigger stray .json file is not opened
JOURNAL = "journal:"
SWEEP_STUDY = "study.db"  # where `sweep` keeps its study, in the sweep's folder
URL = re.compile(r"^(sqlite|postgresql|mysql|mariadb|oracle|mssql)(\+\w+)?://")


@dataclass(frozen=True)
class Candidate:
    """A file that should hold a record. `shown` is the path as printed; `refusal` says why it must not be used."""

    path: Path
    shown: str
    refusal: str | None = None


def find(inputs: list[str]) -> list[Candidate]:
    """Every candidate file under `inputs`, each file once (symbolic links resolved), in a stable order.

    Raises `UserError` for an input that does not exist or holds nothing of ours.
    """
    found: dict[str, Candidate] = {}
    for given in inputs:
        for candidate in _expand(given):
            key = str(candidate.path.resolve()) if candidate.path.name else candidate.shown
            # A study knows more than the folder (a trial that was pruned): its refusal wins.
            if key not in found or (candidate.refusal and not found[key].refusal):
                found[key] = candidate
    return list(found.values())


def _expand(given: str) -> list[Candidate]:
    if URL.match(given):
        return _from_study(given, None)
    if given.startswith(JOURNAL):  # as `sweep --storage` writes it
        given = given.removeprefix(JOURNAL)
    if Path(given).exists():
        return _from_path(Path(given))
    matches = sorted(glob.glob(given, recursive=True)) if glob.has_magic(given) else []
    if glob.has_magic(given) and not matches:
        raise UserError(
            f"{given}: the pattern matches no file or folder; pass run folders, record.json files or a study"
        )
    if not matches:
        raise UserError(
            f"{given}: no such file or folder; pass run folders, record.json files, a glob or an Optuna study"
        )
    # A glob may sweep up side files (runs/*): what holds no record is skipped, unless nothing holds one.
    out: list[Candidate] = []
    last: UserError | None = None
    for match in matches:
        try:
            out += _from_path(Path(match))
        except UserError as error:
            last = error
    if not out and last:
        raise UserError(
            f"{given}: none of the {len(matches)} matches holds a record.json; the last: {last}"
        )
    return out


def _from_path(path: Path) -> list[Candidate]:
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".json":
        return [Candidate(path, shown(path))]
    if _is_sqlite(path):
        return _from_study(f"sqlite:///{path}", path)
    if _is_journal(path):
        return _from_study(str(path), path)
    raise UserError(f"{path}: neither a JSON record nor an Optuna study (journal or SQLite file)")


def _from_folder(folder: Path) -> list[Candidate]:
    """`record.json` at any depth (a W&B run folder keeps it in files/), and inspect records under any name."""
    out: list[Candidate] = []
    seen = 0
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(
            f
            for f in folders
            if not (Path(where) / f / "report.json").exists() and f != "checkpoints"
        )
        seen += len(files)
        for name in sorted(files):
            path = Path(where) / name
            if name == "record.json" or (name.endswith(".json") and _looks_like_inspect(path)):
                out.append(Candidate(path, shown(path)))
        # The study knows which trials were pruned: their records say "finished", as those of runs that stopped early do.
        if SWEEP_STUDY in files and _is_sqlite(study := Path(where) / SWEEP_STUDY):
            out += _verdicts_of(study)
    if not out:
        what = f"no record.json among its {seen} files" if seen else "the folder is empty"
        raise UserError(
            f"{folder}: {what}; pass a folder of runs (each writes record.json at its end) or a study file"
        )
    return out


def _looks_like_inspect(path: Path) -> bool:
    try:
        if path.stat().st_size > MAX_SNIFF:
            return False
        return re.search(rb'"kind"\s*:\s*"inspect"', path.read_bytes()) is not None
    except OSError:
        return False


def _is_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(15) == b"SQLite format 3"


def _is_journal(path: Path) -> bool:
    with path.open("rb") as file:
        line = file.readline(2**20)
    try:
        return "op_code" in json.loads(line)
    except (ValueError, TypeError):
        return False


def _from_study(storage: str, path: Path | None) -> list[Candidate]:
    """The trials of every study of a storage; each trial's user attribute "record" is the path of its record.json."""
    if storage.startswith("sqlite:///") and not Path(storage.removeprefix("sqlite:///")).exists():
        raise UserError(f"{storage}: no such SQLite file; pass the storage the sweep was run with")
    name = shown(path) if path else hide_password(storage)
    try:
        trials = _trials(storage)
    except (
        Exception
    ) as error:  # Optuna and its drivers raise many kinds; each means: this storage can't be read
        reason = first_line(error)
        raise UserError(f"{name}: not readable as an Optuna study: {reason}") from error
    out = [
        _from_trial(f"{name}, study {study}, trial {trial.number}", trial, path)
        for study, trial in trials
    ]
    if not any(candidate.path.name for candidate in out):
        raise UserError(
            f"{name}: none of the study's {len(out)} trials points to a record (user attribute 'record')"
        )
    return out


def _verdicts_of(study: Path) -> list[Candidate]:
    """What a study file that lies among the records refuses; none where it can't be read: it was not asked for by name."""
    try:
        return [
            candidate for candidate in _from_study(f"sqlite:///{study}", study) if candidate.refusal
        ]
    except UserError:
        return []


def _trials(storage: str) -> list[tuple[str, Any]]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in storage:
        # Reading must not write: by default Optuna would add its tables to whatever database it is shown.
        backend: Any = optuna.storages.RDBStorage(storage, skip_table_creation=True)
    else:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        backend = JournalStorage(JournalFileBackend(storage))
    names = optuna.get_all_study_names(backend)
    return [
        (n, t)
        for n in names
        for t in optuna.load_study(study_name=n, storage=backend).get_trials(deepcopy=False)
    ]


def _from_trial(name: str, trial: Any, study_file: Path | None) -> Candidate:
    """A trial's record; a path that is not there is looked for beside the study, whose folder may have been moved."""
    state = trial.state.name.lower()
    given = trial.user_attrs.get("record")
    if not given:
        return Candidate(Path(), name, f"the trial ({state}) has no record")
    path = Path(given)
    if not path.exists() and study_file is not None:
        tails = (
            study_file.parent.joinpath(*path.parts[i:])
            for i in range(int(path.is_absolute()), len(path.parts) - 1)
        )
        path = next((tail for tail in tails if tail.exists()), path)
    if not path.exists():
        return Candidate(
            path, name, f"the trial ({state}) points to {shown(path)}, which does not exist"
        )
    return Candidate(
        path,
        shown(path),
        None if state == "complete" else f"{name}: the trial is {state}, not complete",
    )


def shown(path: Path) -> str:
    """The path as the report prints it: from here where it lies below, else its last three parts."""
    if not path.is_absolute() and ".." not in path.parts:
        return str(path)
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(Path("…", *path.resolve().parts[1:][-3:]))
