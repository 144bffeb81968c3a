"""Pareto front of truncated accuracy and bytes read."""

from collections import Counter
from typing import Any

from tq_lightning.records import ACC1, Metric
from tq_lightning.report import labels
from tq_lightning.report.caveats import between, provenance_notes, seeds_words
from tq_lightning.report.comparisons import Comparisons
from tq_lightning.report.figures import style
from tq_lightning.report.figures.style import Drawing, Figure
from tq_lightning.report.groups import START, Arm
from tq_lightning.report.stats import scores, split_of

# Keys that a legend shows unless they have their default.
EXTRAS = ("model.level", "model.activations", labels.ACTIVATIONS_SOURCE)


def pareto(comparisons: Comparisons) -> Drawing:
    """Draw truncated accuracy against the bytes read per width, one figure per data set."""
    by_data: dict[str, list[Arm]] = {}
    for arm in comparisons.arms:
        known = all(run.record.bytes and run.record.bytes.planes for run in arm.runs)
        if arm.paired and known:
            by_data.setdefault(str(arm["data.name"]), []).append(arm)
    stems = labels.unique([f"pareto_{labels.slug(name)}" for name in by_data])
    note = "Arms with an STE that the paper does not pair with their quantizer are not drawn."
    left = [note] * (not all(arm.paired for arm in comparisons.arms))
    named, models = zip(by_data.items(), stems, strict=True), comparisons.models
    several = [(stem, data, arms) for (data, arms), stem in named if len(arms) > 1]
    return [_pareto(data, stem, arms, models, left) for stem, data, arms in several], []


def _pareto(data: str, stem: str, arms: list[Arm], models: list[str], left: list[str]) -> Figure:
    split = split_of([run for arm in arms for run in arm.runs])
    points = [
        (read[w] / 1024, estimate, arm, w)
        for arm in arms
        for read in [arm.runs[0].record.bytes.planes]  # type: ignore[union-attr]
        for w, estimate in scores(arm, "truncate", arm.widths, split).items()
        if w in read
    ]
    metric = arms[0].metric
    front = pareto_front([(size, e.mean) for size, e, _, _ in points], metric)
    shown = {size: f"{mean:.{metric.digits}f} {metric.unit}".strip() for size, mean in front}
    small, large = min(shown), max(shown)
    title = f"From {small:.0f} KiB read at {shown[small]} to {large:.0f} KiB at {shown[large]}"
    flags = between([[arm] for arm in arms], "arms")
    if single := sorted({_name(arm) for arm in arms if len(arm.runs) == 1}):
        listed = ", ".join(single) if len(single) <= 6 else labels.counted(len(single), "arm")
        flags.append(f"One seed ({listed}).")
    subtitle = f"Pareto front of {metric.quantity.lower()} and bytes read, {data}"
    canvas, body = style.new((6.4, 4.2), title, subtitle, flags)
    axes = body.add_subplot()
    every: Any = {"label": "every arm at each width", "color": "#aaaaaa", "ms": 4, "zorder": 1}
    axes.plot([p[0] for p in points], [p[1].mean for p in points], ".", **every)
    seen: Counter[str] = Counter()  # arms with the same color and marker get different line styles
    for arm in arms:
        own = {size: e for size, e, a, _ in points if a is arm}
        if any((size, e.mean) in front for size, e in own.items()):
            look = style.arm_look(models, arm)
            kind = look["color"] + look["marker"]
            look["linestyle"] = style.DASHES[seen[kind] % len(style.DASHES)]
            seen[kind] += 1
            style.bars(axes, own, look["color"])
            label, means = f"{_name(arm)} (on the front)", [e.mean for e in own.values()]
            axes.plot(list(own), means, linewidth=0.9, label=label, **look)
    for size, e, _, w in points:
        if (size, e.mean) in front:
            place: dict[str, Any] = {"xytext": (0, 6), "textcoords": "offset points"}
            axes.annotate(str(w), (size, e.mean), fontsize=6.5, ha="center", **place)
    step: Any = {"where": "post", "color": style.GRAY, "linewidth": 2.5, "alpha": 0.35, "zorder": 1}
    axes.step(*zip(*front, strict=True), label="Pareto front", **step)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bytes read to run at that width [KiB]")
    axes.set_ylabel(f"{metric.truncated}\n{labels.SPLIT_WORDS[split]}, {seeds_words(arms)}")
    style.clip(axes, metric)
    body.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=1)
    caption = (
        "Each point is the mean of an arm at one width (digits: bits) over seeds, "
        f"{labels.SPLIT_WORDS[split]}. "
        "Bars: 95 % t interval of the arms on the front. The front is computed from the means. "
        "Bytes: planes read, layers left in float, scales, and the norm layers of that width."
    )
    alt = "Pareto front: " + ", ".join(f"{mean} at {size:.0f} KiB" for size, mean in shown.items())
    text = " ".join([caption, *left, *provenance_notes(arms)])
    return Figure(stem, "Pareto front", f"{title} ({data})", text, alt, canvas)


def _name(arm: Arm) -> str:
    extra = [str(arm[key]) for key in EXTRAS if arm[key] not in (None, "endpoint", "quantize")]
    start = ["fine-tuned"] if arm[START] else []
    return ", ".join([str(arm["model.name"]), str(arm["model.quantizer"]), *extra, *start])


def pareto_front(
    points: list[tuple[float, float]], metric: Metric = ACC1
) -> list[tuple[float, float]]:
    """Return the points (cost, value) that no other point dominates, in ascending order of cost.

    Example: [(1, 5), (2, 4), (3, 9)] -> [(1, 5), (3, 9)].
    """
    front: list[tuple[float, float]] = []
    sign = 1 if metric.lower_is_better else -1
    for cost, value in sorted(points, key=lambda p: (p[0], sign * p[1])):
        if not front or metric.is_better(value, than=front[-1][1]):
            front.append((cost, value))
    return front
