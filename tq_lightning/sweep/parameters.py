"""The searched keys of a sweep file: `parameters`, nested or not -> `Parameter`s and constants, every error in one line."""

import difflib
import itertools
import math
import operator
from dataclasses import dataclass
from typing import Any

from tq_lightning.errors import UserError

PARAMETER_KEYS = (
    "value",
    "values",
    "probabilities",
    "distribution",
    "min",
    "max",
    "q",
    "parameters",
)
RANGES = (
    "int_uniform",
    "uniform",
    "q_uniform",
    "log_uniform",
    "log_uniform_values",
    "q_log_uniform",
    "q_log_uniform_values",
)
NO_TWIN = (
    "normal",
    "q_normal",
    "log_normal",
    "q_log_normal",
    "beta",
    "q_beta",
    "inv_log_uniform",
    "inv_log_uniform_values",
)


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


def axis(parameter: Parameter) -> tuple[Any, ...]:
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
        number = float(
            f"{round(number / parameter.q) * parameter.q:.12g}"
        )  # 0.3, not 0.30000000000000004
    return round(number) if parameter.integer else float(number)


def read_parameters(
    raw: Any,
    prefix: str,
    method: str,
    parameters: dict[str, Parameter],
    constants: dict[str, Any],
    where: str,
) -> None:
    """Flatten (possibly nested) `parameters` into dotted keys, in the file's order."""
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{where}: expected keys of the command line, got {raw!r}")
    for name, entry in raw.items():
        key, here = f"{prefix}{name}", f"{where}.{name}"
        if not isinstance(entry, dict):
            raise UserError(f"{here}: expected value, values or min and max, got {entry!r}")
        check_keys(entry, PARAMETER_KEYS, here)
        if "parameters" in entry:
            read_parameters(entry["parameters"], f"{key}.", method, parameters, constants, here)
        elif key in parameters or key in constants:
            raise UserError(f"{here}: the key {key} is given twice")
        elif "value" in entry:
            constants[key] = entry["value"]
        else:
            parameters[key] = (
                _read_choice(entry, here) if "values" in entry else _read_range(entry, method, here)
            )


def _read_choice(entry: dict[str, Any], where: str) -> Parameter:
    """`values`, with `probabilities` or without."""
    one_of(
        entry.get("distribution", "categorical"),
        ("categorical", "categorical_w_probabilities"),
        f"{where}: distribution",
    )
    values, weights = entry["values"], entry.get("probabilities")
    if not isinstance(values, list) or not values:
        raise UserError(
            f"{where}: values: an empty range; expected a list of at least one value, got {values!r}"
        )
    for a, b in itertools.combinations(values, 2):
        if a == b:
            raise UserError(
                f"{where}: values: {a!r} and {b!r} are the same value to both engines; keep one"
            )
    if weights is None:
        return Parameter(values=tuple(values))
    numbers = (
        [as_number(weight, f"{where}: probabilities") for weight in weights]
        if isinstance(weights, list)
        else []
    )
    if len(numbers) != len(values) or min(numbers) < 0 or abs(sum(numbers) - 1) > 1e-6:
        raise UserError(
            f"{where}: probabilities: expected {len(values)} numbers from 0 that add up to 1, got {weights!r}"
        )
    return Parameter(values=tuple(values), weights=tuple(numbers))


def _read_range(entry: dict[str, Any], method: str, where: str) -> Parameter:
    """`min`, `max`, `q` and a distribution's name."""
    name = entry.get("distribution")
    if name in NO_TWIN:
        raise UserError(
            f"{where}: distribution {name} has no twin in Optuna; use uniform, log_uniform_values or a q_ form"
        )
    if "min" not in entry or "max" not in entry:
        raise UserError(
            f"{where}: expected value, values or both min and max, got {', '.join(entry) or 'nothing'}"
        )
    low, high = as_number(entry["min"], f"{where}: min"), as_number(entry["max"], f"{where}: max")
    if name is None:  # W&B's rule: two integers make a range of integers
        name = (
            "int_uniform"
            if all(isinstance(entry[end], int) for end in ("min", "max"))
            else "uniform"
        )
    one_of(name, RANGES, f"{where}: distribution")
    q = as_number(entry.get("q", 1), f"{where}: q") if name.startswith("q_") else None
    if "q" in entry and q is None:
        raise UserError(f"{where}: q is for the q_ distributions; got distribution {name}")
    if q is not None and q <= 0:
        raise UserError(f"{where}: q: expected a number above 0, got {entry['q']!r}")
    if not low < high:
        raise UserError(
            f"{where}: an empty range; expected min < max, got min {entry['min']!r} and max {entry['max']!r}"
        )
    if name in ("log_uniform", "q_log_uniform"):  # W&B takes the ends as exponents of e here
        low, high = math.exp(low), math.exp(high)
    integer = name == "int_uniform" or (
        q is not None and q.is_integer() and (name.startswith("q_log") or low.is_integer())
    )
    parameter = Parameter(low=low, high=high, log="log" in name, q=q, integer=integer)
    if parameter.log and low <= 0:
        raise UserError(f"{where}: min: a logarithmic range starts above 0, got {entry['min']!r}")
    if q is not None and operator.gt(*multiples(parameter)):
        raise UserError(
            f"{where}: an empty range; no multiple of q {entry['q']!r} lies in {entry['min']!r}..{entry['max']!r}"
        )
    if method == "grid" and name not in ("int_uniform", "q_uniform"):
        raise UserError(
            f"{where}: a grid needs values, or integers min and max; got distribution {name}"
        )
    return parameter


def check_keys(given: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise for the first key that is not known, with the nearest that is."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")


def one_of(given: Any, known: tuple[str, ...], where: str) -> str:
    """`given` where it is one of `known`, else an error that lists them."""
    if given not in known:
        raise UserError(
            f"{where}: expected {', '.join(known[:-1])}{' or ' if known[1:] else ''}{known[-1]}, got {given!r}"
        )
    return str(given)


def as_number(given: Any, where: str) -> float:
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
