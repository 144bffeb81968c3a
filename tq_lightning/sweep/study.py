"""TODO sweep/study.py."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from tq_lightning.errors import UserError, hide_password
from tq_lightning.sweep import config as space
from tq_lightning.sweep import search_space as twins
from tq_lightning.sweep.storage import open_storage
from tq_lightning.sweep.trial_queue import STALE_SECONDS, TrialQueue


@dataclass(frozen=True)
class Options:
    """What the command line says besides the file. timeout in seconds; objectives: name -> goal."""

    folder: Path
    storage: str
    study_name: str
    objectives: dict[str, str]
    workers: int = 1
    n_trials: int | None = None
    timeout: float | None = None
    stale: float = STALE_SECONDS
    again: tuple[str, ...] = ()  # the arguments of this command, which make its workers
    extra: tuple[str, ...] = ()  # those after --


def open_study(sweep: space.Sweep, options: Options) -> "optuna.Study":
    """The study of this name: created, or joined where it is of the same sweep.

    Raises UserError where the sweep has no end, the storage can't be reached or a study of this name has other parameters.
    """
    import optuna

    point_count(sweep, options)
    storage = open_storage(options.storage)
    directions: Any = list(options.objectives.values())
    mine, where = sweep.source | {"objectives": options.objectives}, hide_password(options.storage)
    existing = {s.study_name: s for s in storage.get_all_studies()}.get(options.study_name)
    if existing is not None:
        theirs: Any = existing.user_attrs.get("sweep")
        if theirs is None and storage.get_n_trials(existing._study_id):
            raise UserError(
                f"the study {options.study_name} in {where} is not one of a sweep file's; pass another --study-name"
            )
        both = [] if theirs is None else [*mine, *(key for key in theirs if key not in mine)]
        different = [
            key for key in both if json.dumps(theirs.get(key)) != json.dumps(mine.get(key))
        ]
        if different:
            names = " and ".join(
                "arguments after --" if key == "extra" else key for key in different
            )
            raise UserError(
                f"the study {options.study_name} exists in {where} with other {names} than {sweep.path}: "
                f"{_difference(theirs.get(different[0]), mine.get(different[0]))}; "
                "pass another --study-name, or what it was begun with"
            )
    study = optuna.create_study(
        storage=storage, study_name=options.study_name, directions=directions, load_if_exists=True
    )
    if existing is None or "sweep" not in existing.user_attrs:
        with warnings.catch_warnings():  # "experimental" since 3.2
            warnings.simplefilter("ignore")
            study.set_metric_names(list(options.objectives))
        study.set_user_attr("file", sweep.path)
        study.set_user_attr("sweep", mine)
    return study


def point_count(sweep: space.Sweep, options: Options) -> int | None:
    """How many points the sweep has: a grid its own, random and bayes as many as --n-trials or run_cap say; None: no end.

    Raises UserError where neither a count nor a timeout ends the sweep.
    """
    cap = options.n_trials if options.n_trials is not None else sweep.run_cap
    if sweep.method == "grid":
        points = len(space.grid(sweep))
        return points if cap is None else min(cap, points)
    if cap is None and options.timeout is None:
        raise UserError(
            f"{sweep.path}: a {sweep.method} sweep has no end of its own; pass --n-trials or --timeout, or give run_cap"
        )
    return cap


def make_trial_queue(sweep: space.Sweep, study: "optuna.Study", options: Options) -> TrialQueue:
    """The ledger of a sweep: a grid's points are fixed, those of random and bayes are drawn when their turn comes."""
    points = space.grid(sweep) if sweep.method == "grid" else None

    def fixed(point: int) -> dict[str, Any]:
        return twins.fixed(sweep, point) if points is None else twins.encode(sweep, points[point])

    return TrialQueue(study, fixed, point_count(sweep, options), options.stale)


def _difference(theirs: Any, mine: Any) -> str:
    """The first difference between two values of a sweep file, in words."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *(key for key in mine if key not in theirs)]:
            if theirs.get(key) != mine.get(key):
                return f"{key}: {_difference(theirs.get(key), mine.get(key))}"
    return f"the study has {json.dumps(theirs)}, the file {json.dumps(mine)}"
