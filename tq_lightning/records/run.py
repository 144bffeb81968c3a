"""Record: the configuration, environment, status and results of a run."""

from dataclasses import dataclass, field, replace
from typing import Any

from tq_lightning.records.json_tree import SCHEMA, Number, Points, to_tree
from tq_lightning.records.metrics import ACC1, STORAGE_BYTES, metric_of

MONITOR = ACC1.monitor  # the metric that selects the best epoch of a classification run

# quantizers of the first records, which lack the fields `ste` and `nested` -> (paired STE, nested)
_PAIRED = {"floor": ("scaled", True), "round": ("identity", False)}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one validation epoch, by key; accuracies in %, perplexities without a unit."""

    metrics: dict[str, Any]
    epoch: int | None = None
    monitor: str | None = None
    step: int | None = None  # optimizer steps so far


@dataclass(frozen=True)
class WidthResult:
    """Top-1 in %, or perplexity, of both sources at one width, at the best epoch.

    `qt_gap` is the cost of truncation: percentage points, or perplexity truncated minus quantized.
    `disagree` is the share of weight codes that differ between the two sources.
    """

    quantize: Number
    truncate: Number
    qt_gap: Number | None = None
    disagree: Number | None = None


@dataclass(frozen=True)
class TestResult:
    """Metrics of one `test`, with its checkpoint, epoch, data and number of images."""

    metrics: dict[str, Number]
    checkpoint: str | None = None
    epoch: int | None = None
    images: int | None = None
    tokens: int | None = None  # labeled ones, of a language model
    data: dict[str, Any] | None = None  # name and root
    split: str | None = None
    batches: int | None = None  # number of batches, if only a part of the split was tested
    other_precision: str | None = None  # trainer.precision, if it is not that of the run
    __test__ = False  # not a pytest test case


@dataclass(frozen=True)
class Change:
    """A setting that changed when the run was resumed: `before` held until that step."""

    key: str  # dotted: a `trainer` or `data` key, or device, processes, commit, versions.torch, ...
    epoch: int  # completed epochs at the resume
    step: int  # optimizer steps at the resume
    before: Any = None
    after: Any = None


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of the float parameters, of the packed file, and read to run at each width."""

    float: int | None = None
    packed: int | None = None
    planes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """Record of a run: its configuration, environment, status and results."""

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
    parameters_embedding: Number | None = None  # share that embedding tables hold, if there are any
    ste: str | None = None  # STE of the weights, with "auto" resolved
    # kind of images that the norm statistics of untrained widths were estimated from; None without
    # such statistics, and in the first records, which used images without augmentation
    calibration: str | None = None
    nested: bool | None = None  # True if the codes of the weights nest, so both sources agree
    steps: int | None = None
    epochs: int | None = None
    curves: dict[str, Points] | None = None
    last: Evaluation | None = None
    best: Evaluation | None = None
    widths: dict[int, WidthResult] | None = None
    bytes: ModelBytes | None = None
    test: TestResult | None = None  # on the full test split of the run's own data
    # on other data, a part of the split, or in another precision; not in reports
    tests: list[TestResult] | None = None
    changes: list[Change] | None = None  # `config` and the environment are those of the last resume
    more: dict[str, Any] = field(default_factory=dict)  # unknown top-level fields

    @property
    def _quantizer(self) -> tuple[str | None, bool]:
        """(paired STE, nested) of the quantizer, by its name."""
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

    @property
    def changed(self) -> dict[str, str]:
        """What changed when the run was resumed: {"data.batch_size": "64, then 128 (epoch 5)"}."""
        out: dict[str, str] = {}
        named = (self.config.get("data") or {}).get("name")
        for change in self.changes or []:
            # a folder that moved; for these two data sets, the folder is the data set
            if change.key != "data.root" or named in ("imagefolder", "wds"):
                before = out.get(change.key, format_value(change.before))
                out[change.key] = (
                    f"{before}, then {format_value(change.after)} (epoch {change.epoch})"
                )
        return out

    def tree(self, without: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the record as JSON types, except the fields in `without`."""
        tree = {"schema": SCHEMA, **to_tree(self)}
        tree |= tree.pop("more")
        return {key: value for key, value in tree.items() if key not in without}


def value_of(record: Record, metric: str) -> Number | None:
    """Return a sweep objective: a metric of the last epoch, or STORAGE_BYTES; None if not logged.

    The last epoch is used, not the best one. W&B sweeps also read the last logged value, the pruner
    has seen it, and no configuration benefits from more epochs to choose from.
    """
    if metric == STORAGE_BYTES:
        size = record.bytes.packed if record.bytes is not None else None
        return None if size is None else float(size)
    value = record.last.metrics.get(metric) if record.last is not None else None
    return None if value is None else float(value)


def record_at(record: Record, epoch: int, step: int) -> Record:
    """Return the record at an epoch and a step, without later results."""

    def earlier(block: Evaluation | None) -> bool:
        if block is None or block.epoch is None:
            return False
        if block.step is None:  # written before steps were recorded
            return block.epoch < epoch or (block.epoch == epoch and record.steps == step)
        return block.step <= step

    kept = [block for block in (record.best, record.last) if block and earlier(block)]
    curves: dict[str, dict[int, float]] = {
        key: {int(e): value for e, value in points if e < epoch}
        for key, points in (record.curves or {}).items()
    }
    for block in kept:
        if block.epoch == epoch:  # validated before the checkpoint, so not again
            for key in (key for key in block.metrics if key.startswith("val/")):
                curves.setdefault(key, {})[epoch] = block.metrics[key]
    metric = metric_of(curves)
    best, scores = record.best if earlier(record.best) else None, curves.get(metric.monitor, {})
    if best is None and scores:
        sign = 1 if metric.lower_is_better else -1
        first = min(sorted(scores), key=lambda e: sign * scores[e])
        found = {k: p[first] for k, p in curves.items() if first in p}
        best = Evaluation(found, first, metric.monitor)
    last = record.last if earlier(record.last) else None
    if last is None and scores:
        final = max(scores)
        last = Evaluation({k: p[final] for k, p in curves.items() if final in p}, final)
    points = {key: Points([[e, v] for e, v in sorted(p.items())]) for key, p in curves.items() if p}
    widths = None if best is None else width_results(best)
    return replace(
        record, curves=points, best=best, last=last, widths=widths, bytes=None, test=None
    )


def width_results(best: Evaluation) -> dict[int, WidthResult]:
    """Return the results by width of the best epoch."""
    metrics, metric = best.metrics, metric_of(best.metrics)
    prefix = f"val/{metric.key}_truncate_w"
    return {
        bits: WidthResult(
            metrics[f"val/{metric.key}_quantize_w{bits}"],
            metrics[f"val/{metric.key}_truncate_w{bits}"],
            metrics[f"val/{metric.gap_key}_w{bits}"],
        )
        for bits in sorted(
            int(key.removeprefix(prefix)) for key in metrics if key.startswith(prefix)
        )
    }


def format_value(value: Any) -> str:
    """Return a configuration value as a label shows it: `8,4,2,1`, `none`."""
    if isinstance(value, list | tuple):
        return ",".join(map(format_value, value))
    return "none" if value is None else str(value)
