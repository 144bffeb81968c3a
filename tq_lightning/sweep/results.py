"""Results of a study: ranked tables in the terminal and as CSV, parameter importances, plots."""

import csv
import statistics
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tq_lightning.files import atomic_write
from tq_lightning.sweep import plots
from tq_lightning.sweep.config import Sweep
from tq_lightning.sweep.parameters import format_argument
from tq_lightning.sweep.search_space import decode
from tq_lightning.sweep.trial_queue import TrialQueue

if TYPE_CHECKING:
    import optuna

SEED = "seed_everything"
MAX_ROWS = 20  # rows of a table in the terminal; the CSV has all rows


def write_results(
    sweep: Sweep, queue: TrialQueue, folder: Path, console: Console | None = None
) -> None:
    """Print the ranked tables; write trials.csv, arms.csv, importances.csv and plots/*.png.

    Args:
        sweep: the sweep file.
        queue: the trial queue of its study.
        folder: folder of the files.
        console: console to print to; None is the terminal.
    """
    console = console or Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160  # for log files
    study, trials = queue.study, ranked(queue)
    names = study.metric_names or ["value"]
    seconds = {point: _seconds(attempts) for point, attempts in queue.attempts().items()}
    rows = [trial_row(sweep, t, names, seconds[t.user_attrs["point"]]) for t in trials]
    _write_csv(folder / "trials.csv", rows)
    hidden = ("run_dir", "record", "attempt")
    shown = [{key: value for key, value in row.items() if key not in hidden} for row in rows]
    _print(console, f"{study.study_name}: trials", shown)
    if SEED in sweep.parameters and len(names) == 1:
        arms = arm_rows(sweep, trials, names[0], study.direction.name == "MAXIMIZE")
        _write_csv(folder / "arms.csv", arms)
        _print(console, f"{study.study_name}: arms (configurations without the seed)", arms)
    importances = [importances_of(study, i) for i in range(len(names))]
    found = [
        {"objective": name, "parameter": key, "importance": value}
        for name, shares in zip(names, importances, strict=True)
        for key, value in shares.items()
    ]
    if found:
        _write_csv(folder / "importances.csv", found)
        _print(console, "parameter importances (share of the variance, fANOVA)", found)
    else:
        console.print(
            "no parameter importances: they need two different results and a varying parameter"
        )
    drawn = plots.draw(study, folder / "plots", importances)
    console.print(f"tables and {len(drawn)} plots in {folder}", soft_wrap=True, markup=False)


def ranked(queue: TrialQueue) -> list["optuna.trial.FrozenTrial"]:
    """Return the last started attempt at each point, best first.

    Complete trials come first, then pruned trials, then all others. With several objectives, the
    trials on the Pareto front come first.
    """
    from optuna.trial import TrialState

    study = queue.study
    trials = [t for t in queue.last_attempts().values() if t.state != TrialState.WAITING]
    signs = [-1 if direction.name == "MAXIMIZE" else 1 for direction in study.directions]
    front = {t.number for t in study.best_trials} if len(signs) > 1 else set()

    def key(t: "optuna.trial.FrozenTrial") -> Any:
        if t.state != TrialState.COMPLETE:
            return (1, t.state != TrialState.PRUNED, [], t.number)
        values = [sign * value for sign, value in zip(signs, t.values, strict=True)]
        return (0, bool(front) and t.number not in front, values, t.number)

    return sorted(trials, key=key)


def trial_row(
    sweep: Sweep, trial: "optuna.trial.FrozenTrial", names: list[str], seconds: float | None
) -> dict[str, Any]:
    """Return a trial as a row: its state, values, parameters and files.

    Args:
        sweep: the sweep file.
        trial: the last attempt at a point.
        names: names of the objectives.
        seconds: duration of all attempts together.
    """
    values = trial.values or [None] * len(names)
    row = {
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "attempt": trial.user_attrs.get("attempt", 0),
    }
    return {
        **row,
        **dict(zip(names, values, strict=True)),
        **_searched(sweep, trial),
        "seconds": seconds,
        "reason": trial.user_attrs.get("reason", "") if trial.state.name == "FAIL" else "",
        "run_dir": trial.user_attrs.get("run_dir"),
        "record": trial.user_attrs.get("record"),
    }


def arm_rows(
    sweep: Sweep, trials: list["optuna.trial.FrozenTrial"], name: str, maximize: bool
) -> list[dict[str, Any]]:
    """Return one row per arm, a configuration without its seed.

    Each row has the mean and the sample standard deviation (n - 1) of the objective `name`.
    """
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
            **arm,
        }
        for arm, values in arms.values()
    ]
    return sorted(rows, key=lambda row: row[f"mean {name}"], reverse=maximize)


def importances_of(study: "optuna.Study", objective: int) -> dict[str, float]:
    """Return {parameter: share of the variance of an objective} (fANOVA).

    The dict is empty with fewer than two different values, or if no parameter varies.
    """
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len({t.values[objective] for t in complete}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_param_importances(
            study, evaluator=FanovaImportanceEvaluator(seed=0), target=lambda t: t.values[objective]
        )


def _seconds(attempts: list["optuna.trial.FrozenTrial"]) -> float | None:
    """Return the total seconds of the attempts at a point."""
    ended = [t.duration.total_seconds() for t in attempts if t.duration is not None]
    return sum(ended) if ended else None


def _searched(sweep: Sweep, trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    """Return the searched keys with the values passed to `fit`; lists and mappings as text."""
    values = {
        key: decode(parameter, trial.params[key])
        for key, parameter in sweep.parameters.items()
        if key in trial.params
    }
    return {
        key: value
        if isinstance(value, bool | int | float | str)
        else format_argument("", value).removeprefix("--=")
        for key, value in values.items()
    }


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows; the columns are in the order of their first appearance."""
    columns = dict.fromkeys(key for row in rows for key in row)
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _print(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table that fits the terminal, and the reasons of failed trials below it.

    Columns that do not fit are omitted and listed below the table: seconds and states first, then
    searched keys, starting with the last. Cells are never wrapped. Text is printed literally.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "reason"))
    optional: list[str] = [key for key in ("seconds", "state") if key in columns]
    optional += [key for key in reversed(columns[2:]) if key not in optional]
    cells = {key: [_short(key), *(_cell(row.get(key)) for row in rows)] for key in columns}
    hidden: list[str] = []
    while sum(max(map(len, cells[key])) + 3 for key in columns) > console.width and optional:
        hidden.append(optional.pop(0))
        columns.remove(hidden[-1])
    if not rows:
        return
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD)
    for key in columns:
        table.add_column(Text(_short(key)), no_wrap=True)
    for i in range(1, min(len(rows), MAX_ROWS) + 1):
        table.add_row(*(Text(cells[key][i]) for key in columns))
    console.print(table)
    if len(rows) > MAX_ROWS:
        console.print(f"... and {len(rows) - MAX_ROWS} more in the CSV")
    if hidden:
        console.print(f"not shown, but in the CSV: {', '.join(map(_short, hidden))}", markup=False)
    for row in rows[:MAX_ROWS]:
        if row.get("reason"):
            console.print(f"trial {row['trial']}: {row['reason']}", markup=False)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _short(column: str) -> str:
    """Shorten a column header for the terminal."""
    for prefix in ("model.", "trainer.", "val/"):
        column = column.removeprefix(prefix)
    return "seed" if column == SEED else column.replace("mean val/", "mean ")
