"""The metric of a task: its keys, its direction and its gap between the sources."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """Metric of a task, with one value per width and source.

    Attributes:
        key: part of the metric keys: `val/KEY_truncate_w4`.
        gap_key: part of the keys of the gap between the sources: `val/GAP_KEY_w4`.
        name: short name.
        unit: unit of a value, "" for none.
        gap_unit: unit of a difference of two values.
        digits: decimal places in a report.
        lower_is_better: True if lower values are better.
        quantity: what it measures, capitalized.
    """

    key: str
    gap_key: str
    name: str
    unit: str
    gap_unit: str
    digits: int = 1
    lower_is_better: bool = False
    quantity: str = "Accuracy"

    @property
    def monitor(self) -> str:
        """Key of the mean over the trained widths that selects the best epoch of a run."""
        return f"val/{self.key}_truncate_mean"

    @property
    def mode(self) -> str:
        """Mode of ModelCheckpoint, "min" or "max"."""
        return "min" if self.lower_is_better else "max"

    @property
    def suffix(self) -> str:
        """The unit as a suffix of a label: ` [%]`, or "" if there is none."""
        return f" [{self.unit}]" if self.unit else ""

    @property
    def label(self) -> str:
        """Label of a column or an axis: `top-1 [%]`."""
        return f"{self.name}{self.suffix}"

    @property
    def truncated(self) -> str:
        """Label of an axis for truncated weights: `top-1 truncated [%]`."""
        return f"{self.name} truncated{self.suffix}"

    @property
    def title(self) -> str:
        """Capitalized name: `Top-1`."""
        return self.name.capitalize()

    @property
    def gap_words(self) -> str:
        """Definition of the gap: `top-1 quantized minus truncated`."""
        sides = ("truncated", "quantized") if self.lower_is_better else ("quantized", "truncated")
        return f"{self.name} {sides[0]} minus {sides[1]}"

    @property
    def clip_note(self) -> str:
        """Note for figures on the limits at which intervals of a percentage are cut."""
        return ", cut at 0 and 100 %" if self.unit == "%" else ""

    def gap(self, quantize: float, truncate: float) -> float:
        """Return the cost of truncation; positive if the truncated network is worse."""
        return truncate - quantize if self.lower_is_better else quantize - truncate

    def is_better(self, value: float, than: float) -> bool:
        """Return True if a value is strictly better than another one."""
        return value < than if self.lower_is_better else value > than


STORAGE_BYTES = "storage/bytes"  # a sweep objective: the size of the packed file
ACC1 = Metric("acc1", "qt_gap", "top-1", "%", "points")
PPL = Metric("ppl", "ppl_gap", "perplexity", "", "in perplexity", 2, True, "Perplexity")
# task, a value of `model.task` -> its metric
TASKS: dict[str, Metric] = {"classification": ACC1, "language_modeling": PPL}


def metric_of(keys: Iterable[str]) -> Metric:
    """Return the metric of some metric keys; top-1 by default."""
    keys = set(keys)
    found = (m for m in TASKS.values() if any(f"/{m.key}_truncate" in key for key in keys))
    return next(found, ACC1)


def is_accuracy(key: str) -> bool:
    """Return True for the key of an accuracy in percent: val/acc1_truncate_w4, test/acc5_float."""
    return key.rpartition("/")[2].startswith(("acc1_", "acc5_"))


def goal_of(key: str) -> str | None:
    """Return "minimize" or "maximize" for a metric with a known direction, else None.

    Example: val/acc1_truncate_w2 -> "maximize". The gap between the sources has no direction.
    """
    if is_accuracy(key):
        return "maximize"
    name = key.rpartition("/")[2]
    lower = name.startswith(("ppl_", "loss")) and not name.startswith(f"{PPL.gap_key}_")
    return "minimize" if lower or key == STORAGE_BYTES else None
