"""Reads and judges records: what is whole, finished, of our schema and unique is used; the rest is listed with its reason."""

import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.records import INSPECT, RUN, fault
from tq_lightning.report.inputs import Candidate, find

SCHEMA = 1
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
    record: dict[str, Any] = field(repr=False)

    @property
    def widths(self) -> list[int]:
        """Widths in bits that the record holds, ascending."""
        return sorted(int(w) for w in self.record["widths"])

    @property
    def budget(self) -> tuple[int | None, int | None]:
        """(epochs, steps) really taken."""
        return self.record.get("epochs"), self.record.get("steps")

    @functools.cached_property
    def has_test(self) -> bool:
        """True where the test block names a value for every width and both sources."""
        return all(self._test(source, w) is not None for source in SOURCES for w in self.widths)

    def _test(self, source: str, width: int) -> float | None:
        metrics = (self.record.get("test") or {}).get("metrics", {})
        return metrics.get(f"test/acc1_{source}_w{width}")

    def acc1(self, source: str, width: int, split: str) -> float | None:
        """Top-1 in per cent of `source` at `width` bits on `split` ("val": at the best epoch, or "test")."""
        if split == "test":
            return self._test(source, width)
        return self.record["widths"].get(str(width), {}).get(source)

    def acc1_float(self, split: str) -> float | None:
        """Top-1 in per cent of the float weights, None where it was not evaluated."""
        blocks = (
            [self.record.get("test") or {}] if split == "test" else [self.record.get("best") or {}]
        )
        return next(
            (
                b["metrics"][k]
                for b in blocks
                for k in [f"{split}/acc1_float"]
                if k in b.get("metrics", {})
            ),
            None,
        )


@dataclass
class Loaded:
    """What a set of inputs holds: usable runs, inspect records, and (path, reason) of what was left out."""

    runs: list[Run]
    inspects: list[dict[str, Any]]
    left_out: list[tuple[str, str]]


def load(inputs: list[str], full_paths: bool = False) -> Loaded:
    """Read everything under `inputs`. Raises `UserError` where nothing usable is found."""
    runs: dict[str, list[tuple[str, dict]]] = {}
    inspects: dict[str, list[tuple[str, dict]]] = {}
    left_out: list[tuple[str, str]] = []
    for candidate in find(inputs):
        record, reason = read(candidate)
        if reason is not None:
            left_out.append((candidate.shown, reason))
            continue
        kind = inspects if record.get("kind") == "inspect" else runs
        kind.setdefault(record["id"], []).append((candidate.shown, record))
    kept = [_one_of(group, left_out) for group in runs.values()]
    described = [_one_of(group, left_out) for group in inspects.values()]
    loaded = Loaded(
        runs=[_run(path, record, full_paths) for path, record in filter(None, kept)],
        inspects=[
            record if full_paths else shorten(record) for _, record in filter(None, described)
        ],
        left_out=left_out,
    )
    if not loaded.runs and not loaded.inspects:
        first = "; ".join(f"{path}: {reason}" for path, reason in left_out[:3])
        more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        raise UserError(f"no usable record among {len(left_out)}: {first}{more}")
    return loaded


def read(candidate: Candidate) -> tuple[dict[str, Any], str | None]:
    """(record, None), or ({}, why it is left out)."""
    if candidate.refusal is not None:
        return {}, candidate.refusal
    try:
        record = json.loads(Path(candidate.path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "no such file"
    except OSError as error:
        return {}, f"can't be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return {}, f"broken JSON, half-written perhaps: {str(error).splitlines()[0]}"
    if not isinstance(record, dict) or "schema" not in record:
        return {}, "not a record of tq_lightning: it has no key 'schema'"
    if record["schema"] != SCHEMA:
        return (
            {},
            f"schema {record['schema']!r}; this version reads schema {SCHEMA}: use the version that wrote it",
        )
    return record, fault(record, INSPECT) if record.get("kind") == "inspect" else _run_fault(record)


def _run_fault(record: dict) -> str | None:
    if record.get("kind", "run") != "run":
        return f"kind {record['kind']!r}; this report reads runs and inspect records"
    if isinstance(record.get("status"), str) and record["status"] != "finished":
        reason = str(record.get("reason") or "no reason given").splitlines()[0]
        return f"unfinished: status {record['status']} ({reason})"
    if wrong := fault(record, RUN):
        return wrong
    return None if record["widths"] else "holds no width: a float run has nothing to compare"


def _one_of(
    group: list[tuple[str, dict]], left_out: list[tuple[str, str]]
) -> tuple[str, dict] | None:
    """One record of those with the same id: equal copies count once, contradicting ones not at all.

    A copy from before `test` added its block (W&B keeps such a one) is a copy, not a contradiction.
    """
    group = sorted(group, key=lambda item: ("test" not in item[1], len(Path(item[0]).parts)))
    path, record = group[0]
    for _, twin in group[1:]:
        if _without_test(twin) != _without_test(record) or (
            "test" in twin and twin["test"] != record["test"]
        ):
            paths = ", ".join(p for p, _ in group)
            left_out += [
                (p, f"two runs with one id ({record['id']}) that differ: {paths}") for p, _ in group
            ]
            return None
    # Only once none contradicts: of a group that is left out whole, no copy is counted.
    left_out += [
        (other, f"a copy of {path} (id {record['id']}): counted once") for other, _ in group[1:]
    ]
    return path, record


def _without_test(record: dict) -> str:
    return json.dumps(
        {k: v for k, v in record.items() if k != "test"}, sort_keys=True
    )  # text: NaN equals NaN


def _run(path: str, record: dict, full_paths: bool) -> Run:
    config = flatten(record["config"])
    if not full_paths:
        record = shorten(record)
    seed = record.get("seed", config.get("seed_everything"))
    return Run(id=record["id"], path=path, seed=seed, config=config, record=record)


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
