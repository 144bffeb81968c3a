"""All that a report rests on, and which comparisons it allows: what tables, figures and words are made from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tq_lightning.records import InspectRecord
from tq_lightning.report.groups import Arm, ComparisonGroup, group, settings
from tq_lightning.report.labels import ACTIVATIONS_SOURCE, AUTO_STE
from tq_lightning.report.runs import Loaded
from tq_lightning.report.stats import split_of

# Compared keys, and the value the others are held against (None: the first in order). Quantizers have rows of their own.
FACTORS: dict[str, str | None] = {
    "model.ste": "identity",
    "model.level": "endpoint",
    "model.activations": "none",
    ACTIVATIONS_SOURCE: "quantize",
    "model.normalizer": "tanh",
    "model.norm": "per_width",
    "model.widths": None,
    "model.teacher": "recursive",
    "model.loss": None,
    "model.width_schedule": "all",
}
# Top-1 in per cent at 1, 2, 4, 8 bits and float, table 1 of arXiv 2506.11431 (ResNet-20, expansion 1, CIFAR-10).
PAPER: dict[str, dict[str, float]] = {
    "round, quantized": {"1": 72.5, "2": 86.0, "4": 87.5, "8": 87.7, "float": 87.7},
    "round, truncated": {"1": 72.6, "2": 57.5, "4": 84.9, "8": 87.7, "float": 87.7},
    "floor, truncated": {"1": 72.1, "2": 85.8, "4": 87.6, "8": 87.8, "float": 87.8},
}
# The three rows of the paper: (words, quantizer, source).
ROWS = (
    ("round, quantized", "round", "quantize"),
    ("round, truncated", "round", "truncate"),
    ("floor, truncated", "floor", "truncate"),
)


@dataclass
class Comparisons:
    """Arms, inspect records and what was left out; `ignore` holds keys left aside when settings are matched."""

    arms: list[Arm]
    inspects: list[InspectRecord]
    left_out: list[tuple[str, str]]
    ignore: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    _found: dict[str, list[ComparisonGroup]] = field(
        default_factory=dict, repr=False
    )  # settings are asked for many times

    def paired(self) -> list[Arm]:
        """Arms whose STE is the paper's for their quantizer."""
        return [
            arm for arm in self.arms if arm["model.ste"] == AUTO_STE.get(arm["model.quantizer"])
        ]

    def qt_settings(self) -> list[ComparisonGroup]:
        """Settings for the three rows: with both quantizers, else with round alone, else whatever there is."""
        if "rows" not in self._found:
            for wanted in (("round", "floor"), ("round",), ()):
                found = settings(
                    self.paired(),
                    "model.quantizer",
                    self.ignore,
                    along=("model.ste",),
                    wanted=wanted,
                )
                self._found["rows"] = found
                if found:
                    break
        return self._found["rows"]

    def factor_settings(self, key: str) -> list[ComparisonGroup]:
        """Settings in which `key` takes two or more values."""
        if key not in self._found:
            self._found[key] = settings(self.arms, key, self.ignore, least=2)
        return self._found[key]

    def factors(self) -> list[str]:
        """The keys of FACTORS that differ somewhere while all else is alike."""
        return [key for key in FACTORS if self.factor_settings(key)]


def gather(loaded: Loaded, ignore: Iterable[str] = ()) -> Comparisons:
    """Loaded records -> evidence; repeats of one arm and seed join what was left out."""
    left_out = list(loaded.left_out)
    arms = group(loaded.runs, left_out)
    return Comparisons(arms, loaded.inspects, sorted(left_out), tuple(ignore))


def row_arms(setting: ComparisonGroup) -> list[tuple[str, Arm, str]]:
    """(words, arm, source) for the paper's rows that a setting has; an arm beyond the first of its quantizer keeps its name."""
    out = []
    for words, quantizer, source in ROWS:
        for i, (shown, arm) in enumerate(
            (s, a) for s, a in setting.arms if a["model.quantizer"] == quantizer
        ):
            out.append(
                (words if i == 0 and shown == quantizer else f"{words} ({shown})", arm, source)
            )
    return out


def is_papers(setting: ComparisonGroup) -> bool:
    """True where the setting is the one of the paper's table, so that its numbers may stand beside ours."""
    config = setting.arms[0][1].config
    expansion = next((v for k, v in config.items() if k.endswith("expansion")), 1)
    checks: list[Callable[[], bool]] = [
        lambda: config.get("model.name") == "preresnet20_cifar",
        lambda: str(config.get("data.name")) == "cifar10",
        lambda: str(expansion or 1) in ("1", "1.0"),
        lambda: (
            config.get("model.activations") is not None
            and config.get(ACTIVATIONS_SOURCE) == "quantize"
        ),
        lambda: {1, 2, 4, 8} <= set(setting.arms[0][1].trained),
    ]
    return all(check() for check in checks)


def reference(setting: ComparisonGroup) -> str:
    """The value the others of a setting are held against: the customary one where present, else the first."""
    customary = FACTORS.get(setting.factor)
    present = [value for value, _ in setting.arms]
    return customary if customary in present else present[0]


def split(setting: ComparisonGroup) -> str:
    """ "test" or "val", the same for every run of the setting."""
    return split_of(setting.runs)
