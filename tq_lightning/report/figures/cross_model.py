"""Figures across models: low-bit robustness, Pareto front, and codes that disagree."""

from typing import Any

from tq_lightning.report.caveats import between, flags_of, mixed, seeds_words
from tq_lightning.report.comparisons import Comparisons, has_collapsed
from tq_lightning.report.figures import style
from tq_lightning.report.figures.accuracy import capped, joined
from tq_lightning.report.figures.style import Figure
from tq_lightning.report.groups import START, Arm
from tq_lightning.report.labels import (
    ACTIVATIONS_SOURCE,
    SPLIT_WORDS,
    bits_words,
    counted,
    slug,
    unique,
    wrapped,
)
from tq_lightning.report.stats import Estimate, acc1, gap, mean_interval, split_of

LOW_BITS = (1, 2)
EXTRAS = ("model.level", "model.activations", ACTIVATIONS_SOURCE)  # told in a legend if unusual


def robustness(comparisons: Comparisons) -> tuple[list[Figure], list[str]]:
    """Top-1 at 1 and 2 bits for the paper's rows, a line per setting."""
    groups, notes = capped(comparisons.by_quantizer, "Low-bit robustness")
    if len(groups) < 2:
        return [], notes
    arms = [arm for group in groups for _, arm in group.arms]
    split = split_of([run for arm in arms for run in arm.runs])
    learned = [arm for arm in arms if not has_collapsed(arm)]
    low = {
        nested: [
            e.mean
            for arm in learned
            if arm.nested == nested and (e := acc1(arm, "truncate", 2, split)) is not None
        ]
        for nested in (False, True)
    }
    names = {arm.nested: str(arm["model.quantizer"]) for arm in arms}
    spans = [f"{names[n]} keeps {min(v):.1f} to {max(v):.1f} %" for n, v in low.items() if v]
    title = f"Truncated to 2 bits, {' and '.join(spans)}" if spans else "Accuracy at low widths"
    height = 1.1 + 0.55 * len(groups)
    canvas, body = style.new(7.0, height, title, flags=flags_of(groups))
    grid = body.subplots(1, len(LOW_BITS), sharey=True, sharex=True)
    words = []
    for axes, bits in zip(grid, LOW_BITS, strict=True):
        for y, group in enumerate(groups):
            marker = style.marker_of(comparisons.models, group.arms[0][1]["model.name"])
            for i, (name, arm, source) in enumerate(group.rows):
                estimate = acc1(arm, source, bits, split)
                if estimate is None:
                    continue
                at = y + style.spread(i, len(group.rows), 0.5)
                color = style.arm_look(arm, source, marker)["color"]
                style.bars(axes, [at], [estimate], color, percent=True, along="x")
                label = "_" if name in axes.get_legend_handles_labels()[1] else name
                look = {"linestyle": "none", "label": label, "zorder": 3}
                axes.plot(estimate.mean, at, color=color, marker=marker, **look)
                words.append(f"{group.label}, {name}, {bits_words(bits)}: {estimate.text()}")
        axes.set_title(bits_words(bits))
        axes.set_xlabel(f"top-1 accuracy [%]\n{SPLIT_WORDS[split]}, {seeds_words(arms)}")
    labels = [wrapped(group.label, 34) for group in groups]
    grid[0].set_yticks(range(len(groups)), labels, fontsize=7.5)
    grid[0].set_ylim(len(groups) - 0.5, -0.5)
    style.clip(grid[0], "x")
    body.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    method = "mean over seeds. Dots: seeds. Bars: 95 % t interval, cut at 0 and 100 %."
    caption = joined([f"Top-1 on the {SPLIT_WORDS[split]}, {method}", *mixed(arms)])
    name = "low_bit_robustness"
    return [Figure(name, "Low-bit robustness", title, caption, "; ".join(words), canvas)], notes


def pareto(comparisons: Comparisons) -> tuple[list[Figure], list[str]]:
    """Truncated accuracy against the bytes read to run at a width, one figure per data set."""
    arms = [
        arm
        for arm in comparisons.paired
        if all(run.record.bytes and run.record.bytes.planes for run in arm.runs)
    ]
    by_data: dict[str, list[Arm]] = {}
    for arm in arms:
        by_data.setdefault(str(arm["data.name"]), []).append(arm)
    stems = unique([f"pareto_{slug(name)}" for name in by_data])
    note = "Arms with an STE that the paper does not pair with their quantizer are not drawn."
    left = note * (len(comparisons.paired) < len(comparisons.arms))
    return [
        _pareto(name, stem, of, comparisons.models, left)
        for (name, of), stem in zip(by_data.items(), stems, strict=True)
        if len(of) > 1
    ], []


def _pareto(data: str, stem: str, arms: list[Arm], models: list[str], note: str) -> Figure:
    split = split_of([run for arm in arms for run in arm.runs])
    points: dict[int, list[tuple[float, Estimate, int]]] = {}
    for i, arm in enumerate(arms):
        size = arm.runs[0].record.bytes
        for w in arm.runs[0].widths if size else []:
            estimate = acc1(arm, "truncate", w, split)
            if w in size.planes and estimate is not None:
                points.setdefault(i, []).append((size.planes[w] / 1024, estimate, w))
    every = [(size, e.mean, w) for of in points.values() for size, e, w in of]
    front = pareto_front([(size, mean) for size, mean, _ in every])
    (small, least), (large, most) = front[0], front[-1]
    title = f"From {small:.0f} KiB read at {least:.1f} % to {large:.0f} KiB at {most:.1f} %"
    flags = between([[arm] for arm in arms], "arms")
    if single := sorted({_name(arm) for arm in arms if len(arm.runs) == 1}):
        listed = ", ".join(single) if len(single) <= 6 else counted(len(single), "arm")
        flags.append(f"One seed ({listed}).")
    subtitle = f"Pareto front of accuracy and bytes read, {data}"
    canvas, body = style.new(6.4, 4.2, title, subtitle, flags)
    axes = body.add_subplot()
    sizes, means, _ = zip(*every, strict=True)
    look: dict[str, Any] = {"markersize": 4, "label": "every arm at each width", "zorder": 1}
    axes.plot(sizes, means, ".", color="#aaaaaa", **look)
    looks: dict[str, int] = {}
    for i, of in points.items():
        if not any((size, e.mean) in front for size, e, _ in of):
            continue
        arm = arms[i]
        marker = style.marker_of(models, arm["model.name"])
        look = style.arm_look(arm, "truncate", marker)
        kind = f"{look['color']}{marker}"  # arms of one color and marker differ in the line style
        look["linestyle"] = style.SERIES[looks.setdefault(kind, 0) % len(style.SERIES)][1]
        looks[kind] += 1
        style.bars(axes, [size for size, _, _ in of], [e for _, e, _ in of], look["color"], True)
        x, y = [size for size, _, _ in of], [e.mean for _, e, _ in of]
        axes.plot(x, y, linewidth=0.9, label=f"{_name(arm)} (on the front)", **look)
    for size, mean, w in every:
        if (size, mean) in front:
            place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            axes.annotate(str(w), (size, mean), fontsize=6.5, **place)
    look = {"color": style.GRAY, "linewidth": 2.5, "alpha": 0.35, "zorder": 1}
    axes.step(*zip(*front, strict=True), where="post", label="Pareto front", **look)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bytes read to run at that width [KiB]")
    axes.set_ylabel(f"top-1 truncated [%]\n{SPLIT_WORDS[split]}, {seeds_words(arms)}")
    style.clip(axes)
    body.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=1)
    caption = (
        f"Each point is an arm at one width (digits: bits), mean over seeds, {SPLIT_WORDS[split]}. "
        "Bars: 95 % t interval of the arms on the front, which is the front of the means. Bytes: "
        "planes read, layers left in float, scales, and the norm layers of that width."
    )
    words = ", ".join(f"{mean:.1f} % at {size:.0f} KiB" for size, mean in front)
    text = joined([caption, note, *mixed(arms)])
    return Figure(stem, "Pareto front", f"{title} ({data})", text, f"Pareto front: {words}", canvas)


def _name(arm: Arm) -> str:
    extra = [str(arm[key]) for key in EXTRAS if arm[key] not in (None, "endpoint", "quantize")]
    start = ["fine-tuned"] if arm[START] else []
    return ", ".join([str(arm["model.name"]), str(arm["model.quantizer"]), *extra, *start])


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (cost, value) that no other beats in both, by rising cost.

    Example: [(1, 5), (2, 4), (3, 9)] -> [(1, 5), (3, 9)].
    """
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def disagreement(comparisons: Comparisons) -> tuple[list[Figure], list[str]]:
    """Share of weight codes on which the sources disagree, beside the accuracy that it costs."""
    having = [g for g in comparisons.by_quantizer if any(_share(arm, 2) for _, arm in g.arms)]
    groups, notes = capped(having, "Codes that disagree", len(style.SERIES) + 1)
    drawn = [(v, arm, g) for g in groups for v, arm in g.arms if not arm.nested]
    if not drawn:
        return [], notes
    split = split_of([run for group in groups for run in group.runs])
    nested = [(value, arm, group) for group in groups for value, arm in group.arms if arm.nested]
    series = [(f"{value}, {group.label}", arm) for value, arm, group in drawn]
    if nested:
        results = [
            r for _, arm, _ in nested for run in arm.runs for r in _results(run.record.widths)
        ]
        rest = "; 0 at every width in each" if not any(r.disagree for r in results) else ""
        many = f"{counted(len(nested), 'arm')}, the first drawn" if len(nested) > 1 else "1 arm"
        series.append((f"{nested[0][0]} ({many}{rest})", nested[0][1]))
    found = {
        name: (
            {w: e for w in arm.runs[0].widths if (e := _share(arm, w)) is not None},
            {w: d.estimate for w in arm.runs[0].widths if (d := gap(arm, w, split)) is not None},
        )
        for name, arm in series
    }
    title = _disagreement_title(series, found)
    canvas, body = style.new(7.0, 2.6 + 0.17 * len(series), title, flags=flags_of(groups))
    left, right = body.subplots(1, 2)
    for i, (name, arm) in enumerate(series):
        look = style.arm_look(
            arm, "truncate", style.marker_of(comparisons.models, arm["model.name"])
        )
        look["linestyle"] = style.SERIES[i % len(style.SERIES)][1]
        shift = style.spread(i, len(series))
        for axes, points in zip((left, right), found[name], strict=True):
            style.line(axes, points, name, arm.trained, shift, percent=axes is left, **look)
            style.width_axis(axes, sorted({w for g in groups for w in g.widths}))
    left.set_ylabel("weight codes that disagree [%]")
    right.set_ylabel("QT gap [points]")
    left.set_title("quantized and truncated codes differ")
    arms = [arm for group in groups for _, arm in group.arms]
    right.set_title(f"QT gap, {SPLIT_WORDS[split]}, {seeds_words(arms)}")
    body.legend(*left.get_legend_handles_labels(), loc="outside lower left")
    words = [
        f"{name}: "
        + ", ".join(
            f"{shares[w].mean:.1f} % disagree and {gaps[w].mean:.1f} points lost at {w}"
            for w in shares
            if w in gaps
        )
        for name, (shares, gaps) in found.items()
    ]
    caption = (
        "Left: share of weight codes for which quantizing to n bits and shifting the 8-bit code to "
        "n bits give different integers. Right: QT gap, top-1 quantized minus truncated. Mean, "
        "seeds and 95 % t interval; hollow: width not trained."
    )
    text, alt = joined([caption, *mixed(arms)]), "; ".join(words)
    return [Figure("mechanism_trained", "Mechanism", title, text, alt, canvas)], notes


def _disagreement_title(
    series: list[tuple[str, Arm]],
    found: dict[str, tuple[dict[int, Estimate], dict[int, Estimate]]],
) -> str:
    pairs = [
        (shares[2].mean, gaps[2].mean)
        for name, arm in series
        if 2 in (shares := found[name][0]) and 2 in (gaps := found[name][1])
        if not arm.nested and not has_collapsed(arm)
    ]
    if not pairs:
        return "Weight codes that disagree, and the accuracy that they cost"
    (low, high), (least, most) = ((min(of), max(of)) for of in zip(*pairs, strict=True))
    return (
        f"At 2 bits, {low:.0f} to {high:.0f} % of the shifted codes are wrong, "
        f"which costs {least:.1f} to {most:.1f} points"
    )


def _results(widths: Any) -> Any:
    return (widths or {}).values()


def _share(arm: Arm, width: int) -> Estimate | None:
    """Weight codes that disagree in % over the seeds, or None unless every run has the share."""
    results = [(run.record.widths or {}).get(width) for run in arm.runs]
    values = [r.disagree for r in results if r is not None and r.disagree is not None]
    return mean_interval([100.0 * v for v in values]) if len(values) == len(results) else None
