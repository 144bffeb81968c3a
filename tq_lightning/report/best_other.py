"""The best other arm: a row below the paper's rows, with settings that the paper does not have."""

from dataclasses import dataclass

from tq_lightning.report.caveats import collapsed
from tq_lightning.report.comparisons import ComparisonGroup, Comparisons
from tq_lightning.report.groups import BUDGET, START, Arm
from tq_lightning.report.labels import counted, short, text, varying
from tq_lightning.report.stats import score, split_of

BEST = "best other arm"
# Keys that an arm must share with a group to be comparable with it, besides its budget.
SHARED = ("model.name", "data.name", "model.activations", "model.widths", START)


@dataclass(frozen=True, eq=False)
class BestOther:
    """An arm that is better than the nested arm of a group.

    Attributes:
        arm: the arm. It has the model, data set, start and budget of the group.
        reference: (displayed value, arm) of the nested arm of the group.
        candidates: number of arms that the best one was chosen from.
    """

    arm: Arm
    reference: tuple[str, Arm]
    candidates: int

    @property
    def note(self) -> str:
        """The settings in which the arm differs from the reference, and how it was chosen."""
        keys = varying([self.arm.config, self.reference[1].config]) - {"model.quantizer"}
        settings = ", ".join(f"{short(key)}={text(self.arm[key])}" for key in sorted(keys))
        how = "the only other arm"
        if self.candidates > 1:
            how = f"chosen from {counted(self.candidates, 'other arm')} on this split"
        return f"{BEST.capitalize()}: {text(self.arm['model.quantizer'])} with {settings} ({how})."


def best_other(comparisons: Comparisons, group: ComparisonGroup) -> BestOther | None:
    """Find the arm outside a group with the highest truncated accuracy, averaged over the widths.

    Returns:
        The arm, or None if no comparable arm with nested codes is better than that of the group.
    """
    nested = [(value, arm) for value, arm in group.arms if arm.nested and not collapsed(arm)]
    if not nested:
        return None
    members = {id(arm) for _, arm in group.arms}
    others = [
        arm
        for arm in comparisons.arms
        if id(arm) not in members
        and arm.nested
        and not collapsed(arm)
        and _comparable(arm) == _comparable(group.first)
        and split_of(arm.runs) == group.split
    ]
    reference = max(nested, key=lambda pair: _quality(pair[1], group.split))
    best = max(others, key=lambda arm: _quality(arm, group.split), default=None)
    if best is None or _quality(best, group.split) <= _quality(reference[1], group.split):
        return None
    return BestOther(best, reference, len(others))


def rows(comparisons: Comparisons, group: ComparisonGroup) -> list[tuple[str, Arm, str]]:
    """Return the paper's rows of a group, and below them the best other arm, if there is one."""
    found = best_other(comparisons, group)
    return group.rows + ([(f"{BEST}, truncated", found.arm, "truncate")] if found else [])


def _comparable(arm: Arm) -> list[str]:
    budget = sorted(f"{k}={v}" for k, v in arm.config.items() if BUDGET.match(k))
    return [*(text(arm[key]) for key in SHARED), arm.budget, *budget]


def _quality(arm: Arm, split: str) -> float:
    """Mean of the truncated metric over the trained widths; higher is better."""
    found = [e.mean for w in arm.trained if (e := score(arm, "truncate", w, split)) is not None]
    mean = sum(found) / len(found) if found else float("-inf")
    return -mean if arm.metric.lower_is_better and found else mean
