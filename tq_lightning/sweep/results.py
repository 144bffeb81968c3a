"""What a study came to: ranked tables in the terminal and as CSV, importances, and the study's plots as PNG."""

import csv
import statistics
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tq_lightning.files import atomic_write
from tq_lightning.sweep import plots
from tq_lightning.sweep import search_space as twins
from tq_lightning.sweep.config import Sweep, argument
from tq_lightning.sweep.trial_queue import TrialQueue

if TYPE_CHECKING:
    import optuna

SEED = "seed_everything"
SHOWN = 20  # rows of a table in the terminal; the CSV has all


def write_outcome(
    sweep: Sweep, queue: TrialQueue, folder: Path, console: Console | None = None
) -> None:
    """Print the ranked tables and the importances; write trials.csv, arms.csv, importances.csv and plots/*.png to `folder`."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a log has no edge to fold columns at
    trials = ranked(queue)
    names = queue.study.metric_names or ["value"]
    rows = [trial_row(sweep, trial, names) for trial in trials]
    _write_csv(folder / "trials.csv", rows)
    hidden = ("run_dir", "record", "attempt") + (
        () if any(row["reason"] for row in rows) else ("reason",)
    )
    _print(
        console,
        f"{queue.study.study_name}: trials",
        [{k: v for k, v in row.items() if k not in hidden} for row in rows],
    )
    if SEED in sweep.parameters and len(names) == 1:
        arms = arm_rows(sweep, trials, names[0], queue.study.direction.name == "MAXIMIZE")
        _write_csv(folder / "arms.csv", arms)
        _print(console, f"{queue.study.study_name}: arms over their seeds", arms)
    _importances(queue.study, folder, console, names)
    drawn = draw(sweep, queue, folder / "plots")
    console.print(f"tables and {len(drawn)} plots in {folder}", soft_wrap=True)


def ranked(queue: TrialQueue) -> list["optuna.trial.FrozenTrial"]:
    """Each point's last attempt that began: complete ones first, best (or the Pareto front) first; then the others."""
    from optuna.trial import TrialState

    study = queue.study
    trials = [t for t in queue.latest().values() if t.state != TrialState.WAITING]
    signs = [-1 if direction.name == "MAXIMIZE" else 1 for direction in study.directions]
    front = {t.number for t in study.best_trials} if len(signs) > 1 else set()

    def key(t: "optuna.trial.FrozenTrial") -> Any:
        if t.state != TrialState.COMPLETE:
            return (1, t.state != TrialState.PRUNED, [], t.number)
        return (
            0,
            t.number not in front and bool(front),
            [sign * value for sign, value in zip(signs, t.values, strict=True)],
            t.number,
        )

    return sorted(trials, key=key)


def trial_row(sweep: Sweep, trial: "optuna.trial.FrozenTrial", names: list[str]) -> dict[str, Any]:
    """One trial as a row: number, how it ended, its values, what the program got, where its run lies."""
    values = trial.values or [None] * len(names)
    row: dict[str, Any] = {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "attempt": trial.user_attrs.get("attempt", 0),
    }
    row |= dict(zip(names, values, strict=True)) | _searched(sweep, trial)
    seconds = trial.duration.total_seconds() if trial.duration is not None else None
    reason = trial.user_attrs.get("reason", "") if trial.state.name == "FAIL" else ""
    return row | {
        "seconds": seconds,
        "reason": reason,
        "run_dir": trial.user_attrs.get("run_dir"),
        "record": trial.user_attrs.get("record"),
    }


def arm_rows(
    sweep: Sweep, trials: list["optuna.trial.FrozenTrial"], name: str, maximize: bool
) -> list[dict[str, Any]]:
    """The trials that differ in nothing but the seed, as one row: mean and standard deviation (n - 1) over the seeds."""
    arms: dict[str, tuple[dict[str, Any], list[float]]] = {}
    for trial in trials:
        if trial.value is not None and trial.state.name == "COMPLETE":
            arm = {key: value for key, value in _searched(sweep, trial).items() if key != SEED}
            arms.setdefault(repr(arm), (arm, []))[1].append(trial.value)
    rows = [
        {
            f"mean {name}": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "seeds": len(values),
        }
        | arm
        for arm, values in arms.values()
    ]
    return sorted(rows, key=lambda row: row[f"mean {name}"], reverse=maximize)


def draw(sweep: Sweep, queue: TrialQueue, folder: Path) -> list[Path]:
    """Draw the study's pictures (`plots`) from its complete trials; without any there is nothing to draw."""
    from optuna.trial import TrialState

    study = queue.study
    front = {t.number for t in study.best_trials} if len(study.directions) > 1 else set()
    trials = [
        plots.Shown(t.number, tuple(t.values), _shown(sweep, t), t.number in front)
        for t in queue.trials()
        if t.state == TrialState.COMPLETE
    ]
    axes = [
        plots.Axis(key, tuple(_text(value) for value in parameter.values) or None, parameter.log)
        for key, parameter in sweep.parameters.items()
    ]
    names = study.metric_names or ["value"]
    found = [find_importances(study, position) or {} for position in range(len(names))]
    maximize = [direction.name == "MAXIMIZE" for direction in study.directions]
    return plots.draw(plots.Study(names, maximize, axes, trials, found), folder)


def _importances(study: "optuna.Study", folder: Path, console: Console, names: list[str]) -> None:
    """Print and write the parameter importances (fANOVA), where the study can tell any."""
    rows = []
    for position, name in enumerate(names):
        found = find_importances(study, position) or {}
        rows += [
            {"objective": name, "parameter": key, "importance": value}
            for key, value in found.items()
        ]
    if rows:
        _write_csv(folder / "importances.csv", rows)
        _print(console, "parameter importances (share of the variance, fANOVA)", rows)
    else:
        console.print(
            "no parameter importances: they need two different results and two values of a parameter"
        )


def find_importances(study: "optuna.Study", position: int) -> dict[str, float] | None:
    """Parameter -> importance; None where the trials don't tell (fewer than two, all equal, nothing varied)."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len({t.values[position] for t in complete}) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_param_importances(
            study, evaluator=FanovaImportanceEvaluator(seed=0), target=lambda t: t.values[position]
        )
    return found or None


def _searched(sweep: Sweep, trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    """The searched keys as the program got them; lists as text."""
    values = {
        key: twins.decode(parameter, trial.params[key])
        for key, parameter in sweep.parameters.items()
        if key in trial.params
    }
    return {
        key: value if isinstance(value, bool | int | float | str) else _text(value)
        for key, value in values.items()
    }


def _shown(sweep: Sweep, trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    """The searched keys as the pictures have them: numbers of ranges, texts of choices."""
    return {
        key: _text(value) if sweep.parameters[key].values else value
        for key, value in _searched(sweep, trial).items()
    }


def _text(value: Any) -> str:
    return argument("", value).removeprefix("--=")


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows whole or not at all; columns in the order they first come up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _print(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for column in dict.fromkeys(key for row in rows for key in row):
        name = plots.short(column.replace("val/", ""))
        table.add_column(name, overflow="fold")
    for row in rows[:SHOWN]:
        table.add_row(
            *(
                f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
                for value in row.values()
            )
        )
    console.print(table)
    if len(rows) > SHOWN:
        console.print(f"... and {len(rows) - SHOWN} more in the CSV")
