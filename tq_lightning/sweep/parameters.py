"""Read `parameters` of a sweep file, nested or flat, as `Parameter`s and constants."""

import json
import math
from dataclasses import dataclass
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.sweep.value_checks import as_number, check_keys, one_of

RANGES = (
    "int_uniform",
    "uniform",
    "q_uniform",
    "log_uniform",
    "log_uniform_values",
    "q_log_uniform",
    "q_log_uniform_values",
)
UNSUPPORTED = (
    "normal",
    "q_normal",
    "log_normal",
    "q_log_normal",
    "beta",
    "q_beta",
    "inv_log_uniform",
    "inv_log_uniform_values",
)
# key that defines the form of an entry -> keys that may accompany it; the first match counts
FORMS = {
    "parameters": (),
    "value": ("distribution",),
    "values": ("distribution", "probabilities"),
    "min": ("max", "distribution", "q"),
    "max": ("min", "distribution", "q"),
}
PARAMETER_KEYS = tuple(dict.fromkeys([*FORMS, *(key for keys in FORMS.values() for key in keys)]))
MAX_INTEGER = 2**53  # samplers draw floats, which do not represent larger integers exactly


@dataclass(frozen=True)
class Parameter:
    """One searched key: a choice of `values`, or the range from `low` to `high`, both included.

    Attributes:
        values: the choices; empty for a range.
        weights: probability of each choice; None if all are equally likely.
        low: lower end of a range.
        high: upper end of a range.
        log: draw uniformly in the logarithm.
        q: round to a multiple of this number.
        integer: pass an int to `fit`.
    """

    values: tuple[Any, ...] = ()
    weights: tuple[float, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    q: float | None = None
    integer: bool = False


def format_argument(key: str, value: Any) -> str:
    """Format `--key=value` so that the parser of `fit` reads a value of the same type."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def axis_size(parameter: Parameter) -> int:
    """Return the number of values on one axis of a grid."""
    if parameter.values:
        return len(parameter.values)
    first, last = multiples(parameter)
    return last - first + 1


def axis_value(parameter: Parameter, index: int) -> Any:
    """Return one value on an axis of a grid: a choice, or a step of a range."""
    if parameter.values:
        return parameter.values[index]
    return round_to_step((multiples(parameter)[0] + index) * (parameter.q or 1), parameter)


def multiples(parameter: Parameter) -> tuple[int, int]:
    """Return the first and last integer whose product with q (default 1) is in the range."""
    step, slack = parameter.q or 1, 1e-9  # 0.7 counts as seven times 0.1
    return math.ceil(parameter.low / step - slack), math.floor(parameter.high / step + slack)


def round_to_step(number: float, parameter: Parameter) -> int | float:
    """Round a number drawn from a range to a multiple of q; an int if the parameter is one."""
    if parameter.q is not None:
        # 12 digits: 0.3, not 0.30000000000000004
        number = float(f"{round(number / parameter.q) * parameter.q:.12g}")
    return round(number) if parameter.integer else float(number)


def read_parameters(
    raw: Any,
    prefix: str,
    method: str,
    parameters: dict[str, Parameter],
    constants: dict[str, Any],
    where: str,
) -> None:
    """Flatten `parameters` of a sweep file into dotted keys, in the file's order.

    Args:
        raw: the value of a `parameters` key.
        prefix: dotted prefix of its keys, "" at the top.
        method: grid, random or bayes.
        parameters: receives the keys that are searched.
        constants: receives the keys with one value.
        where: file and key, named in errors.
    """
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{where}: expected keys of the command line, got {raw!r}")
    for name, entry in raw.items():
        key, here = f"{prefix}{name}", f"{where}.{name}"
        if not isinstance(entry, dict):
            raise UserError(f"{here}: expected value, values or min and max, got {entry!r}")
        if entry.get("distribution") in UNSUPPORTED:  # before its keys, such as mu, are checked
            raise UserError(
                f"{here}: distribution {entry['distribution']} is not supported by Optuna; "
                "use uniform, log_uniform_values or a q_ form"
            )
        check_keys(entry, PARAMETER_KEYS, here)
        _check_form(entry, here)
        if "parameters" in entry:
            read_parameters(entry["parameters"], f"{key}.", method, parameters, constants, here)
        elif key in parameters or key in constants:
            raise UserError(f"{here}: duplicate key {key}")
        elif "value" in entry:
            constants[key] = entry["value"]
        elif "values" in entry:
            parameters[key] = _read_choice(entry, here)
        else:
            parameters[key] = _read_range(entry, method, here)


def _check_form(entry: dict[str, Any], where: str) -> None:
    """Raise UserError if two keys of an entry contradict each other; the message names both."""
    form = next((form for form in FORMS if form in entry), None)
    if form is None:
        return
    for key in entry:
        if key != form and key not in FORMS[form]:
            raise UserError(f"{where}: got both {form} and {key}; keep one of them")
    if form == "value" and entry.get("distribution", "constant") != "constant":
        raise UserError(
            f"{where}: got both value and distribution {entry['distribution']!r}; keep one of them"
        )


def _read_choice(entry: dict[str, Any], where: str) -> Parameter:
    """Read `values`, with or without `probabilities`."""
    kinds = ("categorical", "categorical_w_probabilities")
    one_of(entry.get("distribution", "categorical"), kinds, f"{where}: distribution")
    values, weights = entry["values"], entry.get("probabilities")
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}: values: expected a list of at least one value, got {values!r}")
    seen: dict[Any, Any] = {}
    for value in values:
        for key in (_hashable(value), ("argument", format_argument("", value))):
            if key in seen:
                raise UserError(f"{where}: values: {seen[key]!r} and {value!r} are equal; keep one")
            seen[key] = value
    if weights is None:
        return Parameter(values=tuple(values))
    numbers = [
        as_number(weight, f"{where}: probabilities")
        for weight in (weights if isinstance(weights, list) else ())
    ]
    if len(numbers) != len(values) or min(numbers) < 0 or abs(sum(numbers) - 1) > 1e-6:
        raise UserError(
            f"{where}: probabilities: expected {len(values)} numbers >= 0 that add up to 1, "
            f"got {weights!r}"
        )
    return Parameter(values=tuple(values), weights=tuple(numbers))


def _hashable(value: Any) -> Any:
    """Convert a JSON value to one that hashes, equal where the values are equal (1, 1.0, true)."""
    if isinstance(value, list):
        return ("list", *map(_hashable, value))
    if isinstance(value, dict):
        return ("dict", frozenset((key, _hashable(below)) for key, below in value.items()))
    return value


def _read_range(entry: dict[str, Any], method: str, where: str) -> Parameter:
    """Read `min`, `max`, `q` and the name of a distribution."""
    name = entry.get("distribution")
    if "min" not in entry or "max" not in entry:
        raise UserError(
            f"{where}: expected value, values or both min and max, "
            f"got {', '.join(entry) or 'nothing'}"
        )
    low, high = (as_number(entry[end], f"{where}: {end}") for end in ("min", "max"))
    if name is None:  # like W&B: two integers make a range of integers
        integers = isinstance(entry["min"], int) and isinstance(entry["max"], int)
        name = "int_uniform" if integers else "uniform"
    one_of(name, RANGES, f"{where}: distribution")
    if name == "int_uniform" and not (low.is_integer() and high.is_integer()):
        raise UserError(
            f"{where}: int_uniform needs integers, got min {entry['min']!r} and max "
            f"{entry['max']!r}; round them, or use uniform"
        )
    q = as_number(entry.get("q", 1), f"{where}: q") if name.startswith("q_") else None
    if "q" in entry and q is None:
        raise UserError(f"{where}: q needs a q_ distribution, got distribution {name}")
    if q is not None and q <= 0:
        raise UserError(f"{where}: q: expected a number > 0, got {entry['q']!r}")
    given = f"min {entry['min']!r} and max {entry['max']!r}"
    if not low < high:
        raise UserError(f"{where}: expected min < max, got {given}")
    if name in ("log_uniform", "q_log_uniform"):  # W&B's ends are exponents of e
        try:
            low, high = math.exp(low), math.exp(high)
        except OverflowError:
            raise UserError(
                f"{where}: {name} takes exponents of e, got {given}; "
                "use log_uniform_values for the values themselves"
            ) from None
    integer = name == "int_uniform" or (
        q is not None and q.is_integer() and (name.startswith("q_log") or low.is_integer())
    )
    if integer and max(abs(low), abs(high)) > MAX_INTEGER:
        raise UserError(f"{where}: expected integers between -2^53 and 2^53, got {given}")
    parameter = Parameter(low=low, high=high, log="log" in name, q=q, integer=integer)
    if parameter.log and low <= 0:
        raise UserError(f"{where}: min of a logarithmic range must be > 0, got {entry['min']!r}")
    if q is not None and max(abs(low), abs(high)) / q > MAX_INTEGER:
        raise UserError(
            f"{where}: q: expected at most 2^53 multiples, got q {entry['q']!r} with {given}"
        )
    if q is not None and axis_size(parameter) < 1:
        raise UserError(f"{where}: no multiple of q {entry['q']!r} between {given}")
    if method == "grid" and name not in ("int_uniform", "q_uniform"):
        raise UserError(
            f"{where}: a grid needs values, or integers min and max; got distribution {name}"
        )
    return parameter
