"""TODO report/caveats.py."""

from collections.abc import Iterable

from tq_lightning.report.groups import START, Arm, ComparisonGroup


def flags_of(settings: list[ComparisonGroup]) -> list[str]:
    """The flags of a figure that shows several settings; one that several share is told once."""
    return [
        *_own_flags(settings),
        *between([[arm for _, arm in s.arms] for s in settings], "settings"),
    ]


def _own_flags(settings: list[ComparisonGroup]) -> list[str]:
    bearers: dict[str, list[str]] = {}
    for setting in settings:
        for flag in setting.flags:
            bearers.setdefault(flag, []).append(setting.label)
    return [
        f"{'all settings' if len(of) == len(settings) > 1 else '; '.join(of)}: {flag}"
        for flag, of in bearers.items()
    ]


def between(groups: list[list[Arm]], what: str) -> list[str]:
    """Flags where groups of arms in one figure had different budgets or starts: each is fair within, not one to another."""
    runs = [run for arms in groups for arm in arms for run in arm.runs]
    out = []
    if len({frozenset(run.budget for arm in arms for run in arm.runs) for arms in groups}) > 1:
        ranges = []
        for unit, values in zip(
            ("epochs", "steps"), zip(*(run.budget for run in runs), strict=True), strict=True
        ):
            known = [v for v in values if v is not None]
            if len(set(known)) > 1:
                ranges.append(f"{min(known)} to {max(known)} {unit}")
        out.append(
            f"BUDGETS DIFFER BETWEEN {what.upper()}: {', '.join(ranges) or 'not all recorded'}."
        )
    starts = [frozenset(arm.start for arm in arms) for arms in groups]
    if len(set(starts)) > 1:
        out.append(
            f"STARTS DIFFER BETWEEN {what.upper()}: {', '.join(sorted(frozenset().union(*starts)))}."
        )
    return out


def seeds_words(arms: Iterable[Arm]) -> str:
    """`3 seeds`, `1 to 3 seeds`: how many runs stand behind each point."""
    counts = sorted({len(arm.runs) for arm in arms})
    span = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return f"{span} seed{'' if counts[-1] == 1 else 's'}"


def mixed(part: Iterable[Arm]) -> list[str]:
    """Commits, package versions or devices that differ between the runs compared: told in the caption."""
    runs = [run for arm in part for run in arm.runs]
    out = []
    for what, values in {
        "commits": {str(run.record.commit)[:8] for run in runs},
        "versions of tq_lightning": {str(run.record.versions.get("tq_lightning")) for run in runs},
        "tested checkpoints": {
            str(run.record.test.checkpoint) for run in runs if run.has_test and run.record.test
        },
        "devices": {str(run.record.device) for run in runs},
    }.items():
        if len(values) > 1:
            out.append(f"The runs come from different {what}: {', '.join(sorted(values))}.")
    tested = sum(run.has_test for run in runs)
    if 0 < tested < len(runs):
        out.append(
            f"Only {tested} of {len(runs)} runs were tested, so that all are shown on the validation split."
        )
    if tested < len(runs) and any(run.config.get(START) for run in runs):
        out.append(
            "Some runs start from trained weights, whose own training may have seen the validation images."
        )
    if any(run.record.dirty for run in runs):
        out.append("Some runs came from a working tree with uncommitted changes.")
    return out
