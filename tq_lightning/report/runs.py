"""Reads and judges records: what is whole, finished, of our schema and unique is used; the rest is listed with its reason."""

import functools
import json
import re
from dataclasses import dataclass, field
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.records import InspectRecord, Record, RecordError, parse, read_any
from tq_lightning.report.inputs import Candidate, find

SOURCES = ("quantize", "truncate")
# An absolute path of the machine that ran: at least two folders deep, and no part of a URL.
ABSOLUTE = re.compile(r"(?<![\w.:/…-])/(?:[^\s/'\",=:]+/)+([^\s/'\",=:]*)")


@dataclass(frozen=True)
class Run:
    """One usable run. `config` is flat: {"model.name": ...}; accuracies are top-1 in per cent."""

    id: str
    path: str
    seed: int | None
    config: dict[str, Any]
    record: Record = field(repr=False)

    @property
    def widths(self) -> list[int]:
        """Widths in bits that the record holds, ascending."""
        return sorted(self.record.widths or {})

    @property
    def budget(self) -> tuple[int | None, int | None]:
        """(epochs, steps) really taken."""
        return self.record.epochs, self.record.steps

    @functools.cached_property
    def has_test(self) -> bool:
        """True where the test block names a value for every width and both sources."""
        return all(self._test(f"acc1_{s}_w{w}") is not None for s in SOURCES for w in self.widths)

    def _test(self, metric: str) -> float | None:
        test = self.record.test
        return None if test is None else test.metrics.get(f"test/{metric}")

    def acc1(self, source: str, width: int, split: str) -> float | None:
        """Top-1 in per cent of `source` at `width` bits on `split` ("val": at the best epoch, or "test")."""
        if split == "test":
            return self._test(f"acc1_{source}_w{width}")
        result = (self.record.widths or {}).get(width)
        return None if result is None else getattr(result, source)

    def acc1_float(self, split: str) -> float | None:
        """Top-1 in per cent of the float weights, None where it was not evaluated."""
        if split == "test":
            return self._test("acc1_float")
        best = self.record.best
        return None if best is None else best.metrics.get("val/acc1_float")


@dataclass
class Loaded:
    """What a set of inputs holds: usable runs, inspect records, and (path, reason) of what was left out."""

    runs: list[Run]
    inspects: list[InspectRecord]
    left_out: list[tuple[str, str]]


def load(inputs: list[str], full_paths: bool = False) -> Loaded:
    """Read everything under `inputs`. Raises `UserError` where nothing usable is found."""
    runs: dict[str, list[tuple[str, Record]]] = {}
    inspects: dict[str, list[tuple[str, InspectRecord]]] = {}
    left_out: list[tuple[str, str]] = []
    for candidate in find(inputs):
        record, reason = read(candidate)
        if isinstance(record, Record):
            runs.setdefault(record.id, []).append((candidate.shown, record))
        elif record is not None:
            inspects.setdefault(record.id, []).append((candidate.shown, record))
        else:
            left_out.append((candidate.shown, reason))
    kept = [_one_of(group, left_out) for group in runs.values()]
    described = [_one_of(group, left_out) for group in inspects.values()]
    loaded = Loaded(
        runs=[_run(path, record, full_paths) for path, record in filter(None, kept)],
        inspects=[
            record if full_paths else parse(shorten(record.tree()))
            for _, record in filter(None, described)
        ],
        left_out=left_out,
    )
    if not loaded.runs and not loaded.inspects:
        first = "; ".join(f"{path}: {reason}" for path, reason in left_out[:3])
        more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        raise UserError(f"no usable record among {len(left_out)}: {first}{more}")
    return loaded


def read(candidate: Candidate) -> tuple[Record | InspectRecord | None, str]:
    """(record, "") or (None, why it is left out)."""
    if candidate.refusal is not None:
        return None, candidate.refusal
    try:
        record = read_any(candidate.path)
    except RecordError as error:
        return None, str(error)
    if isinstance(record, InspectRecord):
        return record, ""
    if record.status != "finished":
        reason = (record.reason or "no reason given").splitlines()[0]
        return None, f"unfinished: status {record.status} ({reason})"
    if not record.widths:
        return None, "holds no width: a float run has nothing to compare"
    return record, ""


def _one_of(group: list[tuple[str, Any]], left_out: list[tuple[str, str]]) -> Any:
    """One (path, record) of those with the same id: equal copies count once, contradicting ones not at all.

    A copy from before `test` added its block (W&B keeps such a one) is a copy, not a contradiction.
    """
    group = sorted(group, key=lambda item: (_test_text(item[1]) is None, item[0].count("/")))
    path, record = group[0]
    for _, twin in group[1:]:
        if _text(twin) != _text(record) or _test_text(twin) not in (None, _test_text(record)):
            paths = ", ".join(p for p, _ in group)
            left_out += [
                (p, f"two runs with one id ({record.id}) that differ: {paths}") for p, _ in group
            ]
            return None
    # Only once none contradicts: of a group that is left out whole, no copy is counted.
    left_out += [
        (other, f"a copy of {path} (id {record.id}): counted once") for other, _ in group[1:]
    ]
    return path, record


def _text(record: Record | InspectRecord) -> str:
    """A record without its tests, as text: NaN equals NaN."""
    tree = record.tree(("test",)) if isinstance(record, Record) else record.tree()
    return json.dumps(tree, sort_keys=True)


def _test_text(record: Record | InspectRecord) -> str | None:
    test = record.test if isinstance(record, Record) else None
    return None if test is None else repr(test)


def _run(path: str, record: Record, full_paths: bool) -> Run:
    config = flatten(record.config)
    shown: Any = record if full_paths else parse(shorten(record.tree()))
    seed = record.seed if record.seed is not None else config.get("seed_everything")
    return Run(id=record.id, path=path, seed=seed, config=config, record=shown)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"name": x}} -> {"model.name": x}; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def shorten(value: Any) -> Any:
    """Absolute paths inside a record, however deep, as …/last part: a report is published, the machine's folders are not."""
    if isinstance(value, str):
        return ABSOLUTE.sub(r"…/\1", value)
    if isinstance(value, dict):
        return {key: shorten(item) for key, item in value.items()}
    if isinstance(value, list) and not _numbers(value):
        return [shorten(item) for item in value]
    return value


def _numbers(value: list[Any]) -> bool:
    """A list that begins with a number, or with a list of numbers: the curves, which are most of a record."""
    return bool(value) and (
        isinstance(value[0], int | float) or (isinstance(value[0], list) and _numbers(value[0]))
    )
