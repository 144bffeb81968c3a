"""Checks of the keys and values of a sweep file. `where` is the file and key, named in errors."""

import math
from collections.abc import Mapping
from typing import Any

from tq_lightning.errors import UserError, did_you_mean

# keys of `fit` that must not be in a sweep -> reason and alternative
_DECIDED = {
    "trainer.default_root_dir": "the sweep sets it; pass --dir instead",
    "run_dir": "each trial has its own folder; pass --dir instead",
    "ckpt_path": "the sweep resumes trials itself; remove it",
    "print_config": "it trains nothing; remove it",
}


def check_keys(given: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise UserError for the first unknown key; the message suggests the closest known key."""
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known, 1) or f"; expected one of {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key!r}{hint}")


def check_plain(value: Any, where: str) -> None:
    """Raise UserError for a value that JSON does not support: a date, NaN, a non-string key."""
    if isinstance(value, dict):
        for key, below in value.items():
            if not isinstance(key, str):
                raise UserError(f"{where}: expected text as a key, got {key!r}; put it in quotes")
            check_plain(below, f"{where}: {key}")
    elif isinstance(value, list):
        for below in value:
            check_plain(below, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number, got {value!r}")
    elif value is not None and not isinstance(value, bool | int | float | str):
        kind = type(value).__name__
        raise UserError(f"{where}: expected text or a number, got {kind} {value}; put it in quotes")


def one_of(given: Any, known: tuple[str, ...], where: str) -> str:
    """Return `given` if it is one of `known`; else raise UserError with the list."""
    if given not in known:
        listed = f"{', '.join(known[:-1])} or {known[-1]}" if known[1:] else known[0]
        raise UserError(f"{where}: expected {listed}, got {given!r}")
    return str(given)


def as_number(given: Any, where: str) -> float:
    """Convert to float. Accepts text, since YAML 1.1 reads 1e-3 as text."""
    try:
        if isinstance(given, bool):
            raise ValueError
        number = float(given)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: expected a number, got {given!r}") from None
    if not math.isfinite(number):
        raise UserError(f"{where}: expected a finite number, got {given!r}")
    return number


def check_free(keys: list[str], where: str) -> None:
    """Raise UserError if the keys include one that the sweep decides for every trial."""
    for key in keys:
        if key in _DECIDED:
            raise UserError(f"{where}: got {key}, but {_DECIDED[key]}")


def check_overlaps(parameters: Mapping[str, Any], where: str) -> None:
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
