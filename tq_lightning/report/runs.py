"""Read records. Keep finished, unique ones and list the others with a reason."""

import functools
import json
from dataclasses import dataclass, field
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.records import SOURCES, InspectRecord, Metric, Record, metric_of, read_any
from tq_lightning.records.publish import flatten, printable, published
from tq_lightning.report.inputs import Candidate, find


@dataclass(frozen=True)
class Run:
    """A usable run. `config` is flat: {"model.name": ...}; scores are in the unit of `metric`."""

    id: str
    path: str
    seed: int | None
    config: dict[str, Any]
    record: Record = field(repr=False)

    @property
    def widths(self) -> list[int]:
        """Recorded widths in bits, ascending."""
        return sorted(self.record.widths or {})

    @property
    def budget(self) -> tuple[int | None, int | None]:
        """(epochs, steps) taken."""
        return self.record.epochs, self.record.steps

    @functools.cached_property
    def metric(self) -> Metric:
        """Metric of the task of the run."""
        return metric_of(self.record.best.metrics if self.record.best else ())

    @functools.cached_property
    def has_test(self) -> bool:
        """True if the test block has a value for every width and both sources."""
        return all(self.score(s, w, "test") is not None for s in SOURCES for w in self.widths)

    def _recorded(self, split: str, name: str) -> float | None:
        block = self.record.test if split == "test" else self.record.best
        return None if block is None else block.metrics.get(f"{split}/{self.metric.key}_{name}")

    def score(self, source: str, width: int, split: str) -> float | None:
        """Metric of `source` at `width` bits on `split`: "test", or "val" at the best epoch."""
        if split == "test":
            return self._recorded(split, f"{source}_w{width}")
        return getattr((self.record.widths or {}).get(width), source, None)

    def score_float(self, split: str) -> float | None:
        """Metric of the float weights, or None if it was not evaluated."""
        return self._recorded(split, "float")


@dataclass
class Loaded:
    """Usable runs, inspect records, and (path, reason) of every file that was left out."""

    runs: list[Run]
    inspects: list[InspectRecord]
    left_out: list[tuple[str, str]]


def load(inputs: list[str], full_paths: bool = False) -> Loaded:
    """Read all records under `inputs`. `full_paths` keeps absolute paths of the machine.

    Raises:
        UserError: an input does not exist, or no record is usable.
    """
    by_id: dict[tuple[type, str], list[tuple[str, Any]]] = {}
    left_out: list[tuple[str, str]] = []
    for candidate in find(inputs):
        record, reason = read(candidate)
        if record is None:
            left_out.append((candidate.shown, reason))
        else:
            by_id.setdefault((type(record), record.id), []).append((candidate.shown, record))
    kept = [one for same in by_id.values() if (one := _one_of(same, left_out)) is not None]
    if not kept:
        first = "; ".join(f"{path}: {reason}" for path, reason in left_out[:3])
        more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        raise UserError(f"no usable record among {len(left_out)}: {first}{more}")
    runs = [_run(path, r, full_paths) for path, r in kept if isinstance(r, Record)]
    inspects = [published(r, full_paths) for _, r in kept if isinstance(r, InspectRecord)]
    return Loaded(runs, inspects, left_out)


def read(candidate: Candidate) -> tuple[Record | InspectRecord | None, str]:
    """Return (record, "") or (None, the reason to leave it out)."""
    if candidate.refusal is not None:
        return None, candidate.refusal
    try:
        record = read_any(candidate.path)
    except UserError as error:
        return None, printable(str(error))
    if isinstance(record, InspectRecord):
        return record, ""
    if record.status != "finished":
        reason = (record.reason or "no reason given").splitlines()[0]
        return None, printable(f"unfinished: status {record.status} ({reason})")
    if not record.widths:
        return None, "a float run: it has no widths to compare"
    return record, ""


def _one_of(same: list[tuple[str, Any]], left_out: list[tuple[str, str]]) -> Any:
    """Choose the (path, record) to use among copies, or return None if they contradict each other.

    A copy made before `test` added its block (W&B keeps one) is not a contradiction.
    """
    same = sorted(same, key=lambda r: (getattr(r[1], "test", None) is None, r[0].count("/")))
    path, record = same[0]
    tests = {repr(r.test) for _, r in same if getattr(r, "test", None) is not None}
    trees = ({k: v for k, v in r.tree().items() if k not in ("test", "tests")} for _, r in same)
    rests = {json.dumps(tree, sort_keys=True) for tree in trees}
    if len(rests) > 1 or len(tests) > 1:  # as text, NaN equals NaN
        paths = ", ".join(p for p, _ in same)
        reason = f"different runs with the same id ({record.id}): {paths}"
        left_out += [(p, reason) for p, _ in same]
        return None
    left_out += [(p, f"a copy of {path} (id {record.id}), counted once") for p, _ in same[1:]]
    return path, record


def _run(path: str, record: Record, full_paths: bool) -> Run:
    # Arms can differ in their paths, so the configuration keeps them.
    config = flatten(printable(record.config))
    seed = record.seed if record.seed is not None else config.get("seed_everything")
    return Run(record.id, path, seed, config, published(record, full_paths))
