"""Findings: sentences derived from the comparisons, each with its interval."""

from collections.abc import Callable
from dataclasses import dataclass

from tq_lightning.report.comparisons import ComparisonGroup, Comparisons, has_collapsed
from tq_lightning.report.groups import Arm
from tq_lightning.report.labels import ACTIVATIONS_SOURCE, SPLIT_WORDS, bits_words, counted
from tq_lightning.report.stats import LEVEL, Difference, acc1, compare, gap, number


@dataclass(frozen=True)
class Finding:
    """A question, its answer in a sentence or two, and the lines the answer rests on."""

    question: str
    answer: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """One arm against the reference at one trained width; no claim is made of a collapsed seed."""

    group: ComparisonGroup
    value: str
    base: str
    bits: int
    difference: Difference
    collapsed: bool

    @property
    def usable(self) -> bool:
        """True if there is an interval and no seed collapsed."""
        return self.difference.estimate.half is not None and not self.collapsed

    @property
    def sign(self) -> int:
        """1 if shown above the reference, -1 if below, else 0."""
        return self.difference.sign if self.usable else 0

    @property
    def line(self) -> str:
        """The comparison as a sentence, with its split and its budget."""
        budgets = " or ".join(dict.fromkeys(arm.budget for _, arm in self.group.arms))
        words = self.difference.words(self.value, self.base)
        note = "; not counted, because a seed collapsed" if self.collapsed else ""
        where = f"{self.group.label}, {bits_words(self.bits)}"
        return f"{where}: {words} ({SPLIT_WORDS[self.group.split]}; {budgets}{note})."


def findings(comparisons: Comparisons) -> list[Finding]:
    """Return every finding that the comparisons allow."""
    made = [function(comparisons) for function in FINDINGS]
    return [finding for finding in made if finding is not None]


def title(comparisons: Comparisons) -> str:
    """Return the title of a report: its first result as a sentence."""
    groups = comparisons.by_quantizer
    messages = [(*found, group.label) for group in groups if (found := message(group)) is not None]
    if messages:
        _, words, label = max(messages)
        return f"{words} top-1 ({label})"
    arms, inspects = len(comparisons.arms), len(comparisons.inspects)
    if not arms:
        return f"What {counted(inspects, 'model')} cost in bytes and energy"
    return f"Accuracy of truncated weights in {counted(arms, 'arm')}"


def message(group: ComparisonGroup) -> tuple[float, str] | None:
    """(largest QT gap, a sentence with the accuracies at its width), or None for nothing to say.

    Example: (28.2, "Truncated to 2 bits, round goes from 63.7 to 35.5 % and floor stays at 64 %").
    """
    arms = [(value, arm) for value, arm in group.arms if not has_collapsed(arm)]
    gaps = [
        (d.estimate.mean, bits)
        for _, arm in arms
        for bits in arm.trained
        if not arm.nested and (d := gap(arm, bits, group.split)) is not None
    ]
    if not gaps:
        return None
    lost, bits = max(gaps)
    words = []
    for value, arm in sorted(arms, key=lambda pair: pair[1].nested):
        found = [acc1(arm, source, bits, group.split) for source in ("quantize", "truncate")]
        before, after = (number(e.mean) for e in found if e is not None)
        how = "stays at" if before == after else f"goes from {before} to"
        words.append(f"{value} {how} {after} %")
    return lost, f"Truncated to {bits_words(bits)}, {' and '.join(words)}"


def qt_gap(comparisons: Comparisons) -> Finding | None:
    """The cost of truncation: the QT gap of each quantizer, and the paper's rows compared."""
    lines, worst = [], {}
    for group in comparisons.by_quantizer:
        split = SPLIT_WORDS[group.split]
        for value, arm in group.arms:
            gaps = {w: d for w in arm.trained if (d := gap(arm, w, group.split)) is not None}
            if not gaps:
                continue
            bits = max(gaps, key=lambda w: gaps[w].estimate.mean)
            lost = gaps[bits].estimate
            if max(abs(d.estimate.mean) for d in gaps.values()) < 0.005:
                cost = "truncation costs nothing at any trained width"
            else:
                cost = f"truncation costs most at {bits_words(bits)}, {lost.text()} points"
            lines.append(f"{group.label}, {value}: {cost} ({split}).")
            # Truncated activations lose accuracy of their own, which is not due to the weights.
            too = " with activations truncated too" if arm[ACTIVATIONS_SOURCE] == "truncate" else ""
            name = f"{arm['model.quantizer']}{too}"
            if not has_collapsed(arm):
                worst[name] = max(worst.get(name, lost.mean), lost.mean)
        lines += _against_quantized(group)
    if not worst:
        return None
    costs = {n: f"up to {m:.1f} points" if m >= 0.05 else "nothing" for n, m in worst.items()}
    said = [f"{name} loses {cost} at a trained width" for name, cost in costs.items()]
    return Finding("What does truncation cost?", "; ".join(said) + ".", tuple(lines))


def _against_quantized(group: ComparisonGroup) -> list[str]:
    """A nested quantizer truncated against the first other one quantized, one line per group."""
    nested = next(((value, arm) for value, arm in group.arms if arm.nested), None)
    other = next(((value, arm) for value, arm in group.arms if not arm.nested), None)
    if nested is None or other is None:
        return []
    (a, arm), (b, base) = nested, other
    words = []
    for width in sorted(set(arm.trained) & set(base.trained)):
        found = compare(arm, base, "truncate", "quantize", width, group.split)
        if found is not None:
            shown = found.words(f"{a} truncated", f"{b} quantized")
            words.append(f"{bits_words(width)}: {shown}")
    return [f"{group.label}, {'; '.join(words)}."]


def compared(
    comparisons: Comparisons, key: str, keep: Callable[[Arm], bool] = lambda _: True
) -> list[Compared]:
    """Compare each value of a key with the reference: truncated weights, trained widths."""
    out = []
    for group in comparisons.by_factor.get(key, []):
        name, base = group.reference
        for value, arm in group.arms:
            if arm is base or not keep(group.arms[0][1]):
                continue
            failed = has_collapsed(arm, base)
            for bits in sorted(set(arm.trained) & set(base.trained)):
                found = compare(arm, base, "truncate", "truncate", bits, group.split)
                if found is not None:
                    out.append(Compared(group, value, name, bits, found, failed))
    return out


def ste(comparisons: Comparisons) -> Finding | None:
    """The paper's open question 1: is the scaled STE needed with a quantizer whose codes nest?"""
    found = compared(comparisons, "model.ste", lambda arm: arm.nested)
    scaled = [c for c in found if c.value == "scaled" and c.base == "identity"]
    if not scaled:
        return None
    tested = [c for c in scaled if c.usable]
    above, below = ([c for c in tested if c.sign == sign] for sign in (1, -1))
    count = counted(len(tested), "comparison")
    if not tested:
        answer = "No conclusion: there is no interval."
    elif not above:
        answer = f"No need is shown: the scaled STE is not above identity in any of {count}"
        answer += f", and below it in {len(below)}." if below else "."
    elif below:
        answer = f"Mixed: above identity in {len(above)} and below it in {len(below)} of {count}."
    else:
        answer = f"It helps in {len(above)} of {count} ({_places(above)})"
        answer += "; no difference is shown in the others." if len(above) < len(tested) else "."
    if tested:
        answer += (
            _chance(tested) + f" Effects of up to {_widest(tested):.1f} points cannot be ruled out."
        )
    answer += _excluded(scaled)
    values = dict.fromkeys(c.value for c in found if c.value != "scaled")
    names = sorted({str(c.group.arms[0][1]["model.quantizer"]) for c in scaled})
    return Finding(
        f"Is the scaled STE needed with {' and '.join(names)} (open question 1 of the paper)?",
        answer,
        (*(f"{sentence(found, value)}." for value in values), *(c.line for c in scaled)),
    )


def activations(comparisons: Comparisons) -> Finding | None:
    """The paper's open question 2: can activations be truncated like the weights?"""
    found = compared(comparisons, ACTIVATIONS_SOURCE)
    if not found:
        return None
    names: dict[str, list[Compared]] = {}
    for c in found:
        arm = c.group.arms[0][1]
        name = f"{arm['model.activations']} activations and {arm['model.quantizer']} weights"
        names.setdefault(name, []).append(c)
    answers: dict[str, list[str]] = {}
    lines = []
    for name, of in names.items():
        answer, words = _loss(of)
        answers.setdefault(answer, []).append(name)
        lines.append(f"{name}: {words}.")
    said = [f"{a} with {'; '.join(answers[a])}." for a in LOSSES if a in answers]
    return Finding(
        "Can activations be truncated like the weights (open question 2 of the paper)?",
        " ".join(said) + _chance([c for c in found if c.usable]) + _excluded(found),
        (*lines, *(c.line for c in found)),
    )


LOSSES = ("No loss is shown", "They lose accuracy", "No conclusion (no interval)")


def _loss(of: list[Compared]) -> tuple[str, str]:
    """(one of LOSSES, its basis) for truncated against requantized activations."""
    tested = [c for c in of if c.usable]
    lost = [c for c in tested if c.sign < 0]
    count = counted(len(tested), "comparison")
    if not tested:
        return LOSSES[2], "there is no interval"
    if not lost:
        rest = f"a loss of up to {_widest(tested):.1f} points cannot be ruled out"
        return LOSSES[0], f"no loss by truncation is shown in any of {count}; {rest}"
    most = min(lost, key=lambda c: c.difference.estimate.mean)
    size = f"{-most.difference.estimate.mean:.1f} points"
    where = f"{size} for {most.group.label} at {bits_words(most.bits)}"
    shown = f"a loss by truncation is shown in {len(lost)} of {count} ({_places(lost)})"
    return LOSSES[1], f"{shown}; the largest is {where}"


def _places(of: list[Compared]) -> str:
    """Return `resnet8 · cifar10 at 1 bit, 2 bits; ...`, with at most six groups named."""
    bits: dict[str, list[str]] = {}
    for c in of:
        bits.setdefault(c.group.label, []).append(bits_words(c.bits))
    named = [f"{label} at {', '.join(widths)}" for label, widths in list(bits.items())[:6]]
    return "; ".join([*named, *([f"{len(bits) - 6} more"] if len(bits) > 6 else [])])


def _widest(of: list[Compared]) -> float:
    return max((c.difference.estimate.half or 0.0 for c in of), default=0.0)


def _chance(of: list[Compared]) -> str:
    """The number of differences that 95 % intervals would show by chance, if any are shown."""
    if not any(c.sign for c in of):
        return ""
    return f" (Of {len(of)} such intervals, about {(1 - LEVEL) * len(of):.1f} exclude 0 by chance.)"


def _excluded(of: list[Compared]) -> str:
    count = sum(c.collapsed for c in of)
    where = "; ".join(dict.fromkeys(c.group.label for c in of if c.collapsed))
    words = f"{counted(count, 'comparison')} with a collapsed seed ({where})"
    return f" {words} {'is' if count == 1 else 'are'} not counted." if count else ""


def levels(comparisons: Comparisons) -> Finding | None:
    """The placement of a level within its bin."""
    found = compared(comparisons, "model.level")
    names: dict[str, list[Compared]] = {}
    for c in found:
        names.setdefault(str(c.group.arms[0][1]["model.quantizer"]), []).append(c)
    parts = [
        f"With {name}: {sentence(of, value)}."
        for name, of in names.items()
        for value in dict.fromkeys(c.value for c in of)
    ]
    lines = tuple(c.line for c in found)
    return (
        Finding("Does the level within the bin matter?", " ".join(parts), lines) if found else None
    )


def sentence(of: list[Compared], value: str) -> str:
    """Return `scaled is above identity in 2 of 12 comparisons and below it in none; ...`."""
    mine = [c for c in of if c.value == value]
    tested = [c for c in mine if c.usable]
    above, below = (sum(c.sign == sign for c in tested) for sign in (1, -1))
    base = " and ".join(dict.fromkeys(c.base for c in mine))
    count = f"{len(tested)} comparisons (setting × trained width)"
    left = len(mine) - len(tested)
    rest = f"; {counted(left, 'comparison')} without a conclusion" if left else ""
    if not tested:
        return f"{value} against {base}: no conclusion, because there is no interval"
    if not above + below:
        return f"no difference between {value} and {base} is shown in any of {count}{rest}"
    return (
        f"{value} is above {base} in {above or 'none'} of {count} and below it in {below or 'none'}"
        f"; no difference is shown in {len(tested) - above - below or 'none'}{rest}"
    )


FINDINGS: tuple[Callable[[Comparisons], Finding | None], ...] = (qt_gap, ste, activations, levels)
