"""Parse lists in the forms that command lines and sweep engines pass: 8,4,2, [8, 4, 2] or 8."""

import math
from typing import Any

from tq_lightning.errors import UserError


def as_list(value: Any, key: str = "list") -> list:
    """Return `8,4,2,1`, `[8, 4, 2, 1]`, `(8, 4)` or `8`, as text or typed, as a list.

    Raises:
        UserError: an unbalanced bracket or an empty item; the message names `key`.
    """
    if isinstance(value, str):
        text = value.strip()
        closing = {"[": "]", "(": ")"}.get(text[:1])
        if closing is not None and text.endswith(closing) and len(text) > 1:
            text = text[1:-1]
        parts = [part.strip().strip("'\"") for part in text.split(",")]
        if parts[-1] == "":  # "[]", "" or the comma of "(8,)"
            parts.pop()
        if not all(part and _balanced(part) for part in parts):
            raise UserError(f"{key}: got {value!r}, expected a list, e.g. [8, 4] or 8,4")
        return parts
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _balanced(text: str) -> bool:
    return all(text.count(opening) == text.count(closing) for opening, closing in ("[]", "()"))


def as_ints(value: Any, key: str) -> list[int]:
    """Return `as_list(value)` as integers. Raises UserError that names `key`."""
    try:
        numbers = [float(v) for v in as_list(value, key)]
        if all(number.is_integer() for number in numbers):
            return [int(number) for number in numbers]
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{key}: got {value!r}, expected integers, e.g. 8,4,2,1")


def as_floats(value: Any, key: str) -> list[float]:
    """Return `as_list(value)` as finite numbers. Raises UserError that names `key`."""
    try:
        numbers = [float(v) for v in as_list(value, key)]
        if all(map(math.isfinite, numbers)):
            return numbers
    except (TypeError, ValueError):
        pass
    raise UserError(f"{key}: got {value!r}, expected numbers, e.g. 1,0.5,0.5,1")
