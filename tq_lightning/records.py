"""What a record's values must be for the report to use them: a record that breaks this is broken, listed and left out."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tq_lightning.files import atomic_write

# Where a value stands ("*" is any key; "!" at the end: must be there if what it is in is) -> what it must be. A value may
# also be missing or null where there is no "!".
RUN: dict[str, str] = {
    "id!": "text",
    "status!": "text",
    "config!": "mapping",
    "widths!": "mapping",
    "config.model": "mapping",
    "config.data": "mapping",
    "config.trainer": "mapping",
    "config.model.widths": "widths",
    "seed": "whole number",
    "epochs": "whole number",
    "steps": "whole number",
    "seconds": "number",
    "started": "text",
    "versions": "mapping",
    "best": "mapping",
    "best.metrics!": "mapping",
    "best.metrics.val/acc1_float": "number",
    "test": "mapping",
    "test.metrics!": "mapping",
    "test.metrics.*": "number",
    "bytes": "mapping",
    "bytes.planes": "mapping",
    "bytes.planes.*": "number",
    "curves": "mapping",
    "curves.*": "points",
    "widths.*!": "mapping",
    "widths.*.quantize!": "number",
    "widths.*.truncate!": "number",
    "widths.*.disagree": "number",
    "widths.*.qt_gap": "number",
}
INSPECT: dict[str, str] = {
    "id!": "text",
    "model!": "text",
    "parameters!": "whole number",
    "policy": "mapping",
    "policy.skip": "list",
    "accounting": "list",
    "ways": "mapping",
    "ways.float_master!": "mapping",
    "ways.*": "mapping",
    "ways.*.total!": "number",
    "ways.*.*": "number",
    "read_at": "mapping",
    "read_at.*": "number",
    "energy": "mapping",
    "energy.source": "text",
    "energy.assumptions!": "texts",
    "energy.constants_pj": "mapping",
    "energy.by_width": "mapping",
    "energy.by_width.*!": "mapping",
    "energy.by_width.*.*!": "number",
    "mechanism": "mapping",
    "mechanism.bits!": "widths",
    "mechanism.u!": "numbers",
    "mechanism.round!": "mapping",
    "mechanism.round_shifted!": "mapping",
    "mechanism.floor!": "mapping",
    "mechanism.round.*": "numbers",
    "mechanism.round_shifted.*": "numbers",
    "mechanism.floor.*": "numbers",
}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _widths(value: Any) -> bool:
    """A list of bits, or the text of one, as the command line takes it."""
    parts = value.strip("[]").split(",") if isinstance(value, str) else value
    return isinstance(parts, list) and all(str(part).strip().isdigit() for part in parts)


KINDS = {
    "text": lambda v: isinstance(v, str),
    "texts": lambda v: isinstance(v, list) and all(isinstance(i, str) for i in v),
    "mapping": lambda v: isinstance(v, dict),
    "list": lambda v: isinstance(v, list),
    "number": _number,
    "numbers": lambda v: isinstance(v, list) and all(map(_number, v)),
    "whole number": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "widths": _widths,
    "points": lambda v: (
        isinstance(v, list)
        and all(isinstance(p, list) and len(p) == 2 and _number(p[0]) for p in v)
    ),
}
WORDS = {
    "text": "text",
    "texts": "a list of texts",
    "numbers": "a list of numbers",
    "widths": "a list of widths in bits",
}
WORDS |= {"points": "a list of pairs"}
KEYED_BY_BITS = ("widths", "read_at", "energy.by_width", "bytes.planes")


def fault(record: dict[str, Any], shape: dict[str, str]) -> str | None:
    """What is wrong with a record, in words: `broken: test.metrics is [], not a mapping`; None where nothing is."""
    for pattern, kind in shape.items():
        needed = pattern.endswith("!")
        for where, value in _values(record, pattern.rstrip("!").split(".")):
            if value is None and not needed:
                continue
            if value is None or not KINDS[kind](value):
                got = (
                    "missing"
                    if value is None
                    else f"{str(value)[:40]!r}, not {WORDS.get(kind, f'a {kind}')}"
                )
                return f"broken: {where} is {got}"
            if where in KEYED_BY_BITS and not all(key.isdigit() for key in value):
                return f"broken: {where} has a key that is no width in bits"
    return None


def _values(tree: Any, keys: list[str], before: str = "") -> Iterator[tuple[str, Any]]:
    """(where, value) of each match of a pattern; nothing where what it would be in is missing or no mapping."""
    if not isinstance(tree, dict):
        return
    first, rest = keys[0], keys[1:]
    for key in tree if first == "*" else [first]:
        where = f"{before}{key}"
        if rest:
            yield from _values(tree.get(key), rest, f"{where}.")
        else:
            yield where, tree.get(key)


SCHEMA = 1


MONITOR = "val/acc1_truncate_mean"


NAME = "record.json"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=True))
