"""The study of a sweep: its options, its size, how it is created or joined, and its trial queue."""

import dataclasses
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tq_lightning.errors import UserError, hide_password
from tq_lightning.sweep.config import Sweep, grid_point, grid_size
from tq_lightning.sweep.search_space import encode, weighted_choices
from tq_lightning.sweep.storage import open_storage, reason_of
from tq_lightning.sweep.trial_queue import STALE_SECONDS, TrialQueue

if TYPE_CHECKING:
    import optuna

FIT = "tq_lightning.training.lightning_cli:run_fit"
MAX_POINTS = 100_000  # every worker reads all trials of a study before it claims one


@dataclass(frozen=True)
class Options:
    """The options of a `sweep` command, for its process and its workers.

    Attributes:
        folder: folder of trials, logs, tables and plots.
        storage: an Optuna URL, or journal:PATH.
        study_name: name of the study in the storage.
        objectives: metric -> minimize or maximize.
        file: the sweep file.
        extra: arguments of `fit` given after `--`.
        workers: worker processes of this command; 0 runs the trials in its own process.
        n_trials: number of trials of the study; None for run_cap, or the full grid.
        timeout: seconds after which this command starts no new trials.
        stale_after: heartbeat timeout in seconds.
        fit: function that runs a trial, as MODULE:NAME.
    """

    folder: Path
    storage: str
    study_name: str
    objectives: dict[str, str]
    file: str = ""
    extra: tuple[str, ...] = ()
    workers: int = 1
    n_trials: int | None = None
    timeout: float | None = None
    stale_after: float = STALE_SECONDS
    fit: str = FIT

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON types."""
        return dataclasses.asdict(self) | {"folder": str(self.folder)}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> "Options":
        """Restore the options that `to_dict` returned."""
        return cls(**given | {"folder": Path(given["folder"]), "extra": tuple(given["extra"])})


def open_study(sweep: Sweep, options: Options) -> "optuna.Study":
    """Create the study, or join it if it belongs to the same sweep.

    Raises:
        UserError: nothing ends the sweep, the storage can't be reached, or a study of this name
            has other parameters.
    """
    import optuna

    trial_limit(sweep, options)
    storage = open_storage(options.storage)
    try:
        existing = {s.study_name: s for s in storage.get_all_studies()}.get(options.study_name)
        if existing is not None:
            _check_same_sweep(existing, storage, sweep, options)
        directions: Any = list(options.objectives.values())
        study = optuna.create_study(
            storage=storage,
            study_name=options.study_name,
            directions=directions,
            load_if_exists=True,
        )
        if existing is None or "sweep" not in existing.user_attrs:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # experimental since Optuna 3.2
                study.set_metric_names(list(options.objectives))
            study.set_user_attr("file", sweep.path)
            study.set_user_attr("sweep", _identity(sweep, options))
    except optuna.exceptions.StorageInternalError as error:
        raise UserError(
            f"cannot write to the storage {hide_password(options.storage)}: {reason_of(error)}; "
            "make it writable or pass another --storage"
        ) from error
    return study


def trial_limit(sweep: Sweep, options: Options) -> int | None:
    """Return the number of points of a sweep, None if only a timeout ends it.

    Raises:
        UserError: nothing ends the sweep, or its grid is too large for a study.
    """
    cap = options.n_trials if options.n_trials is not None else sweep.run_cap
    if sweep.method == "grid":
        size = grid_size(sweep)
        points = size if cap is None else min(cap, size)
        if points > MAX_POINTS:
            raise UserError(
                f"{sweep.path}: the grid has {size:,} points, and a study holds at most "
                f"{MAX_POINTS:,} trials; remove values, or limit it with --n-trials or run_cap"
            )
        return points
    if cap is None and options.timeout is None:
        raise UserError(
            f"{sweep.path}: a {sweep.method} sweep does not end by itself; "
            "pass --n-trials or --timeout, or set run_cap"
        )
    return cap


def make_trial_queue(sweep: Sweep, study: "optuna.Study", options: Options) -> TrialQueue:
    """Return the trial queue of a sweep's study."""

    def fixed_params(point: int) -> dict[str, Any]:
        if sweep.method == "grid":
            return encode(sweep, grid_point(sweep, point))
        return weighted_choices(sweep, point)

    return TrialQueue(study, fixed_params, trial_limit(sweep, options), options.stale_after)


def _identity(sweep: Sweep, options: Options) -> dict[str, Any]:
    """Return the parts of a sweep that must be the same in all commands of a study."""
    return sweep.source | {"objectives": options.objectives}


def _check_same_sweep(
    existing: Any, storage: "optuna.storages.BaseStorage", sweep: Sweep, options: Options
) -> None:
    """Raise UserError if a study was created from another sweep."""
    where = hide_password(options.storage)
    theirs: Any = existing.user_attrs.get("sweep")
    if theirs is None:
        if storage.get_n_trials(existing._study_id):
            raise UserError(
                f"the study {options.study_name} in {where} was not created from a sweep file; "
                "pass another --study-name"
            )
        return
    mine = _identity(sweep, options)
    keys = [*mine, *(key for key in theirs if key not in mine)]
    different = [key for key in keys if json.dumps(theirs.get(key)) != json.dumps(mine.get(key))]
    if different:
        names = " and ".join("arguments after --" if key == "extra" else key for key in different)
        raise UserError(
            f"the study {options.study_name} exists in {where} with other {names} than "
            f"{sweep.path}: {_difference(theirs.get(different[0]), mine.get(different[0]))}; "
            "pass another --study-name, or the file and arguments it was created with"
        )


def _difference(theirs: Any, mine: Any) -> str:
    """Describe the first difference between two values of a sweep file."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *(key for key in mine if key not in theirs)]:
            if theirs.get(key) != mine.get(key):
                return f"{key}: {_difference(theirs.get(key), mine.get(key))}"
    return f"the study has {json.dumps(theirs)}, the file {json.dumps(mine)}"
