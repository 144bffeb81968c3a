"""record.json: its fields, its checks, and the only code that reads or writes it.

A run writes a `Record`, `inspect --out` an `InspectRecord`. The dataclasses below are the schema: a
file is checked against their annotations when it is read. A field without a default is required;
one with a default may be missing or null. Maps with integer keys are keyed by the width in bits.
Fields are added to schema 1, never renamed or removed.
"""

import json
import math
import types
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NewType, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from tq_lightning.errors import UserError
from tq_lightning.files import atomic_write

SCHEMA = 1
NAME = "record.json"
MONITOR = "val/acc1_truncate_mean"  # the metric that chooses a run's best epoch
STORAGE_BYTES = "storage/bytes"  # a sweep objective: the size of the packed file

WRITTEN_AS_NULL = ("reason", "seed", "commit", "bits")
Number = float  # a field below is called "float"
Points = NewType("Points", list)  # [[epoch, value], ...]

# ways of storing weights that serve every width -> label
STORAGE_LABELS = {
    "float_master": "float master, one norm set",
    "file_per_width": "one file per width",
    "master8": "8-bit codes, one norm set",
    "packed": "packed file, all norm sets",
    "paper": "accounting of the paper",
}

# quantizers of the first records, which lack the fields `ste` and `nested` -> (paired STE, nested)
_PAIRED = {"floor": ("scaled", True), "round": ("identity", False)}


class RecordError(UserError):
    """A file that is not a usable record; the message is the reason, without the path."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one validation epoch, by key; accuracies in %."""

    metrics: dict[str, Any]
    epoch: int | None = None
    monitor: str | None = None
    step: int | None = None  # optimizer steps at that time


@dataclass(frozen=True)
class WidthResult:
    """Top-1 in % of both sources at one width, at the best epoch.

    `qt_gap` is in percentage points. `disagree` is the share of weight codes that differ between
    the sources.
    """

    quantize: Number
    truncate: Number
    qt_gap: Number | None = None
    disagree: Number | None = None


@dataclass(frozen=True)
class TestResult:
    """Metrics of one `test`: of which checkpoint and epoch, on how many images of which data."""

    metrics: dict[str, Number]
    checkpoint: str | None = None
    epoch: int | None = None
    images: int | None = None
    data: dict[str, Any] | None = None  # name and root
    split: str | None = None
    batches: int | None = None  # if not the whole split was tested
    __test__ = False  # not a test case of pytest's


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of the float parameters, of the packed file, and read to run at each width."""

    float: int | None = None
    packed: int | None = None
    planes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """A run: its configuration, its environment, its status and its results."""

    id: str
    status: str  # running, finished, failed or interrupted
    config: dict[str, Any]
    reason: str | None = None
    command: str | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool | None = None
    device: str | None = None
    processes: int | None = None
    started: str | None = None
    seconds: Number = 0.0
    parameters_quantized: Number | None = None  # share of the parameters
    ste: str | None = None  # STE of the weights, with "auto" resolved
    nested: bool | None = None  # codes of the weights nest: both sources agree by construction
    steps: int | None = None
    epochs: int | None = None
    curves: dict[str, Points] | None = None
    last: Evaluation | None = None
    best: Evaluation | None = None
    widths: dict[int, WidthResult] | None = None
    bytes: ModelBytes | None = None
    test: TestResult | None = None  # of the run's own data, all of the split
    tests: list[TestResult] | None = None  # of other data or of a part; no table takes them
    more: dict[str, Any] = field(default_factory=dict)  # top-level fields this version doesn't know

    @property
    def _quantizer(self) -> tuple[str | None, bool]:
        """(paired STE, nested) of the quantizer by name."""
        model = self.config.get("model") or {}
        return _PAIRED.get(str(model.get("quantizer")), (None, False))

    @property
    def ste_used(self) -> str | None:
        """The STE of the weights, with "auto" resolved also in records without the field `ste`."""
        chosen = (self.config.get("model") or {}).get("ste") or "auto"
        return self.ste or (self._quantizer[0] if chosen == "auto" else chosen)

    @property
    def ste_is_paired(self) -> bool:
        """True if the STE is the one that the paper pairs with the quantizer."""
        chosen = (self.config.get("model") or {}).get("ste") or "auto"
        return chosen in ("auto", self._quantizer[0])

    @property
    def codes_nest(self) -> bool:
        """`nested`, also in records without the field."""
        return self._quantizer[1] if self.nested is None else self.nested

    def tree(self, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """The record as JSON types, except the fields named in `without`."""
        tree = {"schema": SCHEMA, **_to_tree(self)}
        tree |= tree.pop("more")
        return {key: value for key, value in tree.items() if key not in without}


@dataclass(frozen=True)
class Layer:
    """A row of the byte table.

    `bits` is None for a layer left in float. `bytes` is keyed by storage scheme.
    """

    name: str
    kind: str
    shape: list[int]
    parameters: int
    bits: int | None = None
    bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StorageBytes:
    """Bytes of one storage scheme, in total and by part."""

    total: Number
    weights: Number = 0
    scales: Number = 0
    float: Number = 0
    norms: Number = 0


@dataclass(frozen=True)
class Energy:
    """The energy model: pJ by width and kind, its constants, its assumptions and its source."""

    assumptions: list[str]
    constants_pj: dict[str, Number] = field(default_factory=dict)
    source: str | None = None
    by_width: dict[int, dict[str, Number]] = field(default_factory=dict)


@dataclass(frozen=True)
class Mechanism:
    """Levels over u in [0, 1] by width: rounded, rounded at 8 bits then shifted, and floored."""

    bits: list[int]
    u: list[Number]
    round: dict[int, list[Number]]
    round_shifted: dict[int, list[Number]]
    floor: dict[int, list[Number]]


@dataclass(frozen=True)
class InspectRecord:
    """Bytes and energy of a model under a quantization policy, computed without running it."""

    id: str
    model: str
    parameters: int
    model_args: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    command: str | None = None
    quantized_parameters: int | None = None
    layers: list[Layer] = field(default_factory=list)
    ways: dict[str, StorageBytes] = field(default_factory=dict)
    read_at: dict[int, Number] = field(default_factory=dict)
    paper_ratio: Number | None = None
    policy_ratio: Number | None = None
    energy: Energy | None = None
    mechanism: Mechanism | None = None
    accounting: list[str] = field(default_factory=list)

    def tree(self) -> dict[str, Any]:
        """The record as JSON types."""
        return {"schema": SCHEMA, "kind": "inspect", **_to_tree(self)}

    @property
    def skipped(self) -> str:
        """Layers left in float, as text."""
        return ", ".join(map(str, self.policy.get("skip") or [])) or "nothing"


# -- reading and writing -------------------------------------------------------------------------
def read_any(path: str | Path) -> Record | InspectRecord:
    """Read a record of either kind.

    Raises:
        RecordError: the file is missing, unreadable or damaged, or breaks the schema.
    """
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
    return parse(tree)


def parse(tree: Any) -> Record | InspectRecord:
    """Build a record from JSON types. Raises RecordError as `read_any` does."""
    if not isinstance(tree, dict) or "schema" not in tree:
        raise RecordError("not a record of tq_lightning: the key 'schema' is missing")
    if tree["schema"] != SCHEMA:
        raise RecordError(
            f"schema {tree['schema']!r}; this version reads schema {SCHEMA}: "
            "use the version that wrote it"
        )
    kind = tree.get("kind", "run")
    if kind == "inspect":
        inspected: InspectRecord = _from_tree(InspectRecord, tree, "")
        if inspected.ways and "float_master" not in inspected.ways:
            raise RecordError("broken: ways.float_master is missing")
        return inspected
    if kind != "run":
        raise RecordError(f"kind {kind!r}; supported kinds are run and inspect")
    record: Record = _from_tree(Record, tree, "")
    for key in ("model", "data", "trainer"):
        _check(dict, record.config.get(key, {}), f"config.{key}")
    widths = (record.config.get("model") or {}).get("widths")
    if widths is not None and not _is_widths(widths):
        raise RecordError(f"broken: config.model.widths is {_short(widths)}, not a list of widths")
    if record.best is not None:
        _check(
            Number | None, record.best.metrics.get("val/acc1_float"), "best.metrics.val/acc1_float"
        )
    known = {f.name for f in fields(Record)} | {"schema", "kind"}
    return replace(record, more={key: value for key, value in tree.items() if key not in known})


def read_record(path: str | Path) -> Record:
    """Read the record of a run.

    Raises:
        UserError: `path` is not the record of a run; one line that names the file.
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
    """Mark the record of a trial that was given to another worker: it must not count twice."""
    reason = "its trial was given to another worker"
    write_record(path, replace(read_record(path), status="interrupted", reason=reason))


def value_of(record: Record, metric: str) -> Number | None:
    """A sweep objective: a metric of the last epoch, or STORAGE_BYTES; None if it was not logged.

    The last epoch counts, not the best: a W&B sweep reads the last logged value too, the pruner saw
    it, and no configuration gains from having had more epochs to choose from.
    """
    if metric == STORAGE_BYTES:
        size = record.bytes.packed if record.bytes is not None else None
        return None if size is None else float(size)
    value = record.last.metrics.get(metric) if record.last is not None else None
    return None if value is None else float(value)


# -- the schema ----------------------------------------------------------------------------------
T = TypeVar("T")
_KINDS: dict[Any, tuple[str, Any]] = {
    str: ("a text", lambda v: isinstance(v, str)),
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)),
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


def _is_widths(value: Any) -> bool:
    """Return True for a list of bits, or the text of one as the command line takes it."""
    parts = value.strip("[]").split(",") if isinstance(value, str) else value
    return isinstance(parts, list) and all(str(part).strip().isdigit() for part in parts)


def _short(value: Any) -> str:
    return repr(str(value)[:40])


def _check(kind: Any, value: Any, where: str) -> Any:
    """`value`, checked against an annotation and converted to it."""
    if kind is Any:
        return value
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        return None if value is None else _check(get_args(kind)[0], value, where)
    if value is None:
        raise RecordError(f"broken: {where} is missing")
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if is_dataclass(origin):
        return _from_tree(cast(type, origin), _check(dict, value, where), f"{where}.")
    words, accepts = _KINDS[origin]
    if not accepts(value):
        raise RecordError(f"broken: {where} is {_short(value)}, not {words}")
    if origin is dict and inner:
        if inner[0] is int and not all(str(key).isdigit() for key in value):
            raise RecordError(f"broken: {where} has a key that is not a width in bits")
        return {inner[0](key): _check(inner[1], v, f"{where}.{key}") for key, v in value.items()}
    if origin is list and inner:
        return [_check(inner[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    return value


def _from_tree(kind: type[T], tree: dict[str, Any], before: str) -> T:
    values, hints = {}, get_type_hints(kind)
    for f in fields(kind):  # type: ignore[arg-type]
        optional = f.default is not MISSING or f.default_factory is not MISSING
        if tree.get(f.name) is None and optional:
            continue
        values[f.name] = _check(hints[f.name], tree.get(f.name), f"{before}{f.name}")
    return kind(**values)


def _to_tree(value: Any) -> Any:
    """Convert a dataclass to JSON types; None is left out, except for WRITTEN_AS_NULL."""
    if is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in fields(value))
        return {k: _to_tree(v) for k, v in pairs if v is not None or k in WRITTEN_AS_NULL}
    if isinstance(value, dict):
        return {str(key): _to_tree(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_tree(v) for v in value]
    return value
