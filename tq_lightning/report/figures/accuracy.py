"""Figures of accuracy by width: the paper's rows, the values of one factor, and training curves."""

import math
from typing import Any

from matplotlib.axes import Axes

from tq_lightning.report.caveats import flags_of, mixed, seeds_words
from tq_lightning.report.comparisons import PAPER, ComparisonGroup, Comparisons, has_collapsed
from tq_lightning.report.figures import style
from tq_lightning.report.figures.style import FLOAT_AT, Figure
from tq_lightning.report.findings import message
from tq_lightning.report.groups import Arm
from tq_lightning.report.labels import (
    METHOD,
    SPLIT_WORDS,
    bits_words,
    counted,
    short,
    slug,
    wrapped,
)
from tq_lightning.report.stats import Estimate, acc1, acc1_float, compare, number, split_of

MAX_GROUPS = 12  # figures of one kind; the tables hold everything
PANELS = 3


def capped(
    groups: list[ComparisonGroup], what: str, most: int = MAX_GROUPS
) -> tuple[list[ComparisonGroup], list[str]]:
    """Return at most `most` groups, those with most runs, and a note on the rest."""
    if len(groups) <= most:
        return groups, []
    chosen = sorted(groups, key=lambda group: -len(group.runs))[:most]
    rest = f"the {most} with most runs are drawn; the tables hold all."
    return [g for g in groups if g in chosen], [f"{what}: {len(groups)} settings, {rest}"]


def curve(arm: Arm, source: str, split: str) -> dict[int, Estimate]:
    """{width: top-1} of an arm."""
    found = {w: acc1(arm, source, w, split) for w in arm.runs[0].widths}
    return {w: e for w, e in found.items() if e is not None}


def qt_gap(comparisons: Comparisons) -> tuple[list[Figure], list[str]]:
    """Accuracy by width for the paper's rows, one figure per group of two or more rows."""
    groups = [group for group in comparisons.by_quantizer if len(group.rows) > 1]
    drawn, notes = capped(groups, "QT gap")
    return [_qt_gap(group, comparisons.models) for group in drawn], notes


def _qt_gap(group: ComparisonGroup, models: list[str]) -> Figure:
    split, rows, first = group.split, group.rows, group.arms[0][1]
    found = message(group)
    title = found[1] if found else "Accuracy by width"
    canvas, body = style.new(6.4, 3.4, title, group.label, group.flags)
    axes = body.add_subplot()
    marker = style.marker_of(models, first["model.name"])
    words, floats, hollow = [], group.is_papers, set(group.widths) > set(first.trained)
    for i, (name, arm, source) in enumerate(rows):
        points, shift = curve(arm, source, split), style.spread(i, len(rows))
        look = style.arm_look(arm, source, marker)
        style.line(axes, points, name, arm.trained, shift, **look)
        estimate = acc1_float(arm, split)
        if estimate is not None and (source == "quantize" or arm.nested):
            floats, trained = True, bool(arm["model.float_pass"])
            hollow |= not trained
            color = look["color"]
            style.bars(axes, [FLOAT_AT + shift], [estimate], color, percent=True)
            fill = color if trained else "white"
            axes.plot(FLOAT_AT + shift, estimate.mean, marker, color=color, markerfacecolor=fill)
        words.append(f"{name}: " + ", ".join(f"{e.text()} at {w}" for w, e in points.items()))
        if group.is_papers and name in PAPER:
            _overlay(axes, PAPER[name], look)
    style.hollow_entry(axes, hollow)
    if group.is_papers:
        axes.plot(
            [], [], color=style.GRAY, linewidth=0.8, marker="x", label="paper, same row (thin)"
        )
    style.width_axis(axes, group.widths, floats)
    seeds = seeds_words(arm for _, arm in group.arms)
    axes.set_ylabel(f"top-1 accuracy [%]\n{SPLIT_WORDS[split]}, {seeds}")
    style.clip(axes)
    axes.legend(loc="best")
    caption = [
        f"Top-1 on the {SPLIT_WORDS[split]} by width in use. Truncated: stored 8-bit codes shifted "
        "right. Quantized: codes computed from the float weights. Dots: seeds. Bars: 95 % t "
        "interval, cut at 0 and 100 %.",
        "Thin lines with crosses: arXiv 2506.11431, on the original CIFAR-10." * group.is_papers,
        *mixed([arm for _, arm in group.arms]),
    ]
    alt = "Top-1 in % by bits. " + "; ".join(words)
    name = f"qt_gap_{group.slug}"
    return Figure(name, "QT gap", f"{title} ({group.label})", joined(caption), alt, canvas)


def joined(sentences: list[str]) -> str:
    """Join sentences, leaving out empty ones."""
    return " ".join(filter(None, sentences))


def _overlay(axes: Axes, row: dict[str, float], look: dict[str, Any]) -> None:
    x = [FLOAT_AT if key == "float" else float(key) for key in row]
    look = look | {"linewidth": 0.7, "marker": "x", "markersize": 4}
    axes.plot(x, list(row.values()), alpha=0.75, zorder=1, **look)


def factor(comparisons: Comparisons, key: str, section: str) -> tuple[list[Figure], list[str]]:
    """Truncated accuracy for each value of one key, and its difference to a reference.

    A figure holds up to three groups with one reference, a column each.
    """
    groups, notes = capped(comparisons.by_factor.get(key, []), section)
    by_reference: dict[str, list[ComparisonGroup]] = {}
    for group in groups:
        by_reference.setdefault(group.reference[0], []).append(group)
    chunks = [of[i : i + PANELS] for of in by_reference.values() for i in range(0, len(of), PANELS)]
    stem = slug(short(key))
    names = [f"{stem}_{i}" if len(chunks) > 1 else stem for i in range(1, len(chunks) + 1)]
    models = comparisons.models
    return [_factor(c, section, n, models) for c, n in zip(chunks, names, strict=True)], notes


def _factor(groups: list[ComparisonGroup], section: str, name: str, models: list[str]) -> Figure:
    base, split = groups[0].reference[0], split_of([run for g in groups for run in g.runs])
    values = list(dict.fromkeys([base, *(value for g in groups for value, _ in g.arms)]))
    found = {
        (group, value): _differences(group, arm, split)
        for group in groups
        for value, arm in group.arms
        if arm is not group.reference[1]
    }
    title, flags = f"{section}: {_ranges(found, base)}", flags_of(groups)
    canvas, body = style.new(max(5.2, 2.5 * len(groups) + 0.4), 4.9, title, flags=flags)
    grid = body.subplots(
        2, len(groups), squeeze=False, sharex="col", sharey="row", height_ratios=[3, 2]
    )
    entries = {}
    for (top, bottom), group in zip(grid.T, groups, strict=True):
        marker = style.marker_of(models, group.arms[0][1]["model.name"])
        for i, (value, arm) in enumerate(group.arms):
            look = style.series_look(values.index(value), marker)
            shift = style.spread(i, len(group.arms))
            style.line(top, curve(arm, "truncate", split), value, arm.trained, shift, **look)
            if points := found.get((group, value)):
                style.line(bottom, points, value, arm.trained, shift, percent=False, **look)
        model, _, rest = group.label.partition(" · ")
        top.set_title(f"{model}\n{wrapped(rest, 38)}", fontsize=8)
        bottom.axhline(0, color=style.GRAY, linewidth=0.8)
        style.width_axis(bottom, group.widths)
        top.grid(axis="x", visible=False)
        entries |= dict(zip(*reversed(top.get_legend_handles_labels()), strict=True))
    arms = [arm for group in groups for _, arm in group.arms]
    grid[0][0].set_ylabel(f"top-1 truncated [%]\n{SPLIT_WORDS[split]}, {seeds_words(arms)}")
    grid[1][0].set_ylabel(f"difference to\n{base} [points]")
    style.clip(grid[0][0])
    columns = min(len(entries), 4)
    body.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=columns)
    weights = " and ".join(sorted({str(arm["model.quantizer"]) for arm in arms}))
    caption = [
        f"Top: top-1 by width of {weights} weights, truncated. Bottom: difference to {base}; an "
        "interval that includes 0 shows no difference. Dots: seeds, or pairs of seeds. Hollow: "
        f"width not trained. {METHOD}",
        *mixed(arms),
    ]
    words = [
        f"{group.label}, {value} - {base}: "
        + ", ".join(f"{number(e.mean, sign='+')} at {w}" for w, e in points.items())
        for (group, value), points in found.items()
    ]
    alt = f"{title}. Differences in points by bits. {'; '.join(words)}"
    return Figure(name, section, title, joined(caption), alt, canvas)


def _differences(group: ComparisonGroup, arm: Arm, split: str) -> dict[int, Estimate]:
    base = group.reference[1]
    found = {w: compare(arm, base, "truncate", "truncate", w, split) for w in arm.runs[0].widths}
    return {w: d.estimate for w, d in found.items() if d is not None}


def _ranges(found: dict[tuple[ComparisonGroup, str], dict[int, Estimate]], base: str) -> str:
    """Return `scaled - identity is -8.4 to +0.6 points at trained widths`, for each value."""
    spans: dict[str, list[float]] = {}
    for (group, value), points in found.items():
        arm = dict(group.arms)[value]
        if not has_collapsed(arm, group.reference[1]):
            spans.setdefault(value, []).extend(points[w].mean for w in arm.trained if w in points)
    said = [
        f"{value} - {base} is {number(min(of), sign='+')} to {number(max(of), sign='+')} points"
        for value, of in list(spans.items())[:2]
        if of
    ]
    return f"{', '.join(said)} at trained widths" if said else f"compared with {base}"


def curves(comparisons: Comparisons) -> tuple[list[Figure], list[str]]:
    """Truncated validation accuracy by epoch: a line per trained width, a panel per arm."""
    groups, notes = capped(comparisons.by_quantizer, "Training curves")
    made, short_ones = [], []
    for group in groups:
        arms = [(value, arm) for value, arm in group.arms if _epochs(arm, arm.trained[0])][:4]
        longest = max((len(_epochs(arm, arm.trained[0])) for _, arm in arms), default=0)
        if longest > 2:
            made.append(_curves(group, arms, comparisons.models))
        elif arms:
            short_ones.append(group.label)
    if short_ones:
        listed = "; ".join(short_ones)
        notes = [*notes, f"Training curves are drawn from three validations on; fewer: {listed}."]
    return made, notes


def _epochs(arm: Arm, width: int) -> dict[int, list[float]]:
    """{epoch: truncated validation accuracies over the seeds} at `width` bits."""
    out: dict[int, list[float]] = {}
    for run in arm.runs:
        for epoch, value in (run.record.curves or {}).get(f"val/acc1_truncate_w{width}", []):
            if isinstance(value, int | float) and math.isfinite(value):
                out.setdefault(int(epoch), []).append(value)
    return dict(sorted(out.items()))


def _curves(group: ComparisonGroup, arms: list[tuple[str, Arm]], models: list[str]) -> Figure:
    final: dict[str, dict[int, float]] = {}
    for value, arm in arms:
        last = {w: list(points.values())[-1] for w in arm.trained if (points := _epochs(arm, w))}
        final[value] = {w: sum(v) / len(v) for w, v in last.items()}
    bits = 2 if all(2 in ends for ends in final.values()) else arms[0][1].trained[0]
    ends = " and ".join(f"{value} at {e[bits]:.1f} %" for value, e in final.items() if bits in e)
    title = f"After training, {ends} when truncated to {bits_words(bits)}"
    canvas, body = style.new(max(5.2, 3.1 * len(arms) + 0.6), 2.9, title, group.label, group.flags)
    grid = body.subplots(1, len(arms), squeeze=False, sharey=True)[0]
    for axes, (value, arm) in zip(grid, arms, strict=True):
        marker = style.marker_of(models, arm["model.name"])
        for width in reversed(arm.trained):
            points = _epochs(arm, width)
            x, color = [epoch + 1 for epoch in points], style.width_color(width)
            mean = [sum(v) / len(v) for v in points.values()]
            every = max(1, len(x) // 6)
            axes.plot(x, mean, label=bits_words(width), color=color, marker=marker, markevery=every)
            if len(arm.runs) > 1:
                seeds = [(epoch + 1, v) for epoch, of in points.items() for v in of]
                axes.plot(*zip(*seeds, strict=True), ".", color=color, markersize=2.5, alpha=0.5)
        axes.set_title(f"{value} ({counted(len(arm.runs), 'seed')})")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    grid[0].set_ylabel("top-1 truncated [%], validation")
    style.clip(grid[0])
    grid[0].legend(loc="best")
    words = [f"{v} at {w} bits ends at {e:.1f}" for v, of in final.items() for w, e in of.items()]
    caption = (
        "Validation top-1 of the truncated weights after each epoch at the trained widths. "
        "Lines: mean over seeds. Dots: seeds."
    )
    alt = f"{title}. {'; '.join(words)}"
    name = f"curves_{group.slug}"
    return Figure(name, "Training curves", f"{title} ({group.label})", caption, alt, canvas)
