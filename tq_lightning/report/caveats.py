"""Caveats of a comparison: what makes its arms unequal, and seeds that failed to train."""

from collections.abc import Iterable

from tq_lightning.report.groups import START, Arm
from tq_lightning.report.labels import CLASSES, counted, text
from tq_lightning.report.stats import acc1


def flags(part: list[Arm], factor: str) -> tuple[str, ...]:
    """Return what makes the arms of one comparison unequal, as short sentences for the figure."""
    out = []
    budgets = {text(arm[factor]): arm.budget for arm in part}
    if len(set(budgets.values())) > 1 or any(" or " in b for b in budgets.values()):
        out.append("Unequal budgets: " + _listed(budgets))
    seeds = {text(arm[factor]): ",".join(map(str, arm.seeds)) for arm in part}
    if len(set(seeds.values())) > 1:
        out.append("Unequal seeds: " + _listed(seeds))
    single = [text(arm[factor]) for arm in part if len(arm.seeds) == 1]
    if single:
        out.append(f"One seed ({', '.join(single)}): no interval.")
    out += [words for arm in part for words in collapsed(arm, text(arm[factor]))]
    return tuple(out)


def _listed(by_name: dict[str, str]) -> str:
    return "; ".join(f"{name} {words}" for name, words in by_name.items()) + "."


def collapsed(arm: Arm, name: str = "") -> list[str]:
    """Name the seeds that failed to train while the other seeds of the arm learned.

    A seed has collapsed if it gained less than a fifth of what the median of the others gained over
    guessing, in quantized accuracy over the trained widths.
    """
    values = {}
    for run in arm.runs:
        alone = Arm(arm.config, (run,))
        found = [acc1(alone, "quantize", width, "val") for width in arm.trained]
        if known := [e.mean for e in found if e is not None]:
            values[run.seed] = sum(known) / len(known)
    classes = arm.runs[0].config.get("model.num_classes") or CLASSES.get(str(arm["data.name"]))
    guess = 100 / classes if isinstance(classes, int) else 0.0
    out = []
    for seed, value in values.items():
        others = sorted(v for s, v in values.items() if s != seed)
        if others and value - guess < 0.2 * (others[len(others) // 2] - guess):
            where = f"{name} seed {seed}".strip()
            out.append(f"Collapsed: {where} stayed near guessing ({value:.1f} % on average).")
    return out


def flags_of(groups: list) -> list[str]:
    """Flags of a figure that shows several groups; a flag that several groups share stands once."""
    bearers: dict[str, list[str]] = {}
    for group in groups:
        for flag in group.flags:
            bearers.setdefault(flag, []).append(group.label)
    own = [
        f"{'all settings' if len(of) == len(groups) > 1 else '; '.join(of)}: {flag}"
        for flag, of in bearers.items()
    ]
    return [*own, *between([[arm for _, arm in group.arms] for group in groups], "settings")]


def between(parts: list[list[Arm]], what: str) -> list[str]:
    """Flags for budgets or starts that differ between parts that are each fair in themselves."""
    budgets = {frozenset(run.budget for arm in arms for run in arm.runs) for arms in parts}
    out = []
    if len(budgets) > 1:
        pairs = zip(*frozenset().union(*budgets), strict=True)
        ranges = []
        for unit, values in zip(("epochs", "steps"), pairs, strict=True):
            known = sorted({v for v in values if v is not None})
            if len(known) > 1:
                ranges.append(f"{known[0]} to {known[-1]} {unit}")
        out.append(f"Budgets differ between {what}: {', '.join(ranges) or 'not all recorded'}.")
    starts = {frozenset(arm.start for arm in arms) for arms in parts}
    if len(starts) > 1:
        out.append(
            f"Starts differ between {what}: {', '.join(sorted(frozenset().union(*starts)))}."
        )
    return out


def seeds_words(arms: Iterable[Arm]) -> str:
    """Return `3 seeds` or `1 to 3 seeds`: the number of runs behind each point."""
    counts = sorted({len(arm.runs) for arm in arms})
    span = f"{counts[0]} to " if len(counts) > 1 else ""
    return span + counted(counts[-1], "seed")


def mixed(part: Iterable[Arm]) -> list[str]:
    """Name commits, versions, checkpoints and devices that differ between runs, for a caption."""
    runs = [run for arm in part for run in arm.runs]
    records = [run.record for run in runs]
    tested = [run.record.test for run in runs if run.has_test]
    out = []
    for what, values in {
        "commits": {str(record.commit)[:8] for record in records},
        "versions of tq_lightning": {str(r.versions.get("tq_lightning")) for r in records},
        "tested checkpoints": {str(test.checkpoint) for test in tested},
        "devices": {str(record.device) for record in records},
    }.items():
        if len(values) > 1:
            out.append(f"The runs come from different {what}: {', '.join(sorted(values))}.")
    count = sum(run.has_test for run in runs)
    if 0 < count < len(runs):
        share = f"{count} of {len(runs)} runs were tested"
        out.append(f"Only {share}, so all are shown on the validation split.")
    if count < len(runs) and any(run.config.get(START) for run in runs):
        start = "Some runs start from trained weights"
        out.append(f"{start}, whose own training may have seen the validation images.")
    if any(record.dirty for record in records):
        out.append("Some runs come from a working tree with uncommitted changes.")
    return out
