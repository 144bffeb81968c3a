"""Figures of accuracy by width: QT gap, one compared factor (STE, level, activations ...), training curves."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from tq_lightning.report.caveats import flags_of, mixed, seeds_words
from tq_lightning.report.comparisons import (
    PAPER,
    Comparisons,
    is_papers,
    reference,
    row_arms,
    split,
)
from tq_lightning.report.figures import style
from tq_lightning.report.figures.style import FLOAT_AT, SERIES, Figure
from tq_lightning.report.groups import Arm, ComparisonGroup
from tq_lightning.report.labels import bits_words, slug, wrapped
from tq_lightning.report.stats import (
    METHOD,
    SPLIT_WORDS,
    Estimate,
    acc1,
    acc1_float,
    compare,
    number,
    split_of,
)

MAX_SETTINGS = 12  # figures of one kind; the tables hold everything
PANELS = 3


def capped(
    settings: list[ComparisonGroup], what: str, evidence: Comparisons, most: int = MAX_SETTINGS
) -> list[ComparisonGroup]:
    """At most `most` settings, those with most runs; what is not drawn is noted on the page."""
    if len(settings) <= most:
        return settings
    evidence.notes.append(
        f"{what}: {len(settings)} settings, the {most} with most runs are drawn; the tables hold all."
    )
    chosen = sorted(settings, key=lambda s: -len(s.runs))[:most]
    return [s for s in settings if s in chosen]


def curve(arm: Arm, source: str, part: str) -> dict[int, Estimate]:
    """{width: estimate} of an arm."""
    found = {w: acc1(arm, source, w, part) for w in arm.runs[0].widths}
    return {w: e for w, e in found.items() if e is not None}


def qt_gap(evidence: Comparisons) -> list[Figure]:
    """Accuracy by width for the paper's three rows, one figure a setting."""
    return [_qt_gap(setting) for setting in capped(evidence.qt_settings(), "QT gap", evidence)]


def _qt_gap(setting: ComparisonGroup) -> Figure:
    part, papers = split(setting), is_papers(setting)
    figure, body = style.new(6.4, 3.4, f"QT gap: {setting.label}", setting.flags)
    axes = body.add_subplot()
    rows = row_arms(setting)
    widths, trained = (
        sorted({w for r in setting.runs for w in r.widths}),
        setting.arms[0][1].trained,
    )
    words, floats = [], False
    for i, (name, arm, source) in enumerate(rows):
        points = curve(arm, source, part)
        shift = style.spread(i, len(rows))
        style.line(axes, points, i, name, arm.trained, shift)
        if source == "quantize" or arm["model.quantizer"] == "floor":
            floats |= _float_point(
                axes, acc1_float(arm, part), i, shift, bool(arm["model.float_pass"])
            )
        words.append(f"{name}: " + ", ".join(f"{e.text()} at {w}" for w, e in points.items()))
        if papers and name in PAPER:
            _overlay(axes, name, i)
            floats = True
    style.hollow_entry(
        axes,
        bool(set(widths) - set(trained)) or (floats and not setting.arms[0][1]["model.float_pass"]),
    )
    if papers:
        axes.plot(
            [],
            [],
            color=style.GREY,
            linewidth=0.8,
            marker="x",
            markersize=4,
            label="paper, same row (thin)",
        )
    style.width_axis(axes, widths, floats)
    axes.set_ylabel(
        f"top-1 accuracy [%]\n{SPLIT_WORDS[part]}, {seeds_words(arm for _, arm in setting.arms)}"
    )
    style.clip(axes)
    axes.legend(loc="best")
    seeds = ", ".join(f"{name} {len(arm.seeds)}" for name, arm in setting.arms)
    caption = [
        f"Top-1 on the {SPLIT_WORDS[part]} by width in use. Truncated: the stored 8-bit codes shifted right; quantized: codes",
        f"made anew from the float weight. Bars: 95 % t interval over seeds (number of seeds: {seeds}).",
        "Thin lines with crosses: the numbers of arXiv 2506.11431 (on the original CIFAR-10)."
        if papers
        else "",
        *setting.flags,
        *mixed([arm for _, arm in setting.arms]),
    ]
    alt = "Top-1 in per cent by bits. " + "; ".join(words)
    return Figure(
        f"qt_gap_{setting.slug}", "QT gap", f"QT gap: {setting.label}", joined(caption), alt, figure
    )


def joined(sentences: list[str]) -> str:
    """Sentences as one text, empty ones left out."""
    return " ".join(filter(None, sentences))


def _float_point(
    axes: Axes, estimate: Estimate | None, series: int, shift: float, trained: bool
) -> bool:
    if estimate is None:
        return False
    colour, marker, _ = SERIES[series % len(SERIES)]
    look: dict[str, Any] = {
        "color": colour,
        "markerfacecolor": colour if trained else "white",
        "capsize": 2.5,
        "elinewidth": 1,
    }
    axes.errorbar(FLOAT_AT + shift, estimate.mean, yerr=estimate.half, fmt=marker, **look)
    return True


def _overlay(axes: Axes, name: str, series: int) -> None:
    colour, _, dashes = SERIES[series]
    x = [FLOAT_AT if k == "float" else float(k) for k in PAPER[name]]
    axes.plot(
        x,
        list(PAPER[name].values()),
        color=colour,
        linestyle=dashes,
        linewidth=0.7,
        marker="x",
        markersize=4,
        alpha=0.75,
        zorder=1,
    )


def factor(evidence: Comparisons, key: str, title: str) -> list[Figure]:
    """Truncated accuracy by width for each value of one key, and its difference to a reference, a column a setting."""
    by_reference: dict[str, list[ComparisonGroup]] = {}
    for setting in capped(evidence.factor_settings(key), title, evidence):
        by_reference.setdefault(reference(setting), []).append(setting)
    chunks = [of[i : i + PANELS] for of in by_reference.values() for i in range(0, len(of), PANELS)]
    stem = slug(key.removeprefix("model."))
    return [
        _factor(chunk, title, f"{stem}_{i}" if len(chunks) > 1 else stem)
        for i, chunk in enumerate(chunks, 1)
    ]


def _factor(settings: list[ComparisonGroup], title: str, name: str) -> Figure:
    base, part = reference(settings[0]), split_of([run for s in settings for run in s.runs])
    values = list(dict.fromkeys([base, *(value for s in settings for value, _ in s.arms)]))
    flags = flags_of(settings)
    figure, body = style.new(max(4.2, 2.5 * len(settings) + 0.4), 4.9, title, flags)
    grid = body.subplots(
        2, len(settings), squeeze=False, sharex="col", sharey="row", height_ratios=[3, 2]
    )
    words = [
        w
        for column, s in enumerate(settings)
        for w in _column(grid[:, column], s, base, part, values)
    ]
    arms = [arm for s in settings for _, arm in s.arms]
    grid[0][0].set_ylabel(f"top-1 truncated [%]\n{SPLIT_WORDS[part]}, {seeds_words(arms)}")
    grid[1][0].set_ylabel(f"difference to\n{base} [points]")
    style.clip(grid[0][0])
    entries: dict[str, Artist] = {}
    for axes in grid[0]:
        entries |= {
            label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    body.legend(
        list(entries.values()), list(entries), loc="outside lower left", ncols=min(len(entries), 4)
    )
    weights = " and ".join(sorted({str(arm["model.quantizer"]) for arm in arms}))
    caption = [
        f"Above: top-1 by width of {weights} weights, truncated. Below: difference to {base} with its 95 % interval; one that",
        f"crosses 0 shows no difference. Hollow: width not trained. {METHOD}",
        *flags,
        *mixed(arms),
    ]
    alt = f"{title}. Differences in points by bits. {'; '.join(words)}"
    return Figure(name, title, title, joined(caption), alt, figure)


def _column(
    grid: Iterable[Axes], setting: ComparisonGroup, base_name: str, part: str, values: list[str]
) -> list[str]:
    """One setting: accuracies above, differences below; returns what the differences say."""
    (top, bottom), words = grid, []
    base = setting.values(base_name)[0]
    model, _, rest = setting.label.partition(" · ")
    top.set_title(f"{model}\n{wrapped(rest, 38)}", fontsize=8)
    for i, (value, arm) in enumerate(setting.arms):
        series, shift = values.index(value), style.spread(i, len(setting.arms))
        style.line(top, curve(arm, "truncate", part), series, value, arm.trained, shift)
        if arm is base:
            continue
        found = {w: compare(arm, base, "truncate", "truncate", w, part) for w in arm.runs[0].widths}
        points = {w: d.estimate for w, d in found.items() if d is not None}
        style.line(bottom, points, series, value, arm.trained, shift)
        listed = ", ".join(f"{number(e.mean, sign='+')} at {w}" for w, e in points.items())
        words.append(f"{setting.label}, {value} - {base_name}: {listed}")
    bottom.axhline(0, color=style.BLACK, linewidth=0.8)
    style.width_axis(bottom, sorted({w for r in setting.runs for w in r.widths}))
    top.set_xlabel("")
    top.grid(axis="x", visible=False)
    return words


def curves(evidence: Comparisons) -> list[Figure]:
    """Validation accuracy of the truncated weights by epoch, a line a trained width, a panel an arm, a figure a setting."""
    out = []
    for setting in capped(evidence.qt_settings(), "Training curves", evidence):
        arms = [(value, arm) for value, arm in setting.arms if _epochs(arm, arm.trained[0])][:4]
        if any(len(_epochs(arm, arm.trained[0])) > 1 for _, arm in arms):
            out.append(_curves(setting, arms))
        elif arms:
            evidence.notes.append(
                f"Training curves: {setting.label} was validated once, which makes no curve."
            )
    return out


def _epochs(arm: Arm, width: int) -> dict[int, list[float]]:
    """{epoch: values over the seeds} of the truncated validation accuracy at `width` bits."""
    out: dict[int, list[float]] = {}
    for run in arm.runs:
        for epoch, value in (run.record.curves or {}).get(f"val/acc1_truncate_w{width}", []):
            if isinstance(value, int | float) and math.isfinite(value):
                out.setdefault(int(epoch), []).append(value)
    return dict(sorted(out.items()))


def _curves(setting: ComparisonGroup, arms: list[tuple[str, Arm]]) -> Figure:
    title = f"Training curves: {setting.label}"
    figure, body = style.new(3.1 * len(arms) + 0.6, 2.9, title, setting.flags)
    grid = body.subplots(1, len(arms), squeeze=False, sharey=True)[0]
    words = []
    for axes, (value, arm) in zip(grid, arms, strict=True):
        for i, width in enumerate(reversed(arm.trained)):
            points = _epochs(arm, width)
            if not points:
                continue
            colour, marker, dashes = SERIES[i % len(SERIES)]
            x = np.array([e + 1 for e in points])
            low, high = [min(v) for v in points.values()], [max(v) for v in points.values()]
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            mean = [sum(v) / len(v) for v in points.values()]
            look = {
                "color": colour,
                "linestyle": dashes,
                "marker": marker,
                "markevery": max(1, len(x) // 6),
            }
            axes.plot(x, mean, label=bits_words(width), **look)
            words.append(f"{value} at {width} bit ends at {mean[-1]:.1f}")
        axes.set_title(f"{value} ({len(arm.runs)} seed{'s' if len(arm.runs) > 1 else ''})")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    grid[0].set_ylabel("top-1 truncated [%], validation")
    style.clip(grid[0])
    grid[0].legend(loc="best")
    caption = [
        "Validation top-1 of the truncated weights after each epoch, trained widths. Line: mean over seeds; band: smallest",
        "to largest seed.",
        *setting.flags,
    ]
    name = f"curves_{setting.slug}"
    return Figure(
        name, "Training curves", title, joined(caption), f"{title}. {'; '.join(words)}", figure
    )
