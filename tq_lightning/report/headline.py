"""The title of a report, and the sentence about a group of arms that it is taken from."""

from tq_lightning.records import SOURCES
from tq_lightning.report.comparisons import ComparisonGroup, Comparisons, has_collapsed
from tq_lightning.report.labels import counted
from tq_lightning.report.stats import gaps, scores


def title(comparisons: Comparisons) -> str:
    """Return the title of a report: its first result as a sentence."""
    candidates = [(message(group), group.label) for group in comparisons.by_quantizer]
    if messages := [(*found, label) for found, label in candidates if found is not None]:
        _, words, label = max(messages)
        return f"{words} {comparisons.metric.name} ({label})"
    if comparisons.arms:
        arms = counted(len(comparisons.arms), "arm")
        return f"{comparisons.metric.quantity} of truncated weights in {arms}"
    return f"Size and energy of {counted(len(comparisons.inspects), 'model')}"


def message(group: ComparisonGroup) -> tuple[float, str] | None:
    """Return (largest QT gap, sentence with the accuracies at its width), or None without a gap."""
    split = group.split
    arms = [(value, arm) for value, arm in group.arms if not has_collapsed(arm)]
    lost = [
        (gap.mean, bits)
        for _, arm in arms
        if not arm.nested
        for bits, gap in gaps(arm, arm.trained, split).items()
    ]
    if not lost:
        return None
    largest, bits = max(lost, key=lambda pair: abs(pair[0]))  # truncation may also help
    words = []
    for value, arm in sorted(arms, key=lambda pair: pair[1].nested):
        before, after = (scores(arm, source, [bits], split)[bits].short for source in SOURCES)
        how = "stays at" if before == after else f"goes from {before} to"
        words.append(f"{value} {how} {after} {group.metric.unit}".strip())
    return largest, f"Truncated to {counted(bits, 'bit')}, {' and '.join(words)}"
