"""Convert dataclasses to JSON types and back, validated against their annotations.

A field without a default is required; one with a default may be missing or null. Maps with integer
keys are keyed by the width in bits.
"""

import math
import re
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NewType, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from tq_lightning.errors import UserError

MAX_DEPTH = 100  # nested mappings and lists; the functions here are recursive
SCHEMA = 1  # fields are added to it, never renamed or removed
Number = float  # an alias, because some fields are named "float"
Points = NewType("Points", list)  # [[epoch, value], ...]
WRITTEN_AS_NULL = ("reason", "seed", "commit", "bits")


class RecordError(UserError):
    """A file that is not a usable record; the message is the reason, without the path."""


T = TypeVar("T")
_KINDS: dict[Any, tuple[str, Any]] = {
    str: ("text", lambda v: isinstance(v, str)),
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: ("an integer", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    float: (
        "a number",
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v),
    ),
    dict: ("a mapping", lambda v: isinstance(v, dict)),
    list: ("a list", lambda v: isinstance(v, list)),
    Points: (
        "a list of pairs",
        lambda v: (
            isinstance(v, list)
            and all(isinstance(p, list) and len(p) == 2 and _is_number(p[0]) for p in v)
        ),
    ),
}


def _is_number(value: Any) -> bool:
    return bool(_KINDS[float][1](value))


def check_depth(tree: Any) -> None:
    """Check that JSON types are nested at most MAX_DEPTH deep.

    Raises:
        RecordError: they are nested deeper.
    """
    level = [tree]
    for _ in range(MAX_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level]
        level = [child for values in inner for child in values if isinstance(child, dict | list)]
        if not level:
            return
    raise RecordError(f"broken: more than {MAX_DEPTH} nested mappings or lists")


def shortened(value: Any) -> str:
    """Return the start of a value as a quoted string, for errors."""
    return repr(str(value)[:40])


def check(kind: Any, value: Any, where: str) -> Any:
    """Check a value against an annotation and convert it.

    Args:
        kind: the annotation of the field.
        value: JSON types.
        where: dotted path of the field, named in errors.

    Raises:
        RecordError: the value is missing or of another type.
    """
    if kind is Any:
        return value
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        return None if value is None else check(get_args(kind)[0], value, where)
    if value is None:
        raise RecordError(f"broken: {where} is missing")
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if is_dataclass(origin):
        return from_tree(cast(type, origin), check(dict, value, where), f"{where}.")
    words, accepts = _KINDS[origin]
    if not accepts(value):
        raise RecordError(f"broken: {where} is {shortened(value)}, not {words}")
    if origin is dict and inner:
        if inner[0] is int and not all(re.fullmatch("[0-9]+", str(key)) for key in value):
            raise RecordError(f"broken: {where} has a key that is not a width in bits")
        return {inner[0](key): check(inner[1], v, f"{where}.{key}") for key, v in value.items()}
    if origin is list and inner:
        return [check(inner[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    return value


def from_tree(kind: type[T], tree: dict[str, Any], before: str) -> T:
    """Build a dataclass from JSON types; `before` is the prefix of its fields in errors ("a.")."""
    values, hints = {}, get_type_hints(kind)
    for f in fields(kind):  # type: ignore[arg-type]
        optional = f.default is not MISSING or f.default_factory is not MISSING
        if tree.get(f.name) is None and optional:
            continue
        values[f.name] = check(hints[f.name], tree.get(f.name), f"{before}{f.name}")
    return kind(**values)


def to_tree(value: Any) -> Any:
    """Convert a dataclass to JSON types; None is omitted, except for WRITTEN_AS_NULL."""
    if is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in fields(value))
        return {k: to_tree(v) for k, v in pairs if v is not None or k in WRITTEN_AS_NULL}
    if isinstance(value, dict):
        return {str(key): to_tree(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_tree(v) for v in value]
    return value
