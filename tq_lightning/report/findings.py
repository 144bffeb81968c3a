"""Findings: sentences derived from the comparisons, each with its interval, and the title."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from tq_lightning.records import ACC1, SOURCES
from tq_lightning.report.best_other import BEST, best_other
from tq_lightning.report.caveats import collapsed
from tq_lightning.report.comparisons import ComparisonGroup, Comparisons
from tq_lightning.report.groups import Arm
from tq_lightning.report.labels import ACTIVATIONS_SOURCE, SPLIT_WORDS, counted
from tq_lightning.report.stats import LEVEL, Difference, compare, gaps, number, scores


@dataclass(frozen=True)
class Finding:
    """A question, its answer in a sentence or two, and the comparisons that support it."""

    question: str
    answer: str
    lines: list[str]


@dataclass(frozen=True)
class Compared:
    """One arm compared with the reference at one trained width."""

    group: ComparisonGroup
    value: str
    bits: int
    difference: Difference
    collapsed: bool

    @property
    def usable(self) -> bool:
        """True if there is an interval and no seed collapsed."""
        return self.difference.half is not None and not self.collapsed

    @property
    def line(self) -> str:
        """The comparison as a sentence, with its split and its budget."""
        budgets = " or ".join(dict.fromkeys(arm.budget for _, arm in self.group.arms))
        note = "; not counted, because a seed collapsed" if self.collapsed else ""
        words = self.difference.words(self.value, self.group.reference[0])
        where = f"{self.group.label}, {counted(self.bits, 'bit')}"
        return f"{where}: {words} ({SPLIT_WORDS[self.group.split]}; {budgets}{note})."


def findings(comparisons: Comparisons) -> list[Finding]:
    """Return every finding that the comparisons allow."""
    answers = [by_factor(comparisons, key) for key in QUESTIONS]
    made = [qt_gap(comparisons), beyond_paper(comparisons), *answers]
    suffix = "" if comparisons.metric is ACC1 else f" ({comparisons.metric.name})"
    return [replace(f, question=f"{f.question}{suffix}") for f in made if f is not None]


def qt_gap(comparisons: Comparisons) -> Finding | None:
    """Report the cost of truncation: the QT gap of each quantizer, and the paper's rows."""
    lines: list[str] = []
    worst: dict[str, float] = {}
    metric = comparisons.metric
    for group in comparisons.by_quantizer:
        for value, arm in group.arms:
            if not (found := gaps(arm, arm.trained, group.split)):
                continue
            bits, lost = max(found.items(), key=lambda pair: pair[1].mean)
            cost = f"most at {counted(bits, 'bit')}, {lost.text()} {metric.gap_unit}"
            if max(abs(e.mean) for e in found.values()) < 0.005:
                cost = "nothing at any trained width"
            where = f"{group.label}, {value}"
            lines.append(f"{where}: truncation costs {cost} ({SPLIT_WORDS[group.split]}).")
            # Truncated activations lose accuracy too, independently of the weights.
            too = " with activations truncated too" if arm[ACTIVATIONS_SOURCE] == "truncate" else ""
            name = f"{arm['model.quantizer']}{too}"
            if not collapsed(arm):
                worst[name] = max(worst.get(name, lost.mean), lost.mean)
        nested = [pair for pair in group.arms if pair[1].nested]
        others = [pair for pair in group.arms if not pair[1].nested]
        if nested and others:
            lines.append(_against(group, *nested[0], *others[0]))
    up_to = {n: f"up to {m:.{metric.digits}f} {metric.gap_unit}" for n, m in worst.items()}
    costs = [f"{n} loses {up_to[n] if most >= 0.05 else 'nothing'}" for n, most in worst.items()]
    answer = f"At trained widths, {'; '.join(costs)}."
    return Finding("What does truncation cost?", answer, lines) if worst else None


def _trained(a: Arm, b: Arm, split: str, source: str = "truncate") -> dict[int, Difference]:
    """Compare an arm, truncated, with another one at the widths that both were trained at."""
    shared = sorted(set(a.trained) & set(b.trained))
    return compare(a, b, shared, split, source_b=source)


def _against(group: ComparisonGroup, a: str, arm: Arm, b: str, base: Arm) -> str:
    """Compare an arm, truncated, with a base, which is quantized unless its codes nest."""
    source = "truncate" if base.nested else "quantize"
    words = [
        f"{counted(w, 'bit')}: {difference.words(f'{a} truncated', f'{b} {source}d')}"
        for w, difference in _trained(arm, base, group.split, source).items()
    ]
    return f"{group.label}, {'; '.join(words)}."


def beyond_paper(comparisons: Comparisons) -> Finding | None:
    """Compare the best other arm with the paper's floor truncated and its round quantized."""
    lines: list[str] = []
    answers: list[str] = []
    for group in comparisons.by_quantizer:
        if (found := best_other(comparisons, group)) is None:
            continue
        best, note = found
        value, floor = next(pair for pair in group.arms if pair[1].nested)
        others = [pair for pair in group.arms if not pair[1].nested]
        lines += [_against(group, BEST, best, *pair) for pair in [(value, floor), *others]]
        sides: dict[str, list[str]] = {"better": [], "worse": []}
        for w, d in _trained(best, floor, group.split).items():
            if d.sign:
                side = "worse" if (d.sign > 0) == group.metric.lower_is_better else "better"
                size = number(abs(d.mean), group.metric.digits)
                sides[side].append(f"{size} {d.unit} at {counted(w, 'bit')}")
        words = "; ".join(f"{side} by {', '.join(v)}" for side, v in sides.items() if v)
        shown = words or "no difference is shown at any trained width"
        answers.append(f"{group.label}, compared with {value} truncated: {shown}. {note}")
    question = "Is a setting better than that of the paper?"
    return Finding(question, " ".join(answers), lines) if answers else None


class Question(NamedTuple):
    """A question about one key, the name of a comparison in its answer, and the other phrases."""

    question: str
    name: str
    above: str = "Accuracy is above the reference"
    below: str = "Accuracy is below the reference"
    same: str = "No difference is shown"


QUESTIONS = {
    "model.ste": Question(
        "Does another straight-through estimator help (is the scaled one needed: open question 1 "
        "of the paper)?",
        "the {value} STE (reference: {reference}) and {quantizer} weights",
        "It helps",
        "It does not help: accuracy is below the reference",
        "No benefit is shown",
    ),
    ACTIVATIONS_SOURCE: Question(
        "Can activations be truncated like the weights (open question 2 of the paper)?",
        "{activations} activations and {quantizer} weights",
        "They gain accuracy",
        "They lose accuracy",
        "No loss is shown",
    ),
    "model.level": Question(
        "Does the level within the bin matter?",
        "{value} levels (reference: {reference}) and {quantizer} weights",
    ),
    "model.normalizer": Question(
        "Does another normalizer help (non-uniform codes against uniform ones: open question 3 "
        "of the paper)?",
        "the {value} normalizer (reference: {reference})",
    ),
    "model.scale": Question(
        "Does a scale that preserves the values of weights help?",
        "the scale {value} (reference: {reference})",
    ),
    "model.width_weights": Question(
        "Do weights on the loss of each width help?",
        "the weights {value} (reference: {reference})",
    ),
}


def by_factor(comparisons: Comparisons, key: str) -> Finding | None:
    """Answer a question about truncated weights at trained widths, with one sentence per name."""
    words, named = QUESTIONS[key], dict[str, list[Compared]]()
    found = [
        Compared(group, value, bits, difference, bool(collapsed(arm) or collapsed(base)))
        for group in comparisons.by_factor.get(key, [])
        for base in [group.reference[1]]
        for value, arm in group.arms
        if arm is not base
        for bits, difference in _trained(arm, base, group.split).items()
    ]
    for c in found:
        facts = {k: c.group.first[f"model.{k}"] for k in ("quantizer", "activations")}
        name = words.name.format(value=c.value, reference=c.group.reference[0], **facts)
        named.setdefault(name, []).append(c)
    answer = " ".join(_answer(words, name, same) for name, same in named.items())
    tested = [c for c in found if c.usable]
    if any(c.difference.sign for c in tested):
        chance = f"about {(1 - LEVEL) * len(tested):.1f} are expected to exclude 0 by chance"
        answer += f" (Of {len(tested)} such intervals, {chance}.)"
    if left := sum(c.collapsed for c in found):
        where = "; ".join(dict.fromkeys(c.group.label for c in found if c.collapsed))
        count = f"{counted(left, 'comparison')} with a collapsed seed ({where})"
        answer += f" {count} {'is' if left == 1 else 'are'} not counted."
    return Finding(words.question, answer, [c.line for c in found]) if found else None


def _answer(words: Question, name: str, compared: list[Compared]) -> str:
    """Return a sentence such as `No loss is shown in any of 4 comparisons with ...`."""
    tested = [c for c in compared if c.usable]
    if not tested:
        return f"No conclusion (no interval) with {name}."
    metric = compared[0].group.metric
    better = -1 if metric.lower_is_better else 1
    above, below = ([c for c in tested if c.difference.sign == s] for s in (better, -better))
    count = counted(len(tested), "comparison")
    if above and below:
        sides = f"better than the reference in {len(above)} and worse in {len(below)} of {count}"
        return f"Mixed with {name}: {sides}."
    if not above and not below:
        widest = max(c.difference.half or 0.0 for c in tested)
        limit = f"; effects of up to {widest:.1f} {metric.gap_unit} cannot be ruled out"
        return f"{words.same} in any of {count} with {name}{limit if widest >= 0.05 else ''}."
    shown = above or below
    most = max(shown, key=lambda c: abs(c.difference.mean))
    size = f"{abs(most.difference.mean):.{metric.digits}f} {metric.gap_unit}"
    where = f"by up to {size} for {most.group.label} at {counted(most.bits, 'bit')}"
    verb = words.above if above else words.below
    if metric.lower_is_better:
        verb = "Perplexity is lower" if above else "Perplexity is higher"
    return f"{verb} in {len(shown)} of {count} with {name}, {where}."


def title(comparisons: Comparisons) -> str:
    """Return the title of a report: its first result as a sentence."""
    groups = comparisons.by_quantizer
    if messages := [(*found, group.label) for group in groups if (found := message(group))]:
        _, words, label = max(messages)
        return f"{words} {comparisons.metric.name} ({label})"
    if comparisons.arms:
        arms = counted(len(comparisons.arms), "arm")
        return f"{comparisons.metric.quantity} of truncated weights in {arms}"
    return f"Size and energy of {counted(len(comparisons.inspects), 'model')}"


def message(group: ComparisonGroup) -> tuple[float, str] | None:
    """Return (largest QT gap, sentence with the accuracies at its width), or None without a gap."""
    split = group.split
    arms = [(value, arm) for value, arm in group.arms if not collapsed(arm)]
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
        means = (scores(arm, source, [bits], split)[bits].mean for source in SOURCES)
        before, after = (number(mean, group.metric.digits) for mean in means)
        how = "stays at" if before == after else f"goes from {before} to"
        words.append(f"{value} {how} {after} {group.metric.unit}".strip())
    return largest, f"Truncated to {counted(bits, 'bit')}, {' and '.join(words)}"
