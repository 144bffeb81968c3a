"""The best other arm: a row below the paper's rows, with settings that the paper does not have."""

from tq_lightning.report.caveats import collapsed
from tq_lightning.report.comparisons import ComparisonGroup, Comparisons, NamedArm
from tq_lightning.report.groups import BUDGET, START, Arm
from tq_lightning.report.labels import counted, format_setting, format_value, varying
from tq_lightning.report.stats import scores, split_of

BEST = "best other arm"
# Keys that an arm must share with a group to be comparable with it, besides its budget.
SHARED = ("model.name", "data.name", "model.activations", "model.widths", START)


def best_other(comparisons: Comparisons, group: ComparisonGroup) -> tuple[Arm, str] | None:
    """Find the arm outside a group with the best truncated metric, averaged over the widths.

    Returns:
        (arm, its settings and how it was chosen), or None if no comparable arm whose codes nest is
        better than the nested arm of the group.
    """
    own = [arm for _, arm in group.arms if arm.nested and not collapsed(arm)]
    others = [
        arm
        for arm in comparisons.arms
        if arm.nested and arm not in own and _fixed(arm) == _fixed(group.first)
        if group.split in ("val", split_of(arm.runs)) and not collapsed(arm)
    ]
    best = max([*own, *others], key=lambda arm: _quality(arm, group.split), default=None)
    if best is None or best in own or not own:
        return None
    keys = varying([best.config, own[0].config]) - {"model.quantizer"}
    settings = ", ".join(format_setting(key, best[key]) for key in sorted(keys))
    chosen = f"chosen from {counted(len(others), 'other arm')} on this split"
    how = chosen if len(others) > 1 else "the only other arm"
    quantizer = format_value(best["model.quantizer"])
    return best, f"{BEST.capitalize()}: {quantizer} with {settings} ({how})."


def rows(comparisons: Comparisons, group: ComparisonGroup) -> tuple[list[NamedArm], list[str]]:
    """Return the paper's rows of a group, then the best other arm, and the note on that arm."""
    if (found := best_other(comparisons, group)) is None:
        return group.rows, []
    return [*group.rows, (f"{BEST}, truncated", found[0], "truncate")], [found[1]]


def _fixed(arm: Arm) -> list[str]:
    budget = sorted(f"{k}={v}" for k, v in arm.config.items() if BUDGET.match(k))
    return [*(format_value(arm[key]) for key in SHARED), arm.budget, *budget]


def _quality(arm: Arm, split: str) -> float:
    """Return the mean over the trained widths, negated if lower values are better."""
    found = [e.mean for e in scores(arm, "truncate", arm.trained, split).values()]
    mean = sum(found) / len(found) if found else float("-inf")
    return -mean if arm.metric.lower_is_better and found else mean
