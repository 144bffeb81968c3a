"""Figures across models: low-bit robustness, and codes that disagree."""

from tq_lightning.records import ACC1
from tq_lightning.report import labels
from tq_lightning.report.caveats import collapsed, flags_of, provenance_notes, seeds_words
from tq_lightning.report.comparisons import Comparisons
from tq_lightning.report.figures import style
from tq_lightning.report.figures.style import Drawing, Figure, limit_groups
from tq_lightning.report.groups import Arm
from tq_lightning.report.labels import format_range
from tq_lightning.report.stats import Estimate, gaps, mean_interval, scores, split_of

LOW_BITS = (1, 2)


def robustness(comparisons: Comparisons) -> Drawing:
    """Draw top-1 at 1 and 2 bits for the rows of the paper, one line per setting."""
    groups, notes = limit_groups(comparisons.by_quantizer, "Low-bit robustness")
    if len(groups) < 2:
        return [], notes
    arms = [arm for group in groups for _, arm in group.arms]
    split = split_of([run for arm in arms for run in arm.runs])
    kept: dict[str, list[float]] = {}
    for arm in sorted(arms, key=lambda arm: arm.nested):
        if not collapsed(arm) and (at_2 := scores(arm, "truncate", [2], split).get(2)):
            kept.setdefault(str(arm["model.quantizer"]), []).append(at_2.mean)
    metric = comparisons.metric
    verb, unit = ("keeps", " %") if metric is ACC1 else ("has", "")
    spans = [f"{name} {verb} {format_range(v, metric.digits)}{unit}" for name, v in kept.items()]
    values = " and ".join(spans) + ("" if metric is ACC1 else " in perplexity")
    title = f"Truncated to 2 bits, {values}" if spans else f"{metric.quantity} at low widths"
    canvas, body = style.new((7.0, 1.1 + 0.55 * len(groups)), title, flags=flags_of(groups))
    grid = body.subplots(1, len(LOW_BITS), sharey=True, sharex=True)
    words = []
    for axes, bits in zip(grid, LOW_BITS, strict=True):
        for y, i, group in ((y, i, g) for y, g in enumerate(groups) for i in range(len(g.rows))):
            name, arm, source = group.rows[i]
            if (estimate := scores(arm, source, [bits], split).get(bits)) is None:
                continue
            look = style.arm_look(comparisons.models, arm, source)
            at = y + style.series_offset(i, len(group.rows), 0.5)
            style.bars(axes, {at: estimate}, look["color"], along="x")
            label = "_" if name in axes.get_legend_handles_labels()[1] else name
            axes.plot(estimate.mean, at, label=label, zorder=3, **look | {"linestyle": "none"})
            words.append(f"{group.label}, {name}, {labels.counted(bits, 'bit')}: {estimate.text()}")
        axes.set_title(labels.counted(bits, "bit"))
        axes.set_xlabel(f"{metric.label}\n{labels.SPLIT_WORDS[split]}, {seeds_words(arms)}")
    names = [labels.wrapped(group.label, 34) for group in groups]
    grid[0].set_yticks(range(len(groups)), names, fontsize=7.5)
    grid[0].set_ylim(len(groups) - 0.5, -0.5)
    style.clip(grid[0], metric, "x")
    body.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    method = f"mean over seeds. Dots: seeds. Bars: 95 % t interval{metric.clip_note}."
    text = f"{metric.title} on the {labels.SPLIT_WORDS[split]}, {method}"
    caption = " ".join([text, *provenance_notes(arms)])
    name = "low_bit_robustness"
    return [Figure(name, "Low-bit robustness", title, caption, "; ".join(words), canvas)], notes


def disagreement(comparisons: Comparisons) -> Drawing:
    """Draw the share of weight codes on which the sources disagree, and the resulting QT gap."""
    every = comparisons.by_quantizer
    having = [g for g in every if any(2 in _shares(a) for _, a in g.arms if not a.nested)]
    groups, notes = limit_groups(having, "Codes that disagree", 7)
    series = {f"{v}, {g.label}": arm for g in groups for v, arm in g.arms if not arm.nested}
    if not series:
        return [], notes
    arms = [arm for group in groups for _, arm in group.arms]
    split = split_of([run for arm in arms for run in arm.runs])
    if nested := [(value, arm) for g in groups for value, arm in g.arms if arm.nested]:
        some = any(share.mean for _, arm in nested for share in _shares(arm).values())
        rest = "" if some else "; all are 0 at every width"
        many = "1 arm" if len(nested) == 1 else f"{len(nested)} arms, the first drawn"
        series[f"{nested[0][0]} ({many}{rest})"] = nested[0][1]
    found = {
        name: {w: (share, lost[w]) for w, share in _shares(arm).items() if w in lost}
        for name, arm in series.items()
        for lost in [gaps(arm, arm.widths, split)]
    }
    claims = [n for n, arm in series.items() if not arm.nested and not collapsed(arm)]
    metric = comparisons.metric
    title = f"Weight codes that disagree, and the resulting loss of {metric.quantity.lower()}"
    if pairs := [found[name][2] for name in claims if 2 in found[name]]:
        wrong, costs = ([estimate.mean for estimate in side] for side in zip(*pairs, strict=True))
        title = (
            f"At 2 bits, {format_range(wrong, 0)} % of the shifted codes are wrong, "
            f"which costs {format_range(costs)} {metric.gap_unit}"
        )
    canvas, body = style.new((7.0, 2.6 + 0.17 * len(series)), title, flags=flags_of(groups))
    grid = body.subplots(1, 2)
    for i, (name, arm) in enumerate(series.items()):
        look = style.arm_look(comparisons.models, arm)
        look["linestyle"] = style.DASHES[i % len(style.DASHES)]
        shift = style.series_offset(i, len(series))
        for side, axes in enumerate(grid):
            points = {w: pair[side] for w, pair in found[name].items()}
            style.line(axes, points, name, arm, shift, **look)
            style.width_axis(axes, sorted({w for g in groups for w in g.widths}))
    where = f"{labels.SPLIT_WORDS[split]}, {seeds_words(arms)}"
    grid[0].set(ylabel="weight codes that disagree [%]", title="codes of both sources compared")
    grid[1].set(ylabel=f"QT gap [{metric.gap_unit}]", title=where)
    body.legend(*grid[0].get_legend_handles_labels(), loc="outside lower left")
    words = []
    for name, by_width in found.items():
        parts = [
            f"{s.mean:.1f} % disagree and {g.mean:.1f} {metric.gap_unit} lost at {w}"
            for w, (s, g) in by_width.items()
        ]
        words.append(f"{name}: {', '.join(parts)}")
    caption = (
        "Left: share of weight codes for which quantizing to n bits and shifting the 8-bit code to "
        f"n bits give different integers. Right: QT gap, {metric.gap_words}. Mean, "
        "seeds and 95 % t interval; hollow: width not trained."
    )
    text, alt = " ".join([caption, *provenance_notes(arms)]), "; ".join(words)
    return [Figure("mechanism_trained", "Mechanism", title, text, alt, canvas)], notes


def _shares(arm: Arm) -> dict[int, Estimate]:
    """Return {width: share of disagreeing codes in % over seeds}, if every run has it."""
    found: dict[int, list[float]] = {}
    for run in arm.runs:
        for width, result in sorted((run.record.widths or {}).items()):
            if result.disagree is not None:
                found.setdefault(width, []).append(100.0 * result.disagree)
    return {w: mean_interval(v) for w, v in found.items() if len(v) == len(arm.runs)}
