"""What the numbers say, in words, with the comparisons each sentence rests on. Nothing is claimed without an interval."""

from collections.abc import Callable
from dataclasses import dataclass

from tq_lightning.report.comparisons import Comparisons, reference, row_arms, split
from tq_lightning.report.groups import Arm, ComparisonGroup
from tq_lightning.report.labels import ACTIVATIONS_SOURCE, bits_words
from tq_lightning.report.stats import LEVEL, SPLIT_WORDS, Difference, compare


@dataclass(frozen=True)
class Finding:
    """A question, its answer in a sentence or two, and the lines the answer rests on."""

    question: str
    answer: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """One arm against the reference at one trained width."""

    setting: ComparisonGroup
    value: str
    base: str
    bits: int
    difference: Difference


def verdicts(evidence: Comparisons) -> list[Finding]:
    """Every verdict that the evidence allows."""
    made = [function(evidence) for function in VERDICTS]
    return [verdict for verdict in made if verdict is not None]


def qt_gap(evidence: Comparisons) -> Finding | None:
    """What truncation costs a rounded network and a floored one, and how floor truncated stands to round quantized."""
    lines, worst = [], []
    for setting in evidence.qt_settings():
        part = split(setting)
        for value, arm in setting.arms:
            gaps = {
                w: d
                for w in arm.trained
                if (d := compare(arm, arm, "quantize", "truncate", w, part)) is not None
            }
            if not gaps:
                continue
            bits = max(gaps, key=lambda w: gaps[w].estimate.mean)
            lost = gaps[bits].estimate
            if max(abs(d.estimate.mean) for d in gaps.values()) < 0.005:
                lines.append(
                    f"{setting.label}, {value}: truncation costs nothing at any trained width ({SPLIT_WORDS[part]})."
                )
            else:
                most = f"truncation costs most at {bits_words(bits)}, {lost.text()} points"
                lines.append(f"{setting.label}, {value}: {most} ({SPLIT_WORDS[part]}).")
            # Activations that are shifted too lose something of their own: not to be laid at the door of the weights.
            too = " with activations truncated too" if arm[ACTIVATIONS_SOURCE] == "truncate" else ""
            worst.append((f"{arm['model.quantizer']}{too}", lost.mean))
        rows = {name: (arm, source) for name, arm, source in row_arms(setting)}
        if {"floor, truncated", "round, quantized"} <= set(rows):
            floor, rounded = rows["floor, truncated"][0], rows["round, quantized"][0]
            found = {
                w: compare(floor, rounded, "truncate", "quantize", w, part)
                for w in sorted(set(floor.trained) & set(rounded.trained))
            }
            words = [
                f"{bits_words(w)}: {d.words('floor truncated', 'round quantized')}"
                for w, d in found.items()
                if d is not None
            ]
            lines += [f"{setting.label}, {'; '.join(words)}."]
    if not worst:
        return None
    by = {
        q: max(m for name, m in worst if name == q)
        for q in dict.fromkeys(name for name, _ in worst)
    }
    said = [
        f"{q} loses {f'up to {m:.1f} points' if m >= 0.05 else 'nothing'} at a trained width"
        for q, m in by.items()
    ]
    answer = "; ".join(said) + "."
    return Finding("What does truncation cost?", answer, tuple(lines))


def compared(
    evidence: Comparisons, key: str, keep: Callable[[Arm], bool] = lambda _: True
) -> list[Compared]:
    """Every comparison of a key's values with the reference, truncated weights, trained widths."""
    out = []
    for setting in evidence.factor_settings(key):
        if not keep(setting.arms[0][1]):
            continue
        base_name = reference(setting)
        base = setting.values(base_name)[0]
        for value, arm in setting.arms:
            for bits in sorted(set(arm.trained) & set(base.trained)):
                found = compare(arm, base, "truncate", "truncate", bits, split(setting))
                if arm is not base and found is not None:
                    out.append(Compared(setting, value, base_name, bits, found))
    return out


def lines_of(of: list[Compared]) -> tuple[str, ...]:
    """One line a comparison, with the split and the budget: what is not shown after few steps may be so after many."""
    return tuple(
        f"{c.setting.label}, {bits_words(c.bits)}: {c.difference.words(c.value, c.base)} "
        f"({SPLIT_WORDS[split(c.setting)]}; {' or '.join(dict.fromkeys(arm.budget for _, arm in c.setting.arms))})."
        for c in of
    )


def ste(evidence: Comparisons) -> Finding | None:
    """The paper's open question 1: is the scaled STE needed with floor?"""
    found = compared(evidence, "model.ste", lambda arm: arm["model.quantizer"] == "floor")
    scaled = [c for c in found if c.value == "scaled" and c.base == "identity"]
    if not scaled:
        return None
    tested = [c for c in scaled if c.difference.estimate.half is not None]
    above = [c for c in tested if c.difference.shown and c.difference.estimate.mean > 0]
    below = [c for c in tested if c.difference.shown and c.difference.estimate.mean < 0]
    if not tested:
        answer = "Can't be said: one seed, no interval."
    elif not above:
        answer = f"No need shown: the scaled STE is not shown above identity in any of {len(tested)} comparisons"
        answer += f", and below it in {len(below)}." if below else "."
    elif below:
        answer = f"Mixed: shown above identity in {len(above)} and below it in {len(below)} of {len(tested)} comparisons."
    else:
        answer = f"It helps in {len(above)} of {len(tested)} comparisons ({_places(above)})"
        answer += "; in the others no difference is shown." if len(above) < len(tested) else "."
    if tested:
        answer += _chance(above + below, tested)
        answer += f" An effect smaller than the intervals (up to ±{_widest(tested):.1f} points) can't be ruled out."
    others = [
        f"{sentence(found, v)}." for v in dict.fromkeys(c.value for c in found) if v != "scaled"
    ]
    return Finding(
        "Is the scaled STE needed with floor (open question 1)?",
        answer,
        (*others, *lines_of(scaled)),
    )


def activations(evidence: Comparisons) -> Finding | None:
    """The paper's open question 2: activations truncated like the weights, against requantized, for each way to quantize."""
    found = compared(evidence, ACTIVATIONS_SOURCE)
    if not found:
        return None
    groups: dict[str, list[Compared]] = {}
    for c in found:
        arm = c.setting.arms[0][1]
        groups.setdefault(
            f"{arm['model.activations']} activations and {arm['model.quantizer']} weights", []
        ).append(c)
    told = {name: _loss(of) for name, of in groups.items()}
    lines = [f"{name}: {words}." for name, (_, words) in told.items()]
    by_answer: dict[str, list[str]] = {}
    for name, (answer, _) in told.items():
        by_answer.setdefault(answer, []).append(name)
    said = [
        f"{answer} with {'; '.join(by_answer[answer])}." for answer in LOSSES if answer in by_answer
    ]
    tested = [c for c in found if c.difference.estimate.half is not None]
    answer = " ".join(said) + _chance([c for c in tested if c.difference.shown], tested)
    return Finding(
        "Can activations be truncated like the weights (open question 2)?",
        answer,
        (*lines, *lines_of(found)),
    )


LOSSES = ("No loss is shown", "They lose", "Nothing can be said (one seed)")


def _loss(of: list[Compared]) -> tuple[str, str]:
    """(one of LOSSES, what it rests on) of truncated against requantized activations."""
    tested = [c for c in of if c.difference.estimate.half is not None]
    lost = [c for c in tested if c.difference.shown and c.difference.estimate.mean < 0]
    if not tested:
        return LOSSES[2], "one seed, no interval"
    if not lost:
        kept = f"no loss by truncation is shown in any of {len(tested)} comparisons"
        return (
            LOSSES[0],
            f"{kept}; one smaller than the intervals (up to ±{_widest(tested):.1f} points) can't be ruled out",
        )
    most = min(lost, key=lambda c: c.difference.estimate.mean)
    where = f"{most.setting.label} at {bits_words(most.bits)}"
    shown = f"a loss by truncation is shown in {len(lost)} of {len(tested)} comparisons ({_places(lost)})"
    return LOSSES[1], f"{shown}; most, {-most.difference.estimate.mean:.1f} points, for {where}"


def _places(of: list[Compared]) -> str:
    """`resnet8 · cifar10 at 1 bit, 2 bits; ...`: at most six settings are named."""
    bits: dict[str, list[str]] = {}
    for c in of:
        bits.setdefault(c.setting.label, []).append(bits_words(c.bits))
    named = [f"{label} at {', '.join(widths)}" for label, widths in list(bits.items())[:6]]
    return "; ".join([*named, *([f"{len(bits) - 6} more"] if len(bits) > 6 else [])])


def _widest(of: list[Compared]) -> float:
    return max((c.difference.estimate.half or 0.0 for c in of), default=0.0)


def _chance(shown: list[Compared], of: list[Compared]) -> str:
    """How many differences 95 % intervals would show if there were none: to be read beside how many are shown."""
    if not shown:
        return ""
    return f" (Of {len(of)} such intervals about {(1 - LEVEL) * len(of):.1f} would miss 0 by chance, were there no difference.)"


def levels(evidence: Comparisons) -> Finding | None:
    """Where in its bin a level stands."""
    return _by_value("Does the level within the bin matter?", compared(evidence, "model.level"))


def sentence(of: list[Compared], value: str) -> str:
    """`scaled is shown above identity in 2 of 12 comparisons and below it in none; no difference is shown in 10`."""
    mine = [c for c in of if c.value == value]
    single = sum(c.difference.estimate.half is None for c in mine)
    above = sum(c.difference.shown and c.difference.estimate.mean > 0 for c in mine)
    below = sum(c.difference.shown and c.difference.estimate.mean < 0 for c in mine)
    base, count = (
        " and ".join(dict.fromkeys(c.base for c in mine)),
        f"{len(mine)} comparisons (setting x trained width)",
    )
    if single == len(mine):
        return f"{value} against {base}: one seed, so nothing can be shown"
    if above + below + single == 0:
        return f"no difference between {value} and {base} is shown in any of {count}"
    rest = f"; no difference is shown in {len(mine) - above - below - single or 'none'}"
    rest += f", and nothing can be said of {single} with one seed" if single else ""
    return f"{value} is shown above {base} in {above or 'none'} of {count}, and below it in {below or 'none'}{rest}"


def _by_value(question: str, found: list[Compared]) -> Finding | None:
    if not found:
        return None
    groups: dict[str, list[Compared]] = {}
    for c in found:
        groups.setdefault(str(c.setting.arms[0][1]["model.quantizer"]), []).append(c)
    parts = [
        f"With {q}: {sentence(of, v)}."
        for q, of in groups.items()
        for v in dict.fromkeys(c.value for c in of)
    ]
    return Finding(question, " ".join(parts), lines_of(found))


VERDICTS: tuple[Callable[[Comparisons], Finding | None], ...] = (qt_gap, ste, activations, levels)
