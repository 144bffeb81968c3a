"""Read a W&B sweep file into a `Sweep`; every error is found before anything runs.

The keys have the meaning that W&B documents for its sweep configuration. `search_space` translates
them for Optuna.
"""

import dataclasses
import json
import math
import os
import re
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
from tq_lightning.sweep.value_checks import (
    as_number,
    check_free,
    check_keys,
    check_overlaps,
    check_plain,
    one_of,
)
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
METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")
COMMAND = '["${env}", python, -m, tq_lightning, fit, --config, FILE, "${args}"]'
# how the program is named in a command
_FIT = (["-m", "tq_lightning", "fit"], ["tq-lightning", "fit"])
_SETTING = re.compile(r"[A-Za-z_]\w*=")  # NAME=VALUE
_ENV = ("env", "/usr/bin/env", "${env}")


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
    check_overlaps(parameters, where)
    metric, goal = _read_metric(raw.get("metric"), path)
    arguments, environment = _read_command(raw.get("command"), path)
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


def _read_command(command: Any, path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the arguments of `fit` before ${args}, and the NAME=VALUE words before the program.

    W&B's agents start the command as it stands. The workers of a study run `fit` themselves, so a
    launcher in front of the program would have no effect, and is refused.
    """
    where = f"{path}: command"
    if not isinstance(command, list) or command[-1:] != ["${args}"] or command.count("${args}") > 1:
        raise UserError(
            f"{where}: expected a list that ends in ${{args}}, e.g. {COMMAND}; got {command!r}"
        )
    words = [
        re.sub(r"\$\{envvar:(\w+)\}", lambda m: os.environ.get(m[1], m[1]), str(word))
        for word in command[:-1]
    ]
    program = _program(words)
    if program is None:
        raise UserError(
            f"{where}: expected {COMMAND}, got {command!r}; each trial runs `tq_lightning fit`"
        )
    before, after = words[: program[0]], words[program[1] :]
    settings = [word.split("=", 1) for word in before if _SETTING.match(word)]
    for word in before:
        if not (_SETTING.match(word) or word in _ENV or _is_python(word)):
            raise UserError(
                f"{where}: {word!r} is not supported before the program, because the workers of "
                "the sweep run `fit` themselves; use only ${env}, NAME=VALUE and python there, and "
                "set devices with trainer.devices"
            )
    # --wandb is for W&B's agents. With Optuna, the study stores the curves. --wandb can still be
    # passed after -- on the command line.
    arguments = [word for word in after if word != "--wandb"]
    for word in arguments:
        if word.startswith("${"):
            raise UserError(
                f"{where}: {word} is not supported after `fit`; use only ${{args}}, at the end"
            )
    return tuple(arguments), dict(settings)


def _program(words: list[str]) -> tuple[int, int] | None:
    """Return where the words of the program start and end."""
    for i in range(len(words)):
        for fit in _FIT:
            if [Path(words[i]).name, *words[i + 1 : i + len(fit)]] == fit:
                return i, i + len(fit)
    return None


def _is_python(word: str) -> bool:
    """Return True for an interpreter and its options, e.g. python3.12 and -u."""
    name = Path(word).name
    return word.startswith(("-", "${interpreter}")) or bool(re.fullmatch(r"python[\d.]*", name))
