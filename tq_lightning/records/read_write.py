"""Read and write record.json of either kind."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write
from tq_lightning.records.inspect import InspectRecord
from tq_lightning.records.json_tree import (
    SCHEMA,
    Number,
    RecordError,
    check,
    check_depth,
    from_tree,
    shortened,
)
from tq_lightning.records.metrics import ACC1, is_accuracy, metric_of
from tq_lightning.records.run import ModelBytes, Record

NAME = "record.json"
SOURCES = ("quantize", "truncate")  # fields of WidthResult, as quant.bit_width.SOURCES


def read_any(path: str | Path) -> Record | InspectRecord:
    """Read a record of either kind.

    Raises:
        RecordError: the file is missing, unreadable or damaged, or does not match the schema.
    """
    if Path(path).exists() and not Path(path).is_file():  # a folder, or a pipe, which could block
        raise RecordError("not a regular file")
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError("no such file") from None
    except OSError as error:
        raise RecordError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(
            f"broken JSON, maybe half-written: {str(error).splitlines()[0]}"
        ) from None
    try:
        return parse(tree)
    except (ValueError, OverflowError) as error:  # e.g. an integer of 400 digits
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"broken: {error}") from None


def parse(tree: Any) -> Record | InspectRecord:
    """Build a record from JSON types. Raises RecordError like `read_any`."""
    if not isinstance(tree, dict) or "schema" not in tree:
        raise RecordError("not a record of tq_lightning: the key 'schema' is missing")
    check_depth(tree)
    if tree["schema"] != SCHEMA:
        raise RecordError(
            f"schema {tree['schema']!r}; this version reads schema {SCHEMA}: "
            "use the version that wrote it"
        )
    kind = tree.get("kind", "run")
    if kind == "inspect":
        inspected: InspectRecord = from_tree(InspectRecord, tree, "")
        if inspected.ways and "float_master" not in inspected.ways:
            raise RecordError("broken: ways.float_master is missing")
        return inspected
    if kind != "run":
        raise RecordError(f"kind {kind!r}; supported kinds are run and inspect")
    record: Record = from_tree(Record, tree, "")
    for key in ("model", "data", "trainer"):
        check(dict, record.config.get(key, {}), f"config.{key}")
    widths = (record.config.get("model") or {}).get("widths")
    if widths is not None and not _is_widths(widths):
        raise RecordError(
            f"broken: config.model.widths is {shortened(widths)}, not a list of widths"
        )
    if record.best is not None:
        check(
            Number | None, record.best.metrics.get("val/acc1_float"), "best.metrics.val/acc1_float"
        )
    _check_ranges(record)
    known = {f.name for f in fields(Record)} | {"schema", "kind"}
    return replace(record, more={key: value for key, value in tree.items() if key not in known})


def read_record(path: str | Path) -> Record:
    """Read the record of a run.

    Raises:
        UserError: `path` is not the record of a run; the message names the file.
    """
    try:
        record = read_any(path)
    except RecordError as error:
        raise UserError(f"{path}: {error}; restore the file or start a new run") from None
    if not isinstance(record, Record):
        raise UserError(f"{path} is an inspect record; pass the record.json of a run")
    return record


def write_record(path: str | Path, record: Record | InspectRecord) -> None:
    """Write a record atomically."""
    indent = 1 if isinstance(record, Record) else None
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record.tree(), indent=indent), encoding="utf-8")


def mark_superseded(path: str | Path) -> None:
    """Mark the record of a trial that was given to another worker, so that it counts only once."""
    reason = "its trial was given to another worker"
    write_record(path, replace(read_record(path), status="interrupted", reason=reason))


def _check_ranges(record: Record) -> None:
    """Check that accuracies lie in 0..100 and that byte counts are not negative.

    Raises:
        RecordError: a value is out of range.
    """
    blocks = {"best": record.best, "last": record.last, "test": record.test}
    blocks |= {f"tests[{i}]": test for i, test in enumerate(record.tests or [])}
    found = {
        f"{name}.metrics.{key}": value
        for name, block in blocks.items()
        for key, value in (block.metrics if block is not None else {}).items()
        if is_accuracy(key)
    }
    for key, points in (record.curves or {}).items():
        if is_accuracy(key):
            found |= {f"curves.{key}[{i}]": value for i, (_, value) in enumerate(points)}
    if record.best is not None and metric_of(record.best.metrics) is ACC1:
        for bits, width in (record.widths or {}).items():
            found |= {f"widths.{bits}.{source}": getattr(width, source) for source in SOURCES}
    for where, value in found.items():
        if isinstance(value, int | float) and not 0 <= value <= 100:
            raise RecordError(f"broken: {where} is {value:g}, not an accuracy from 0 to 100 %")
    size = record.bytes or ModelBytes()
    counts = {"float": size.float, "packed": size.packed}
    counts |= {f"planes.{bits}": count for bits, count in size.planes.items()}
    for key, count in counts.items():
        if count is not None and count < 0:
            raise RecordError(f"broken: bytes.{key} is {count}, not a number of bytes")


def _is_widths(value: Any) -> bool:
    """Return True for a list of bits, or its text form on the command line."""
    if isinstance(value, str):
        value = value.strip("[]() ").removesuffix(",").split(",")
    parts = value if isinstance(value, list) else [value]
    return all(re.fullmatch(r"[0-9]+(\.0*)?", str(part).strip(" '\"")) for part in parts)
