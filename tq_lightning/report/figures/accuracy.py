"""Figures of accuracy by width: the paper's rows, the values of one factor, and training curves."""

import math
from typing import Any

from tq_lightning.records import Metric
from tq_lightning.report import best_other
from tq_lightning.report.caveats import collapsed, flags_of, provenance_notes, seeds_words
from tq_lightning.report.comparisons import FACTORS, PAPER, ComparisonGroup, Comparisons
from tq_lightning.report.figures import style
from tq_lightning.report.figures.style import FLOAT_AT, Drawing, Figure, limit_groups
from tq_lightning.report.findings import message
from tq_lightning.report.groups import Arm
from tq_lightning.report.labels import METHOD, SPLIT_WORDS, counted, short_key, slug, wrapped
from tq_lightning.report.stats import Difference, compare, number, score_float, scores, split_of

PANELS = 3


def qt_gap(comparisons: Comparisons) -> Drawing:
    """Draw accuracy by width for the paper's rows, one figure per group of two or more rows."""
    groups = [group for group in comparisons.by_quantizer if len(group.rows) > 1]
    drawn, notes = limit_groups(groups, "QT gap")
    return [_qt_gap(group, comparisons) for group in drawn], notes


def _qt_gap(group: ComparisonGroup, comparisons: Comparisons) -> Figure:
    models, (rows, note) = comparisons.models, best_other.rows(comparisons, group)
    split, papers, metric = group.split, group.is_papers, group.metric
    title = (message(group) or (0, f"{metric.quantity} by width"))[1]
    canvas, body = style.new((6.4, 3.4), title, group.label, group.flags)
    axes = body.add_subplot()
    words, floats, hollow = [], papers, set(group.widths) > set(group.first.trained)
    for i, (name, arm, source) in enumerate(rows):
        points, shift = scores(arm, source, arm.widths, split), style.series_offset(i, len(rows))
        look = style.arm_look(models, arm, source)
        if i >= len(group.rows):
            look["linestyle"] = "-."
        style.line(axes, points, name, arm, shift, **look)
        estimate, color, shape = score_float(arm, split), look["color"], look["marker"]
        if estimate is not None and (source == "quantize" or arm.nested):
            floats, trained = True, bool(arm["model.float_pass"])
            hollow |= not trained
            style.bars(axes, {FLOAT_AT + shift: estimate}, color)
            fill = color if trained else "white"
            axes.plot(FLOAT_AT + shift, estimate.mean, shape, color=color, markerfacecolor=fill)
        words.append(f"{name}: " + ", ".join(f"{e.text()} at {w}" for w, e in points.items()))
        if papers and name in PAPER:
            at = {FLOAT_AT if w is None else w: value for w, value in PAPER[name].items()}
            thin = look | {"linewidth": 0.7, "marker": "x", "markersize": 4}
            axes.plot(list(at), list(at.values()), alpha=0.75, zorder=1, **thin)
    if hollow:
        axes.plot([], [], "o", color=style.GRAY, mfc="white", label="hollow: width not trained")
    if papers:
        axes.plot([], [], color=style.GRAY, lw=0.8, marker="x", label="paper, same row (thin)")
    style.width_axis(axes, group.widths, floats)
    arms = list(dict.fromkeys(arm for _, arm, _ in rows))
    axes.set_ylabel(f"{metric.label}\n{SPLIT_WORDS[split]}, {seeds_words(arms)}")
    style.clip(axes, metric)
    axes.legend(loc="lower center" if papers else "best")  # "best" ignores thin lines
    caption = [
        f"{metric.title} on the {SPLIT_WORDS[split]} by width in use. Truncated: stored 8-bit "
        "codes shifted right. Quantized: codes computed from the float weights. Dots: seeds. Bars: "
        f"95 % t interval{metric.clip_note}.",
        *["Thin lines with crosses: arXiv 2506.11431, on the original CIFAR-10."] * papers,
        *note,
        *provenance_notes(arms),
    ]
    in_unit = f" in {metric.unit}" if metric.unit else ""
    alt = f"{metric.title}{in_unit} by bits. " + "; ".join(words)
    name = f"qt_gap_{group.slug}"
    return Figure(name, "QT gap", f"{title} ({group.label})", " ".join(caption), alt, canvas)


def factor(comparisons: Comparisons, key: str) -> Drawing:
    """Draw the truncated accuracy for each value of a key, and its difference from a reference.

    A figure has up to three groups with the same reference, one column each.
    """
    section = FACTORS[key][0]
    groups, notes = limit_groups(comparisons.by_factor.get(key, []), section)
    references = dict.fromkeys(group.reference[0] for group in groups)
    parts = [[g for g in groups if g.reference[0] == reference] for reference in references]
    chunks = [part[i : i + PANELS] for part in parts for i in range(0, len(part), PANELS)]
    stem, models = slug(short_key(key)), comparisons.models
    names = [f"{stem}_{i}" if len(chunks) > 1 else stem for i in range(1, len(chunks) + 1)]
    return [_factor(c, section, n, models) for c, n in zip(chunks, names, strict=True)], notes


def _factor(groups: list[ComparisonGroup], section: str, name: str, models: list[str]) -> Figure:
    metric = groups[0].metric
    base, split = groups[0].reference[0], split_of([run for g in groups for run in g.runs])
    values = list(dict.fromkeys([base, *(value for g in groups for value, _ in g.arms)]))
    found = {
        (group, value): compare(arm, group.reference[1], arm.widths, split)
        for group in groups
        for value, arm in group.arms
        if arm is not group.reference[1]
    }
    title = f"{section}: {_ranges(found, base, metric)}"
    size = (max(5.2, 2.5 * len(groups) + 0.4), 4.9)
    canvas, body = style.new(size, title, flags=flags_of(groups))
    share: Any = {"sharex": "col", "sharey": "row", "height_ratios": [3, 2]}
    grid = body.subplots(2, len(groups), squeeze=False, **share)
    entries, words = dict[str, Any](), list[str]()
    for (top, bottom), group in zip(grid.T, groups, strict=True):
        for i, (value, arm) in enumerate(group.arms):
            look = style.series_look(models, arm, values.index(value))
            shift = style.series_offset(i, len(group.arms))
            points = scores(arm, "truncate", arm.widths, split)
            style.line(top, points, value, arm, shift, **look)
            if differences := found.get((group, value)):
                style.line(bottom, differences, value, arm, shift, **look)
                ends = [f"{number(d.mean, sign='+')} at {w}" for w, d in differences.items()]
                words.append(f"{group.label}, {value} - {base}: {', '.join(ends)}")
        model, _, rest = group.label.partition(" · ")
        top.set_title(f"{model}\n{wrapped(rest, 38)}", fontsize=8)
        bottom.axhline(0, color=style.GRAY, linewidth=0.8)
        style.width_axis(bottom, group.widths)
        top.grid(axis="x", visible=False)
        entries |= dict(zip(*reversed(top.get_legend_handles_labels()), strict=True))
    arms = [arm for group in groups for _, arm in group.arms]
    grid[0][0].set_ylabel(f"{metric.truncated}\n{SPLIT_WORDS[split]}, {seeds_words(arms)}")
    grid[1][0].set_ylabel(f"difference from\n{base} [{metric.gap_unit}]")
    style.clip(grid[0][0], metric)
    body.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=4)
    weights = " and ".join(sorted({str(arm["model.quantizer"]) for arm in arms}))
    caption = (
        f"Top: {metric.name} by width of {weights} weights, truncated. Bottom: difference from "
        f"{base}; an interval that includes 0 shows no difference. Dots: seeds, or pairs of "
        f"seeds. Hollow: width not trained. {METHOD}"
    )
    alt = f"{title}. Differences [{metric.gap_unit}] by bits. {'; '.join(words)}"
    return Figure(name, section, title, " ".join([caption, *provenance_notes(arms)]), alt, canvas)


def _ranges(
    found: dict[tuple[ComparisonGroup, str], dict[int, Difference]], base: str, metric: Metric
) -> str:
    """Describe each value: `scaled minus identity is -8.4 to +0.6 points at trained widths`."""
    spans: dict[str, list[float]] = {}
    for (group, value), points in found.items():
        arm = dict(group.arms)[value]
        if not collapsed(arm) and not collapsed(group.reference[1]):
            means = (points[w].mean for w in arm.trained if w in points)
            spans.setdefault(value, []).extend(means)
    first = [(value, span) for value, span in list(spans.items())[:2] if span]
    ends = {v: [number(end(span), sign="+") for end in (min, max)] for v, span in first}
    parts = [f"{v} minus {base} is {' to '.join(e)} {metric.gap_unit}" for v, e in ends.items()]
    return f"{', '.join(parts)} at trained widths" if parts else f"compared with {base}"


def curves(comparisons: Comparisons) -> Drawing:
    """Draw truncated validation accuracy by epoch, one line per trained width, a panel per arm."""
    groups, notes = limit_groups(comparisons.by_quantizer, "Training curves")
    made, few = [], []
    for group in groups:
        arms = {value: arm for value, arm in group.arms if _epochs(arm, arm.trained[0])}
        if max((len(_epochs(arm, arm.trained[0])) for arm in arms.values()), default=0) > 2:
            made.append(_curves(group, dict(list(arms.items())[:4]), comparisons.models))
        elif arms:
            few.append(group.label)
    few_words = f"Training curves need at least three validations. Omitted: {'; '.join(few)}."
    return made, [*notes, *[few_words] * bool(few)]


def _epochs(arm: Arm, width: int) -> dict[int, list[float]]:
    """Return {epoch: truncated validation accuracies over the seeds} at `width` bits."""
    key = f"val/{arm.metric.key}_truncate_w{width}"
    points = [point for run in arm.runs for point in (run.record.curves or {}).get(key, [])]
    kept = [(int(e), v) for e, v in points if isinstance(v, int | float) and math.isfinite(v)]
    return {epoch: [v for e, v in kept if e == epoch] for epoch in sorted({e for e, _ in kept})}


def _curves(group: ComparisonGroup, arms: dict[str, Arm], models: list[str]) -> Figure:
    last = {
        (value, w): sum(end) / len(end)
        for value, arm in arms.items()
        for w in arm.trained
        if (end := list(_epochs(arm, w).values() or [[]])[-1])
    }
    bits = min(last, key=lambda key: abs(key[1] - 2))[1]
    metric = group.metric
    shown = {key: number(end, metric.digits) for key, end in last.items()}
    ends = [f"{v} at {end} {metric.unit}".strip() for (v, w), end in shown.items() if w == bits]
    title = f"After training, {' and '.join(ends)} when truncated to {counted(bits, 'bit')}"
    size = (max(5.2, 3.1 * len(arms) + 0.6), 2.9)
    canvas, body = style.new(size, title, group.label, group.flags)
    grid = body.subplots(1, len(arms), squeeze=False, sharey=True)[0]
    for axes, (value, arm) in zip(grid, arms.items(), strict=True):
        for width in reversed(arm.trained):
            points = {epoch + 1: values for epoch, values in _epochs(arm, width).items()}
            mean = [sum(v) / len(v) for v in points.values()]
            look = {"color": style.width_color(width), "markevery": max(1, len(points) // 6)}
            shape = style.marker(models, arm)
            axes.plot(list(points), mean, label=counted(width, "bit"), marker=shape, **look)
            for x, seeds in points.items():
                axes.plot([x] * len(seeds), seeds, ".", color=look["color"], ms=2.5, alpha=0.5)
        axes.set(title=f"{value} ({counted(len(arm.runs), 'seed')})", xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    grid[0].set_ylabel(f"{metric.truncated}, validation")
    style.clip(grid[0], metric)
    grid[0].legend(loc="best")
    caption = (
        f"Validation {metric.name} of the truncated weights after each epoch at the trained "
        "widths. Lines: mean over seeds. Dots: seeds."
    )
    words = [f"{value} at {w} bits ends at {end}" for (value, w), end in shown.items()]
    name, alt = f"curves_{group.slug}", f"{title}. {'; '.join(words)}"
    return Figure(name, "Training curves", f"{title} ({group.label})", caption, alt, canvas)
