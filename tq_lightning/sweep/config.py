"""The one reader of a sweep file: a W&B sweep YAML -> `Sweep`, with every error found before anything runs.

What the keys mean is W&B's (docs.wandb.ai, "sweep configuration"); what they become in Optuna is in `twins`.
"""

import dataclasses
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tq_lightning.errors import UserError
from tq_lightning.sweep.parameters import (
    Parameter,
    as_number,
    axis,
    check_keys,
    one_of,
    read_parameters,
)

TOP_KEYS: tuple[str, ...] = (
    "program",
    "command",
    "method",
    "metric",
    "parameters",
    "early_terminate",
    "run_cap",
    "name",
    "description",
)
TOP_KEYS += ("project", "entity")  # of W&B's server; nothing to us
METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked. `parameters` and `constants` have dotted command-line keys, in the file's order."""

    path: str
    name: str
    method: str
    metric: str | None
    goal: str
    parameters: dict[str, Parameter]
    constants: dict[str, Any]
    arguments: tuple[str, ...]  # what the command gives `fit` besides the searched keys
    environment: dict[str, str]
    early_terminate: dict[str, float] | None
    run_cap: int | None
    source: dict[str, Any]  # what a study of this name must agree with
    extra: tuple[str, ...] = ()  # given after -- on our command line; they win over all others


def read_sweep(path: str | Path) -> Sweep:
    """Read and check one sweep file. Raises UserError with one line for whatever neither engine could run."""
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"can't read the sweep file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} holds no sweep: expected keys {', '.join(TOP_KEYS[:5])}, got {type(raw).__name__}"
        )
    check_keys(raw, TOP_KEYS, str(path))
    method = one_of(raw.get("method"), METHODS, f"{path}: method")
    parameters: dict[str, Parameter] = {}
    constants: dict[str, Any] = {}
    read_parameters(raw.get("parameters"), "", method, parameters, constants, f"{path}: parameters")
    if not parameters:
        raise UserError(
            f"{path}: parameters: nothing to search; give at least one key `values` or `min` and `max`"
        )
    metric, goal = _read_metric(raw.get("metric"), path)
    arguments, environment = _read_command(raw, path)
    cap = raw.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise UserError(f"{path}: run_cap: expected a whole number from 1, got {cap!r}")
    source = {
        key: raw.get(key) for key in ("method", "metric", "parameters", "early_terminate")
    } | {"arguments": list(arguments)}
    return Sweep(
        str(path),
        str(raw.get("name") or path.stem),
        method,
        metric,
        goal,
        parameters,
        constants,
        arguments,
        environment,
        _read_early_terminate(raw.get("early_terminate"), path),
        cap,
        json.loads(json.dumps(source)),
    )


def with_extra(sweep: Sweep, extra: list[str]) -> Sweep:
    """The sweep with further arguments for every trial alike. Raises UserError where they would fix what is searched."""
    for word in extra:
        key = word.removeprefix("--").split("=", 1)[0]
        if key in sweep.parameters:
            raise UserError(
                f"{key} after -- would undo the search over it in {sweep.path}; leave it out"
            )
    return dataclasses.replace(
        sweep,
        extra=tuple(extra),
        source=sweep.source | {"extra": list(extra)} if extra else sweep.source,
    )


def grid(sweep: Sweep) -> list[dict[str, Any]]:
    """Every point of a grid sweep, the file's last key turning fastest; values as the file has them."""
    axes = {key: axis(parameter) for key, parameter in sweep.parameters.items()}
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def argument(key: str, value: Any) -> str:
    """One command-line argument `--key=value` that the YAML-reading parser of `fit` turns back into the same typed value."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def _read_metric(raw: Any, path: Path) -> tuple[str | None, str]:
    """(name, goal) of `metric`; W&B's default goal is minimize."""
    if raw is None:
        return None, "minimize"
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        raise UserError(f"{path}: metric: expected name and goal, got {raw!r}")
    check_keys(raw, ("name", "goal"), f"{path}: metric")
    return raw["name"], one_of(raw.get("goal", "minimize"), GOALS, f"{path}: metric: goal")


def _read_early_terminate(raw: Any, path: Path) -> dict[str, float] | None:
    """Hyperband's numbers: min_iter, or max_iter with s brackets; eta."""
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
        raise UserError(f"{where}: expected numbers from 1 (eta from 2), got {raw!r}")
    return numbers


def _read_command(raw: dict[str, Any], path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """The arguments that `command` gives `fit` besides ${args}, and the NAME=VALUE settings in front of the program."""
    command = raw.get("command")
    shape = "[${env}, python, -m, tq_lightning, fit, --config, FILE, ${args}]"
    if (
        not isinstance(command, list)
        or not command
        or command[-1] != "${args}"
        or command.count("${args}") != 1
    ):
        raise UserError(
            f"{path}: command: expected a list that ends in ${{args}}, such as {shape}, got {command!r}"
        )
    words = [
        re.sub(r"\$\{envvar:(\w+)\}", lambda m: os.environ.get(m[1], m[1]), str(word))
        for word in command[:-1]
    ]
    starts = [i for i in range(len(words) - 2) if words[i : i + 3] == ["-m", "tq_lightning", "fit"]]
    if not starts:
        raise UserError(
            f"{path}: command: the engine runs `-m tq_lightning fit` itself; expected {shape}, got {command!r}"
        )
    # --wandb is for W&B's agents; under Optuna the study has the curves, and whoever wants both says so after --
    arguments = [word for word in words[starts[0] + 3 :] if word != "--wandb"]
    for word in arguments:
        if word.startswith("${"):
            raise UserError(
                f"{path}: command: {word} stands where only arguments of fit and, at the end, ${{args}} can"
            )
    settings = [
        word.split("=", 1) for word in words[: starts[0]] if re.match(r"[A-Za-z_]\w*=", word)
    ]
    return tuple(arguments), {word[0]: word[1] for word in settings}
