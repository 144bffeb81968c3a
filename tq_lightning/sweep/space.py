"""The one reader of a sweep file: a W&B sweep YAML -> `Sweep`, with every error found before anything runs.

What the keys mean is W&B's (docs.wandb.ai, "sweep configuration"); what they become in Optuna is in `twins`.
"""

import dataclasses
import difflib
import itertools
import json
import math
import operator
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tq_lightning.errors import UserError

TOP_KEYS = (
    "program",
    "command",
    "method",
    "metric",
    "parameters",
    "early_terminate",
    "run_cap",
    "name",
    "description",
    "project",
    "entity",
)
PARAMETER_KEYS = ("value", "values", "probabilities", "distribution", "min", "max", "q", "parameters")
METHODS = ("grid", "random", "bayes")
GOALS = ("minimize", "maximize")
RANGES = ("int_uniform", "uniform", "q_uniform", "log_uniform", "log_uniform_values", "q_log_uniform", "q_log_uniform_values")
NO_TWIN = ("normal", "q_normal", "log_normal", "q_log_normal", "beta", "q_beta", "inv_log_uniform", "inv_log_uniform_values")


@dataclass(frozen=True)
class Parameter:
    """One searched key. Either `values` (a choice) or the range `low`..`high` (both ends in it).

    log: drawn uniformly in the logarithm. q: what is drawn is rounded to a multiple of it. integer: an int reaches the program.
    """

    values: tuple[Any, ...] = ()
    weights: tuple[float, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    q: float | None = None
    integer: bool = False


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
        raise UserError(f"{path} holds no sweep: expected keys {', '.join(TOP_KEYS[:5])}, got {type(raw).__name__}")
    _known(raw, TOP_KEYS, str(path))
    method = _one_of(raw.get("method"), METHODS, f"{path}: method")
    parameters: dict[str, Parameter] = {}
    constants: dict[str, Any] = {}
    _read_parameters(raw.get("parameters"), "", method, parameters, constants, f"{path}: parameters")
    if not parameters:
        raise UserError(f"{path}: parameters: nothing to search; give at least one key `values` or `min` and `max`")
    metric, goal = _read_metric(raw.get("metric"), path)
    arguments, environment = _read_command(raw, path)
    cap = raw.get("run_cap")
    if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
        raise UserError(f"{path}: run_cap: expected a whole number from 1, got {cap!r}")
    source = {key: raw.get(key) for key in ("method", "metric", "parameters", "early_terminate")} | {
        "arguments": list(arguments)
    }
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
            raise UserError(f"{key} after -- would undo the search over it in {sweep.path}; leave it out")
    return dataclasses.replace(
        sweep, extra=tuple(extra), source=sweep.source | {"extra": list(extra)} if extra else sweep.source
    )


def grid(sweep: Sweep) -> list[dict[str, Any]]:
    """Every point of a grid sweep, the file's last key turning fastest; values as the file has them."""
    axes = {key: _axis(parameter) for key, parameter in sweep.parameters.items()}
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def argument(key: str, value: Any) -> str:
    """One command-line argument `--key=value` that the YAML-reading parser of `fit` turns back into the same typed value."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def _axis(parameter: Parameter) -> tuple[Any, ...]:
    """The values of one grid axis: a choice's, or the steps of a range."""
    if parameter.values:
        return parameter.values
    first, last = multiples(parameter)
    return tuple(rounded(k * (parameter.q or 1), parameter) for k in range(first, last + 1))


def multiples(parameter: Parameter) -> tuple[int, int]:
    """(first, last) whole number whose product with q (1 where there is none) lies in the range; 0.7 is seven times 0.1."""
    step, slack = parameter.q or 1, 1e-9
    return math.ceil(parameter.low / step - slack), math.floor(parameter.high / step + slack)


def rounded(number: float, parameter: Parameter) -> int | float:
    """What was drawn from a range -> what the program gets: the nearest multiple of q, as W&B rounds, an int where all are."""
    if parameter.q is not None:
        number = float(f"{round(number / parameter.q) * parameter.q:.12g}")  # 0.3, not 0.30000000000000004
    return round(number) if parameter.integer else float(number)


def _read_parameters(
    raw: Any, prefix: str, method: str, parameters: dict[str, Parameter], constants: dict[str, Any], where: str
) -> None:
    """Flatten (possibly nested) `parameters` into dotted keys, in the file's order."""
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{where}: expected keys of the command line, got {raw!r}")
    for name, entry in raw.items():
        key, here = f"{prefix}{name}", f"{where}.{name}"
        if not isinstance(entry, dict):
            raise UserError(f"{here}: expected value, values or min and max, got {entry!r}")
        _known(entry, PARAMETER_KEYS, here)
        if "parameters" in entry:
            _read_parameters(entry["parameters"], f"{key}.", method, parameters, constants, here)
        elif key in parameters or key in constants:
            raise UserError(f"{here}: the key {key} is given twice")
        elif "value" in entry:
            constants[key] = entry["value"]
        else:
            parameters[key] = _read_choice(entry, here) if "values" in entry else _read_range(entry, method, here)


def _read_choice(entry: dict[str, Any], where: str) -> Parameter:
    """`values`, with `probabilities` or without."""
    _one_of(entry.get("distribution", "categorical"), ("categorical", "categorical_w_probabilities"), f"{where}: distribution")
    values, weights = entry["values"], entry.get("probabilities")
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: values: an empty range; expected a list of at least one value, got {values!r}")
    for a, b in itertools.combinations(values, 2):
        if a == b:
            raise UserError(f"{where}: values: {a!r} and {b!r} are the same value to both engines; keep one")
    if weights is None:
        return Parameter(values=tuple(values))
    numbers = [_number(weight, f"{where}: probabilities") for weight in weights] if isinstance(weights, list) else []
    if len(numbers) != len(values) or min(numbers) < 0 or abs(sum(numbers) - 1) > 1e-6:
        raise UserError(f"{where}: probabilities: expected {len(values)} numbers from 0 that add up to 1, got {weights!r}")
    return Parameter(values=tuple(values), weights=tuple(numbers))


def _read_range(entry: dict[str, Any], method: str, where: str) -> Parameter:
    """`min`, `max`, `q` and a distribution's name."""
    name = entry.get("distribution")
    if name in NO_TWIN:
        raise UserError(f"{where}: distribution {name} has no twin in Optuna; use uniform, log_uniform_values or a q_ form")
    if "min" not in entry or "max" not in entry:
        raise UserError(f"{where}: expected value, values or both min and max, got {', '.join(entry) or 'nothing'}")
    low, high = _number(entry["min"], f"{where}: min"), _number(entry["max"], f"{where}: max")
    if name is None:  # W&B's rule: two integers make a range of integers
        name = "int_uniform" if all(isinstance(entry[end], int) for end in ("min", "max")) else "uniform"
    _one_of(name, RANGES, f"{where}: distribution")
    q = _number(entry.get("q", 1), f"{where}: q") if name.startswith("q_") else None
    if "q" in entry and q is None:
        raise UserError(f"{where}: q is for the q_ distributions; got distribution {name}")
    if q is not None and q <= 0:
        raise UserError(f"{where}: q: expected a number above 0, got {entry['q']!r}")
    if not low < high:
        raise UserError(f"{where}: an empty range; expected min < max, got min {entry['min']!r} and max {entry['max']!r}")
    if name in ("log_uniform", "q_log_uniform"):  # W&B takes the ends as exponents of e here
        low, high = math.exp(low), math.exp(high)
    integer = name == "int_uniform" or (q is not None and q.is_integer() and (name.startswith("q_log") or low.is_integer()))
    parameter = Parameter(low=low, high=high, log="log" in name, q=q, integer=integer)
    if parameter.log and low <= 0:
        raise UserError(f"{where}: min: a logarithmic range starts above 0, got {entry['min']!r}")
    if q is not None and operator.gt(*multiples(parameter)):
        raise UserError(f"{where}: an empty range; no multiple of q {entry['q']!r} lies in {entry['min']!r}..{entry['max']!r}")
    if method == "grid" and name not in ("int_uniform", "q_uniform"):
        raise UserError(f"{where}: a grid needs values, or integers min and max; got distribution {name}")
    return parameter


def _read_metric(raw: Any, path: Path) -> tuple[str | None, str]:
    """(name, goal) of `metric`; W&B's default goal is minimize."""
    if raw is None:
        return None, "minimize"
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        raise UserError(f"{path}: metric: expected name and goal, got {raw!r}")
    _known(raw, ("name", "goal"), f"{path}: metric")
    return raw["name"], _one_of(raw.get("goal", "minimize"), GOALS, f"{path}: metric: goal")


def _read_early_terminate(raw: Any, path: Path) -> dict[str, float] | None:
    """Hyperband's numbers: min_iter, or max_iter with s brackets; eta."""
    if raw is None:
        return None
    where = f"{path}: early_terminate"
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected type: hyperband with min_iter or max_iter, got {raw!r}")
    _known(raw, ("type", "min_iter", "max_iter", "s", "eta"), where)
    _one_of(raw.get("type"), ("hyperband",), f"{where}: type")
    numbers = {key: _number(value, f"{where}: {key}") for key, value in raw.items() if key != "type"}
    if "min_iter" not in numbers and not {"max_iter", "s"} <= set(numbers):
        raise UserError(f"{where}: expected min_iter, or max_iter and s; got {', '.join(numbers) or 'neither'}")
    if min(numbers.values()) < 1 or numbers.get("eta", 3) < 2:
        raise UserError(f"{where}: expected numbers from 1 (eta from 2), got {raw!r}")
    return numbers


def _read_command(raw: dict[str, Any], path: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """The arguments that `command` gives `fit` besides ${args}, and the NAME=VALUE settings in front of the program."""
    command = raw.get("command")
    shape = "[${env}, python, -m, tq_lightning, fit, --config, FILE, ${args}]"
    if not isinstance(command, list) or not command or command[-1] != "${args}" or command.count("${args}") != 1:
        raise UserError(f"{path}: command: expected a list that ends in ${{args}}, such as {shape}, got {command!r}")
    words = [re.sub(r"\$\{envvar:(\w+)\}", lambda m: os.environ.get(m[1], m[1]), str(word)) for word in command[:-1]]
    starts = [i for i in range(len(words) - 2) if words[i : i + 3] == ["-m", "tq_lightning", "fit"]]
    if not starts:
        raise UserError(f"{path}: command: the engine runs `-m tq_lightning fit` itself; expected {shape}, got {command!r}")
    # --wandb is for W&B's agents; under Optuna the study has the curves, and whoever wants both says so after --
    arguments = [word for word in words[starts[0] + 3 :] if word != "--wandb"]
    for word in arguments:
        if word.startswith("${"):
            raise UserError(f"{path}: command: {word} stands where only arguments of fit and, at the end, ${{args}} can")
    settings = [word.split("=", 1) for word in words[: starts[0]] if re.match(r"[A-Za-z_]\w*=", word)]
    return tuple(arguments), {word[0]: word[1] for word in settings}


def _known(given: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise for the first key that is not known, with the nearest that is."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")


def _one_of(given: Any, known: tuple[str, ...], where: str) -> str:
    """`given` where it is one of `known`, else an error that lists them."""
    if given not in known:
        raise UserError(f"{where}: expected {', '.join(known[:-1])}{' or ' if known[1:] else ''}{known[-1]}, got {given!r}")
    return str(given)


def _number(given: Any, where: str) -> float:
    """A number; YAML 1.1 reads 1e-3 as a string, so a string that is a number counts."""
    try:
        if isinstance(given, bool):
            raise ValueError
        number = float(given)
    except (TypeError, ValueError):
        raise UserError(f"{where}: expected a number, got {given!r}") from None
    if not math.isfinite(number):
        raise UserError(f"{where}: expected a finite number, got {given!r}")
    return number
