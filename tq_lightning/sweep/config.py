"""Read a W&B sweep file into a `Sweep`; every error is found before anything runs.

The keys have the meaning that W&B documents for its sweep configuration. `search_space` translates
them for Optuna.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.files import expand_path
from tq_lightning.records.publish import flatten
from tq_lightning.sweep.parameters import (
    Parameter,
    axis_size,
    axis_value,
    read_parameters,
)
from tq_lightning.sweep.trial_command import read_command
from tq_lightning.sweep.value_checks import as_number, check_keys, check_plain, one_of
from tq_lightning.training.yaml_file import read_yaml

KEYS = (
    "program",
    "command",
    "method",
    "metric",
    "parameters",
    "early_terminate",
    "run_cap",
    "name",
    "description",
    "project",  # project and entity belong to W&B's server and are ignored here
    "entity",
)
MAX_EXPONENT = 100  # of 2, for eta**s of early_terminate
# keys of `fit` that must not be in a sweep -> reason and alternative
_DECIDED = {
    "trainer.default_root_dir": "the sweep sets it; pass --dir instead",
    "run_dir": "each trial has its own folder; pass --dir instead",
    "ckpt_path": "the sweep resumes trials itself; remove it",
    "print_config": "it trains nothing; remove it",
}
METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked.

    Attributes:
        path: the file.
        name: `name` of the file, or its stem.
        method: grid, random or bayes.
        metric: name of the objective, None if the file has no metric.
        goal: minimize or maximize.
        parameters: dotted command-line key -> searched parameter, in the order of the file.
        constants: dotted command-line key -> constant value.
        arguments: arguments of `fit` in the file's `command`.
        environment: variables set in the file's `command`.
        early_terminate: the settings of Hyperband; None without pruning.
        run_cap: number of trials, None if the file has no cap.
        source: the parts of the file that must match those of a study to join it.
        extra: arguments of `fit` given after `--` on the command line.
    """

    path: str
    name: str
    method: str
    metric: str | None
    goal: str
    parameters: dict[str, Parameter]
    constants: dict[str, Any]
    arguments: tuple[str, ...]
    environment: dict[str, str]
    early_terminate: dict[str, float] | None
    run_cap: int | None
    source: dict[str, Any]
    extra: tuple[str, ...] = ()


def read_sweep(path: str | Path) -> Sweep:
    """Read and check a sweep file.

    Raises:
        UserError: the file can't be read, or is not a valid sweep.
    """
    path = expand_path(path)
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} is not a sweep file: expected keys {', '.join(KEYS[:5])}, "
            f"got {type(raw).__name__}"
        )
    check_keys(raw, KEYS, str(path))
    check_plain(raw, str(path))
    method = one_of(raw.get("method"), METHODS, f"{path}: method")
    parameters: dict[str, Parameter] = {}
    constants: dict[str, Any] = {}
    read_parameters(raw.get("parameters"), "", method, parameters, constants, f"{path}: parameters")
    if not parameters:
        raise UserError(
            f"{path}: parameters: nothing to search; add `values`, or `min` and `max`, to at least "
            "one key"
        )
    where = f"{path}: parameters"
    values = [{key: value} for key, p in parameters.items() for value in p.values or [None]]
    check_free([key for given in (*values, constants) for key in flatten(given)], where)
    _check_overlaps(parameters, where)
    metric, goal = _read_metric(raw.get("metric"), path)
    arguments, environment = read_command(raw.get("command"), path)
    check_free([_key_of(word) for word in arguments], f"{path}: command")
    cap = raw.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise UserError(f"{path}: run_cap: expected an integer >= 1, got {cap!r}")
    name = raw.get("name") or path.stem
    if not isinstance(name, str | int | float):
        raise UserError(f"{path}: name: expected text, got {name!r}")
    source = {key: raw.get(key) for key in ("method", "metric", "parameters", "early_terminate")}
    return Sweep(
        path=str(path),
        name=str(name),
        method=method,
        metric=metric,
        goal=goal,
        parameters=parameters,
        constants=constants,
        arguments=arguments,
        environment=environment,
        early_terminate=_read_early_terminate(raw.get("early_terminate"), path),
        run_cap=cap,
        source=json.loads(json.dumps(source | {"arguments": list(arguments)})),
    )


def with_extra(sweep: Sweep, extra: list[str]) -> Sweep:
    """Add arguments of `fit` to every trial.

    Raises:
        UserError: an argument sets a key that is searched or that the sweep decides, or prints
            the configuration.
    """
    keys = {word: _key_of(word) for word in extra}
    for word, key in keys.items():
        if key == "print_config":
            raise UserError(
                f"{word} trains nothing; remove it from the arguments after --, or pass it to fit"
            )
    check_free(list(keys.values()), "the arguments after --")
    for word, key in keys.items():
        if key in sweep.parameters:
            raise UserError(
                f"{word}: {sweep.path} searches {key}; remove it from the arguments after --"
            )
    if not extra:
        return sweep
    source = sweep.source | {"extra": list(extra)}
    return dataclasses.replace(sweep, extra=tuple(extra), source=source)


def grid_size(sweep: Sweep) -> int:
    """Return the number of points of a grid sweep."""
    return math.prod(axis_size(parameter) for parameter in sweep.parameters.values())


def grid_point(sweep: Sweep, index: int) -> dict[str, Any]:
    """Return one point of a grid sweep, with values as in the file; the last key varies fastest."""
    point = {}
    for key, parameter in reversed(sweep.parameters.items()):
        index, i = divmod(index, axis_size(parameter))
        point[key] = axis_value(parameter, i)
    return dict(reversed(point.items()))


def check_free(keys: list[str], where: str) -> None:
    """Raise UserError if the keys include one that the sweep decides for every trial."""
    for key in keys:
        if key in _DECIDED:
            raise UserError(f"{where}: got {key}, but {_DECIDED[key]}")


def _check_overlaps(parameters: dict[str, Parameter], where: str) -> None:
    """Raise UserError if a searched key overrides the values of an earlier one in every trial.

    `model: {values: [{lr: 0.1}, ...]}` sets model.lr. A mapping for a key below a section, such as
    model.opt_args, replaces the whole mapping.
    """
    set_by: dict[str, tuple[str, str]] = {}  # key or its prefix -> key, and the parameter
    for key, parameter in parameters.items():
        mappings = [value for value in parameter.values if isinstance(value, dict)]
        sets = [key] if "." in key else [f"{key}.{name}" for value in mappings for name in value]
        for name in sets:
            if name in set_by:
                inner, earlier = set_by[name]
                raise UserError(f"{where}: {inner} is set by both {earlier} and {key}; keep one")
        for name in sets:
            parts = name.split(".")
            for i in range(2, len(parts) + 1):
                set_by[".".join(parts[:i])] = name, key


def _key_of(word: str) -> str:
    """Return the key of a command-line word `--key` or `--key=value`."""
    return word.removeprefix("--").split("=", 1)[0]


def _read_metric(raw: Any, path: Path) -> tuple[str | None, str]:
    """Return (name, goal); like W&B, the default goal is minimize."""
    if raw is None:
        return None, "minimize"
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        raise UserError(f"{path}: metric: expected name and goal, got {raw!r}")
    check_keys(raw, ("name", "goal"), f"{path}: metric")
    return raw["name"], one_of(raw.get("goal", "minimize"), GOALS, f"{path}: metric: goal")


def _read_early_terminate(raw: Any, path: Path) -> dict[str, float] | None:
    """Return the settings of Hyperband: eta, and min_iter or max_iter with s brackets."""
    if raw is None:
        return None
    where = f"{path}: early_terminate"
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected type: hyperband with min_iter or max_iter, got {raw!r}")
    check_keys(raw, ("type", "min_iter", "max_iter", "s", "eta"), where)
    one_of(raw.get("type"), ("hyperband",), f"{where}: type")
    numbers = {
        key: as_number(value, f"{where}: {key}") for key, value in raw.items() if key != "type"
    }
    if "min_iter" not in numbers and not {"max_iter", "s"} <= set(numbers):
        raise UserError(
            f"{where}: expected min_iter, or max_iter and s; got {', '.join(numbers) or 'neither'}"
        )
    if min(numbers.values()) < 1 or numbers.get("eta", 3) < 2:
        raise UserError(f"{where}: expected numbers >= 1 and eta >= 2, got {raw!r}")
    if numbers.get("s", 1) * math.log2(numbers.get("eta", 3)) > MAX_EXPONENT:
        raise UserError(f"{where}: expected eta**s <= 2**{MAX_EXPONENT}, got {raw!r}; reduce s")
    return numbers
