"""Prepare records for publication in a report: printable text without absolute paths."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from tq_lightning.records.inspect import InspectRecord
from tq_lightning.records.read_write import parse
from tq_lightning.records.run import Record

T = TypeVar("T")
# An absolute path on the machine of the run, at least two folders deep and not part of a URL.
ABSOLUTE = re.compile(r"(?<![\w.:/…-])/(?:[^\s/'\",=:]+/)+([^\s/'\",=:]*)")


def published(record: Record | InspectRecord, full_paths: bool = False) -> Any:
    """Return a copy of a record with printable text and short paths, or `full_paths`."""
    tree = record.tree()
    return parse(printable(tree) if full_paths else shorten(tree))


def printable(value: T) -> T:
    """Replace lone surrogates and control characters in every string, such as file names."""
    return _walk(value, _printable)


def shorten(value: T) -> T:
    """Shorten absolute paths to …/last part, and make every string printable."""
    return _walk(value, lambda text: ABSOLUTE.sub(r"…/\1", _printable(text)))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten {"model": {"name": x}} to {"model.name": x}. Lists are not flattened."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _printable(text: str) -> str:
    kept = text.encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "?", kept)


def _walk(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string. Lists of numbers are returned as they are, for speed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_printable(key): _walk(item, change) for key, item in value.items()}
    if isinstance(value, list) and not _numbers(value):
        return [_walk(item, change) for item in value]
    return value


def _numbers(value: list[Any]) -> bool:
    first = value[0] if value else None
    return isinstance(first, int | float) or (isinstance(first, list) and _numbers(first))
