"""Figures across models: low-bit robustness, Pareto front, and codes that disagree."""

from collections import Counter
from typing import Any

from tq_lightning.records import ACC1, Metric
from tq_lightning.report import labels
from tq_lightning.report.caveats import between, flags_of, mixed, seeds_words
from tq_lightning.report.comparisons import Comparisons, has_collapsed
from tq_lightning.report.figures import style
from tq_lightning.report.figures.accuracy import Drawing, capped
from tq_lightning.report.figures.style import Figure
from tq_lightning.report.groups import START, Arm
from tq_lightning.report.labels import spread
from tq_lightning.report.stats import Estimate, gap, mean_interval, score, split_of

LOW_BITS = (1, 2)
# Keys that a legend shows unless they have their default.
EXTRAS = ("model.level", "model.activations", labels.ACTIVATIONS_SOURCE)


def robustness(comparisons: Comparisons) -> Drawing:
    """Draw top-1 at 1 and 2 bits for the rows of the paper, one line per setting."""
    groups, notes = capped(comparisons.by_quantizer, "Low-bit robustness")
    if len(groups) < 2:
        return [], notes
    arms = [arm for group in groups for _, arm in group.arms]
    split = split_of([run for arm in arms for run in arm.runs])
    kept: dict[str, list[float]] = {}
    for arm in sorted(arms, key=lambda arm: arm.nested):
        if not has_collapsed(arm) and (e := score(arm, "truncate", 2, split)) is not None:
            kept.setdefault(str(arm["model.quantizer"]), []).append(e.mean)
    metric = comparisons.metric
    spans = [
        f"{name} keeps {spread(of)} %" if metric is ACC1 else f"{name} has {spread(of, 2)}"
        for name, of in kept.items()
    ]
    values = " and ".join(spans) + ("" if metric is ACC1 else " in perplexity")
    title = f"Truncated to 2 bits, {values}" if spans else f"{_name_of(metric)} at low widths"
    canvas, body = style.new((7.0, 1.1 + 0.55 * len(groups)), title, flags=flags_of(groups))
    grid = body.subplots(1, len(LOW_BITS), sharey=True, sharex=True)
    words = []
    for axes, bits in zip(grid, LOW_BITS, strict=True):
        rows = [
            (y, i, len(g.rows), g, *row)
            for y, g in enumerate(groups)
            for i, row in enumerate(g.rows)
        ]
        for y, i, count, group, name, arm, source in rows:
            if (estimate := score(arm, source, bits, split)) is None:
                continue
            look, at = (
                style.arm_look(comparisons.models, arm, source),
                y + style.spread(i, count, 0.5),
            )
            style.bars(axes, {at: estimate}, look["color"], metric is ACC1, along="x")
            label = "_" if name in axes.get_legend_handles_labels()[1] else name
            axes.plot(estimate.mean, at, label=label, zorder=3, **look | {"linestyle": "none"})
            words.append(f"{group.label}, {name}, {labels.counted(bits, 'bit')}: {estimate.text()}")
        axes.set_title(labels.counted(bits, "bit"))
        label = "top-1 accuracy [%]" if metric is ACC1 else metric.label
        axes.set_xlabel(f"{label}\n{labels.SPLIT_WORDS[split]}, {seeds_words(arms)}")
    names = [labels.wrapped(group.label, 34) for group in groups]
    grid[0].set_yticks(range(len(groups)), names, fontsize=7.5)
    grid[0].set_ylim(len(groups) - 0.5, -0.5)
    style.clip(grid[0], metric, "x")
    body.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    cut = ", cut at 0 and 100 %" if metric is ACC1 else ""
    method = f"mean over seeds. Dots: seeds. Bars: 95 % t interval{cut}."
    caption = " ".join(
        [f"{metric.name.capitalize()} on the {labels.SPLIT_WORDS[split]}, {method}", *mixed(arms)]
    )
    name = "low_bit_robustness"
    return [Figure(name, "Low-bit robustness", title, caption, "; ".join(words), canvas)], notes


def pareto(comparisons: Comparisons) -> Drawing:
    """Draw truncated accuracy against the bytes read per width, one figure per data set."""
    by_data: dict[str, list[Arm]] = {}
    for arm in comparisons.paired:
        if all(run.record.bytes and run.record.bytes.planes for run in arm.runs):
            by_data.setdefault(str(arm["data.name"]), []).append(arm)
    stems = labels.unique([f"pareto_{labels.slug(name)}" for name in by_data])
    note = "Arms with an STE that the paper does not pair with their quantizer are not drawn."
    left = [note] * (len(comparisons.paired) < len(comparisons.arms))
    every = zip(by_data.items(), stems, strict=True)
    models = comparisons.models
    return [_pareto(name, stem, of, models, left) for (name, of), stem in every if len(of) > 1], []


def _pareto(data: str, stem: str, arms: list[Arm], models: list[str], left: list[str]) -> Figure:
    split = split_of([run for arm in arms for run in arm.runs])
    points = [
        (read[w] / 1024, estimate, arm, w)
        for arm in arms
        for read in [arm.runs[0].record.bytes.planes]  # type: ignore[union-attr]
        for w in arm.runs[0].widths
        if w in read and (estimate := score(arm, "truncate", w, split)) is not None
    ]
    metric = arms[0].metric
    sign = -1.0 if metric.lower_is_better else 1.0
    signed = pareto_front([(size, sign * e.mean) for size, e, _, _ in points])
    front = [(size, sign * mean) for size, mean in signed]

    def shown(mean: float) -> str:
        return f"{mean:.{metric.digits}f} {metric.unit}".strip()

    (small, least), (large, most) = front[0], front[-1]
    title = f"From {small:.0f} KiB read at {shown(least)} to {large:.0f} KiB at {shown(most)}"
    flags = between([[arm] for arm in arms], "arms")
    if single := sorted({_name(arm) for arm in arms if len(arm.runs) == 1}):
        listed = ", ".join(single) if len(single) <= 6 else labels.counted(len(single), "arm")
        flags.append(f"One seed ({listed}).")
    subtitle = f"Pareto front of {_name_of(metric).lower()} and bytes read, {data}"
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
            style.bars(axes, own, look["color"], percent=metric is ACC1)
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
    unit = f" [{metric.unit}]" if metric.unit else ""
    axes.set_ylabel(
        f"{metric.name} truncated{unit}\n{labels.SPLIT_WORDS[split]}, {seeds_words(arms)}"
    )
    style.clip(axes, metric)
    body.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=1)
    caption = (
        "Each point is the mean of an arm at one width (digits: bits) over seeds, "
        f"{labels.SPLIT_WORDS[split]}. "
        "Bars: 95 % t interval of the arms on the front. The front is computed from the means. "
        "Bytes: planes read, layers left in float, scales, and the norm layers of that width."
    )
    alt = "Pareto front: " + ", ".join(f"{shown(mean)} at {size:.0f} KiB" for size, mean in front)
    text = " ".join([caption, *left, *mixed(arms)])
    return Figure(stem, "Pareto front", f"{title} ({data})", text, alt, canvas)


def _name_of(metric: Metric) -> str:
    return "Accuracy" if metric is ACC1 else "Perplexity"


def _gap_words(metric: Metric) -> str:
    sides = "truncated minus quantized" if metric.lower_is_better else "quantized minus truncated"
    return f"{metric.name} {sides}"


def _name(arm: Arm) -> str:
    extra = [str(arm[key]) for key in EXTRAS if arm[key] not in (None, "endpoint", "quantize")]
    start = ["fine-tuned"] if arm[START] else []
    return ", ".join([str(arm["model.name"]), str(arm["model.quantizer"]), *extra, *start])


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (cost, value) that no other point dominates, in ascending order of cost.

    Example: [(1, 5), (2, 4), (3, 9)] -> [(1, 5), (3, 9)].
    """
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def disagreement(comparisons: Comparisons) -> Drawing:
    """Draw the share of weight codes on which the sources disagree, and the resulting QT gap."""
    having = [g for g in comparisons.by_quantizer if any(_share(arm, 2) for _, arm in g.arms)]
    groups, notes = capped(having, "Codes that disagree", 7)
    series = {f"{v}, {g.label}": arm for g in groups for v, arm in g.arms if not arm.nested}
    if not series:
        return [], notes
    arms = [arm for group in groups for _, arm in group.arms]
    split = split_of([run for arm in arms for run in arm.runs])
    if nested := [(value, arm) for g in groups for value, arm in g.arms if arm.nested]:
        of_nested = [_share(arm, w) for _, arm in nested for w in arm.runs[0].widths]
        rest = "" if any(e and e.mean for e in of_nested) else "; all are 0 at every width"
        many = "1 arm" if len(nested) == 1 else f"{len(nested)} arms, the first drawn"
        series[f"{nested[0][0]} ({many}{rest})"] = nested[0][1]
    found = {
        name: {
            w: (share, d.estimate)
            for w in arm.runs[0].widths
            if (share := _share(arm, w)) is not None and (d := gap(arm, w, split)) is not None
        }
        for name, arm in series.items()
    }
    claims = [n for n, arm in series.items() if not arm.nested and not has_collapsed(arm)]
    metric = comparisons.metric
    title = f"Weight codes that disagree, and the resulting loss of {_name_of(metric).lower()}"
    if pairs := [found[name][2] for name in claims if 2 in found[name]]:
        wrong: list[float] = [share.mean for share, _ in pairs if share]
        costs: list[float] = [cost.mean for _, cost in pairs if cost]
        title = (
            f"At 2 bits, {spread(wrong, 0)} % of the shifted codes are wrong, "
            f"which costs {spread(costs)} {comparisons.metric.gap_unit}"
        )
    canvas, body = style.new((7.0, 2.6 + 0.17 * len(series)), title, flags=flags_of(groups))
    grid = body.subplots(1, 2)
    for i, (name, arm) in enumerate(series.items()):
        look = style.arm_look(comparisons.models, arm)
        look["linestyle"] = style.DASHES[i % len(style.DASHES)]
        for side, axes in enumerate(grid):
            points = {w: pair[side] for w, pair in found[name].items()}
            style.line(axes, points, name, arm, style.spread(i, len(series)), side == 0, **look)
            style.width_axis(axes, sorted({w for g in groups for w in g.widths}))
    where = f"{labels.SPLIT_WORDS[split]}, {seeds_words(arms)}"
    grid[0].set(ylabel="weight codes that disagree [%]", title="codes of both sources compared")
    grid[1].set(ylabel=f"QT gap [{metric.gap_unit}]", title=where)
    body.legend(*grid[0].get_legend_handles_labels(), loc="outside lower left")
    words = []
    for name, of in found.items():
        parts = [
            f"{s.mean:.1f} % disagree and {g.mean:.1f} {metric.gap_unit} lost at {w}"
            for w, (s, g) in of.items()
        ]
        words.append(f"{name}: {', '.join(parts)}")
    caption = (
        "Left: share of weight codes for which quantizing to n bits and shifting the 8-bit code to "
        f"n bits give different integers. Right: QT gap, {_gap_words(metric)}. Mean, "
        "seeds and 95 % t interval; hollow: width not trained."
    )
    text, alt = " ".join([caption, *mixed(arms)]), "; ".join(words)
    return [Figure("mechanism_trained", "Mechanism", title, text, alt, canvas)], notes


def _share(arm: Arm, width: int) -> Estimate | None:
    """Return the share of disagreeing codes in % over seeds, or None if a run lacks it."""
    results = [(run.record.widths or {}).get(width) for run in arm.runs]
    values = [r.disagree for r in results if r is not None and r.disagree is not None]
    return mean_interval([100.0 * v for v in values]) if len(values) == len(results) else None
