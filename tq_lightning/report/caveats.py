"""Caveats of a comparison: unequal arms, and seeds that failed to train."""

import re
from collections.abc import Iterable, Sequence
from math import log
from typing import Any

from tq_lightning.report.groups import NOT_AN_ARM, START, Arm
from tq_lightning.report.labels import CLASSES, counted
from tq_lightning.report.stats import mean_interval


def comparison_flags(arms: tuple[tuple[str, Arm], ...]) -> tuple[str, ...]:
    """Return sentences on unequal budgets or seeds of the named arms, and on collapsed seeds."""
    out = []
    facts = {"budgets": {n: a.budget for n, a in arms}, "seeds": {n: a.seeds for n, a in arms}}
    for what, values in facts.items():
        if len(set(values.values())) > 1 or any(" or " in value for value in values.values()):
            out.append(f"Unequal {what}: {'; '.join(f'{name} {v}' for name, v in values.items())}.")
    if single := [name for name, arm in arms if len(arm.runs) == 1]:
        out.append(f"One seed ({', '.join(single)}): no interval.")
    return (*out, *(words for name, arm in arms for words in collapsed(arm, name)))


def collapsed(arm: Arm, name: str = "") -> list[str]:
    """Name the seeds that failed to train while the other seeds of the arm learned.

    Means with such a seed are not usable. The gain of a seed is its mean quantized accuracy at the
    trained widths minus chance accuracy. A seed has collapsed if the median gain of the others is
    more than 5 points and its own gain is less than a fifth of the median. A perplexity is
    converted to an accuracy as 100 (1 - log perplexity / log vocabulary).
    """
    classes = arm.runs[0].config.get("model.num_classes") or CLASSES.get(str(arm["data.name"]))
    guess = 100 / classes if isinstance(classes, int) else 0.0
    found: dict[Any, list[Any]] = {
        run.seed: [run.score("quantize", w, "val") for w in arm.trained] for run in arm.runs
    }
    if arm.metric.lower_is_better:
        if not isinstance(classes, int):
            return []
        guess, top = 0.0, log(classes)
        found = {s: [x and 100 * (1 - log(x) / top) for x in v] for s, v in found.items()}
    gains = {s: mean_interval(v).mean - guess for s, v in found.items() if None not in v}
    out = []
    for seed, gain in gains.items():
        others = sorted(g for s, g in gains.items() if s != seed) or [0.0]
        if (median := others[len(others) // 2]) > 5.0 and gain < 0.2 * median:
            mean = "" if arm.metric.lower_is_better else f" ({gain + guess:.1f} % on average)"
            out.append(f"Collapsed: {f'{name} seed {seed}'.strip()} stayed near chance{mean}.")
    return out


def flags_of(groups: list) -> list[str]:
    """Return the flags of a figure with several groups, without duplicates."""
    flagged: dict[str, list[str]] = {}
    for group in groups:
        for flag in group.flags:
            flagged.setdefault(flag, []).append(group.label)
    every = len(groups) if len(groups) > 1 else 0
    names = {f: "all settings" if len(n) == every else "; ".join(n) for f, n in flagged.items()}
    own = [f"{name}: {flag}" for flag, name in names.items()]
    return [*own, *between([[arm for _, arm in group.arms] for group in groups], "settings")]


def between(parts: list[list[Arm]], what: str) -> list[str]:
    """Return flags for budgets or initial weights that differ between parts, not within one."""
    budgets = {frozenset(run.budget for arm in arms for run in arm.runs) for arms in parts}
    out = []
    if len(budgets) > 1:
        every: Iterable[tuple[Any, Any]] = frozenset().union(*budgets)
        known = {"epochs": {e for e, _ in every} - {None}, "steps": {s for _, s in every} - {None}}
        ranges = [f"{min(v)} to {max(v)} {unit}" for unit, v in known.items() if len(v) > 1]
        out.append(f"Budgets differ between {what}: {', '.join(ranges) or 'not all recorded'}.")
    starts = {frozenset(arm[START] or "" for arm in arms) for arms in parts}
    if len(starts) > 1:
        names = frozenset().union(*starts)
        listed = sorted(f"from trained weights ({n})" if n else "from scratch" for n in names)
        out.append(f"Initial weights differ between {what}: {', '.join(listed)}.")
    return out


def seeds_words(arms: Iterable[Arm]) -> str:
    """Return `3 seeds` or `1 to 3 seeds`: the number of runs per point."""
    counts = sorted({len(arm.runs) for arm in arms})
    span = f"{counts[0]} to " if len(counts) > 1 else ""
    return span + counted(counts[-1], "seed")


def _kind(checkpoint: str | None) -> str:
    """Return `best` or `last`: the name of a checkpoint without its epoch and its folder."""
    return re.split(r"[-.]", re.split(r"[/\\]", str(checkpoint))[-1])[0]


def provenance_notes(arms: Sequence[Arm]) -> list[str]:
    """Name commits, versions, checkpoints and devices that differ between runs, for a caption."""
    runs = [run for arm in arms for run in arm.runs]
    records = [run.record for run in runs]
    sources = {
        "commits": {str(record.commit)[:8] for record in records},
        "versions of tq_lightning": {str(r.versions.get("tq_lightning")) for r in records},
        "kinds of tested checkpoints": {_kind(r.test.checkpoint) for r in records if r.test},
        "devices": {str(record.device) for record in records},
    }
    out = [
        f"The runs come from different {what}: {', '.join(sorted(values))}."
        for what, values in sources.items()
        if len(values) > 1
    ]
    changes = [change for record in records for change in record.changed.items()]
    changed = {f"{key} {values}": 1 for key, values in changes if not NOT_AN_ARM.search(key)}
    if changed:
        out.append(f"Changed when runs were resumed: {'; '.join(changed)}.")
    count = sum(run.has_test for run in runs)
    if 0 < count < len(runs):
        share = f"{count} of {len(runs)} runs were tested"
        out.append(f"Only {share}, so all are shown on the validation split.")
    if count < len(runs) and any(run.config.get(START) for run in runs):
        start = "Some runs start from trained weights"
        out.append(f"{start}, which may have been trained on the validation images.")
    if any({*r.widths} - {*a.trained} and not r.record.calibration for a in arms for r in a.runs):
        old = "Some records do not say how the norms of untrained widths were calibrated"
        out.append(f"{old}; early versions used images without augmentation, which lowers them.")
    if any(record.dirty for record in records):
        out.append("Some runs come from a working tree with uncommitted changes.")
    return out
