"""Comparisons: groups of arms that are equal except for one factor."""

from collections.abc import Iterable, Set
from dataclasses import dataclass
from functools import cached_property

from tq_lightning.records import SOURCES, TASKS, InspectRecord, Metric
from tq_lightning.report import labels
from tq_lightning.report.caveats import comparison_flags
from tq_lightning.report.groups import BUDGET, Arm, group, key_of, number_aware
from tq_lightning.report.runs import Loaded, Run
from tq_lightning.report.stats import split_of

# Compared keys, the section of their figures ("" for none) and their reference values, by
# preference. A group without any of these uses its first value. Quantizers are compared separately,
# in the rows of the paper.
FACTORS: dict[str, tuple[str, tuple[str, ...]]] = {
    "model.ste": ("STE", ("identity",)),
    "model.level": ("Levels", ("endpoint", "centre", "centroid")),
    "model.activations": ("Activations", ("none",)),
    labels.ACTIVATIONS_SOURCE: ("Truncated activations", ("quantize",)),
    "model.normalizer": ("Normalizers", ("tanh", "learned")),
    "model.scale": ("Scales", ("mean",)),
    "model.norm": ("", ("per_width",)),
    "model.widths": ("Sets of widths", ()),
    "model.width_weights": ("Weights of widths", ("none",)),
    "model.teacher": ("Teachers", ("recursive",)),
    "model.loss": ("", ()),
    "model.width_schedule": ("", ("all",)),
}
# Top-1 in % by width, from table 1 of arXiv 2506.11431 (ResNet-20, expansion 1, CIFAR-10).
PAPER: dict[str, dict[int | None, float]] = {  # None: float
    "round, quantized": {1: 72.5, 2: 86.0, 4: 87.5, 8: 87.7, None: 87.7},
    "round, truncated": {1: 72.6, 2: 57.5, 4: 84.9, 8: 87.7, None: 87.7},
    "floor, truncated": {1: 72.1, 2: 85.8, 4: 87.6, 8: 87.8, None: 87.8},
}
NamedArm = tuple[str, Arm, str]  # a row of the paper's table: its name, arm and source


@dataclass(frozen=True, eq=False)
class ComparisonGroup:
    """Arms that are equal except for one factor, as (displayed value of the factor, arm)."""

    factor: str
    label: str
    slug: str
    arms: tuple[tuple[str, Arm], ...]
    flags: tuple[str, ...]

    @property
    def first(self) -> Arm:
        """The first arm, which has every setting that all arms share."""
        return self.arms[0][1]

    @property
    def runs(self) -> list[Run]:
        """All runs of the group."""
        return [run for _, arm in self.arms for run in arm.runs]

    @property
    def split(self) -> str:
        """The split that all runs of the group are compared on: "test" or "val"."""
        return split_of(self.runs)

    @property
    def metric(self) -> Metric:
        """Metric of the task of the arms."""
        return self.first.metric

    @property
    def widths(self) -> list[int]:
        """All recorded widths in bits, ascending."""
        return sorted({width for run in self.runs for width in run.widths})

    @property
    def reference(self) -> tuple[str, Arm]:
        """Reference value of the group and its arm, see `FACTORS`."""
        arms = {value: (value, arm) for value, arm in reversed(self.arms)}
        usual = (value for value in FACTORS.get(self.factor, ("", ()))[1] if value in arms)
        return arms.get(next(usual, ""), self.arms[0])

    @property
    def rows(self) -> list[NamedArm]:
        """The paper's rows as (name, arm, source). Nested arms have only a truncated row."""
        out = [
            (f"{value}, {source}d", arm, source)
            for source in SOURCES
            for value, arm in self.arms
            if source == "truncate" or not arm.nested
        ]
        return sorted(out, key=lambda row: row[1].nested)

    @property
    def is_papers(self) -> bool:
        """True if the arms match the paper's table, so that its numbers can be shown with them."""
        arm = self.first
        expansions = {str(v or 1) for k, v in arm.config.items() if k.endswith("expansion")}
        fixed = (arm["model.name"], arm["data.name"], arm[labels.ACTIVATIONS_SOURCE])
        return (
            fixed == ("preresnet20_cifar", "cifar10", "quantize")
            and expansions <= {"1", "1.0"}
            and arm["model.activations"] is not None
            and {1, 2, 4, 8} <= set(arm.trained)
        )


@dataclass
class Comparisons:
    """Arms, inspect records and skipped files; `ignore` lists keys that may differ in a group."""

    arms: list[Arm]
    inspects: list[InspectRecord]
    left_out: list[tuple[str, str]]
    ignore: tuple[str, ...] = ()

    @property
    def metric(self) -> Metric:
        """Metric of the first arm; see `by_metric`."""
        return self.arms[0].metric if self.arms else TASKS["classification"]

    @cached_property
    def by_metric(self) -> list["Comparisons"]:
        """One part per metric, since metrics are never mixed. The first has the other records."""
        parts = [[arm for arm in self.arms if arm.metric == metric] for metric in TASKS.values()]
        parts = [arms for arms in parts if arms] or [[]]
        rest = [Comparisons(arms, [], [], self.ignore) for arms in parts[1:]]
        return [Comparisons(parts[0], self.inspects, self.left_out, self.ignore), *rest]

    @cached_property
    def models(self) -> list[str]:
        """Names of the trained models, smallest number first."""
        names = {labels.format_value(arm["model.name"]) for arm in self.arms}
        return sorted(names, key=number_aware)

    @cached_property
    def by_quantizer(self) -> list[ComparisonGroup]:
        """Groups for the paper's rows: nested and other codes if possible, else one kind."""
        ignore, paired = {*self.ignore, "model.ste"}, [arm for arm in self.arms if arm.paired]
        for kinds in ({True, False}, {False}, set[bool]()):
            if found := make_groups(paired, "model.quantizer", ignore, kinds=kinds):
                return found
        return []

    @cached_property
    def by_factor(self) -> dict[str, list[ComparisonGroup]]:
        """Groups in which a key of FACTORS has two or more values, by key."""
        found = {key: make_groups(self.arms, key, self.ignore, least=2) for key in FACTORS}
        return {key: groups for key, groups in found.items() if groups}


def group_runs(loaded: Loaded, ignore: Iterable[str] = ()) -> Comparisons:
    """Group records by configuration and drop duplicates of the same arm and seed."""
    left_out = list(loaded.left_out)
    arms = group(loaded.runs, left_out)
    return Comparisons(arms, loaded.inspects, sorted(left_out), tuple(ignore))


def make_groups(
    arms: list[Arm],
    factor: str,
    ignore: Iterable[str] = (),
    least: int = 1,
    kinds: Set[bool] = frozenset(),
) -> list[ComparisonGroup]:
    """Group arms that are equal except for `factor` and the keys in `ignore`.

    A group has `least` values of the factor, and `kinds` of codes, which nest (True) or do not. It
    is split by training budget if at least one budget has an arm for each value. Otherwise its arms
    stay together, and the unequal budget is flagged.
    """
    out = {factor, *ignore}
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        rest = {k: v for k, v in arm.config.items() if k not in out and not BUDGET.match(k)}
        groups.setdefault(key_of(rest), []).append(arm)
    budgets = (part for members in groups.values() for part in _by_budget(members, factor))
    several = (part for part in budgets if len(_values(part, factor)) >= least)
    parts = [part for part in several if kinds <= {arm.nested for arm in part}]
    named = labels.labels([part[0] for part in parts], out)
    slugs = labels.unique([labels.slug(label) for label in named])
    every = zip(named, slugs, [_named(part, factor, out) for part in parts], strict=True)
    return [ComparisonGroup(factor, *each, comparison_flags(each[2])) for each in every]


def _values(arms: list[Arm], key: str) -> set[str]:
    return {labels.format_value(arm[key]) for arm in arms}


def _by_budget(members: list[Arm], factor: str) -> list[list[Arm]]:
    parts: dict[str, list[Arm]] = {}
    for arm in members:
        budget = {k: v for k, v in arm.config.items() if BUDGET.match(k)}
        parts.setdefault(key_of(budget), []).append(arm)
    values = _values(members, factor)
    complete = any(_values(part, factor) == values for part in parts.values())
    return list(parts.values()) if complete else [members]


def _named(part: list[Arm], factor: str, ignored: set[str]) -> tuple[tuple[str, Arm], ...]:
    """Name each arm by the value of its factor, and by other differing keys if values repeat."""
    names = [labels.format_value(arm[factor]) for arm in part]
    known = {factor, "model.ste"} if factor == "model.quantizer" else {factor}
    differing = sorted(labels.varying([arm.config for arm in part]) - known)
    shown = [key for key in differing if key in ignored or BUDGET.match(key)]
    out = []
    for name, arm in zip(names, part, strict=True):
        extras = [labels.format_setting(key, arm[key]) for key in shown if names.count(name) > 1]
        out.append((", ".join([name, *extras]), arm))
    return tuple(out)
