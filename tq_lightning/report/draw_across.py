"""Figures across settings: low-bit robustness, Pareto front, and disagreeing codes beside the accuracy lost."""

import textwrap

from tq_lightning.report import style
from tq_lightning.report.aggregate import SPLIT_WORDS, Estimate, acc1, mean_interval, split_of
from tq_lightning.report.arms import Arm
from tq_lightning.report.draw_accuracy import MAX_SETTINGS, capped
from tq_lightning.report.evidence import Evidence, row_arms
from tq_lightning.report.style import SERIES, Drawn

LOW_BITS = (1, 2)


def robustness(evidence: Evidence) -> list[Drawn]:
    """Top-1 at 1 and 2 bits, a line a setting, the paper's three rows side by side."""
    settings = capped(evidence.qt_settings(), "Low-bit robustness", evidence)
    if not settings:
        return []
    part = split_of([run for s in settings for run in s.runs])
    flags = [f"{s.label}: {flag}" for s in settings for flag in s.flags]
    figure = style.new(7.0, 1.5 + 0.5 * len(settings), "Low-bit robustness across architectures", flags)
    grid = figure.subplots(1, len(LOW_BITS), sharey=True, sharex=True)
    words, seen = [], set()
    for axes, bits in zip(grid, LOW_BITS, strict=True):
        for y, setting in enumerate(settings):
            for name, arm, source in row_arms(setting):
                estimate = acc1(arm, source, bits, part)
                row = [r for r in ("round, quantized", "round, truncated", "floor, truncated") if name.startswith(r)][0]
                series = ("round, quantized", "round, truncated", "floor, truncated").index(row)
                colour, marker, _ = SERIES[series]
                if estimate is None:
                    continue
                axes.errorbar(
                    estimate.mean,
                    y + 0.2 * (series - 1),
                    xerr=estimate.half,
                    fmt=marker,
                    color=colour,
                    capsize=2.5,
                    elinewidth=1,
                    label=row if (row, bits) not in seen else None,
                )
                seen.add((row, bits))
                words.append(f"{setting.label}, {name}, {bits} bit: {estimate.text()}")
        axes.set_title(f"{bits} bit{'s' if bits > 1 else ''}")
        axes.set_xlabel(f"top-1 accuracy [%]\n{SPLIT_WORDS[part]}")
    grid[0].set_yticks(range(len(settings)), ["\n".join(textwrap.wrap(s.label, 34)) for s in settings], fontsize=7.5)
    grid[0].set_ylim(len(settings) - 0.5, -0.5)
    low, high = grid[0].get_xlim()
    grid[0].set_xlim(max(low, -2), min(high, 102))
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower right", ncols=3)
    caption = f"Top-1 on the {SPLIT_WORDS[part]} at the narrowest widths, mean and 95 % t interval over seeds. {' '.join(flags)}"
    return [
        Drawn(
            "low_bit_robustness",
            "Low-bit robustness",
            "Low-bit robustness across architectures",
            caption.strip(),
            "; ".join(words),
            figure,
        )
    ]


def pareto(evidence: Evidence) -> list[Drawn]:
    """Accuracy of the truncated weights against the bytes read to run at that width, with the Pareto front, a figure a data set."""
    arms = [arm for arm in evidence.paired() if all((run.record.get("bytes") or {}).get("planes") for run in arm.runs)]
    datasets = list(dict.fromkeys(str(arm["data.name"]) for arm in arms))
    return [_pareto(name, [arm for arm in arms if str(arm["data.name"]) == name]) for name in datasets]


def _read(arm: Arm, width: int) -> float | None:
    return arm.runs[0].record["bytes"]["planes"].get(str(width))


def _pareto(dataset: str, arms: list[Arm]) -> Drawn:
    part = split_of([run for arm in arms for run in arm.runs])
    points = [
        (size, estimate.mean, arm, w)
        for arm in arms
        for w in arm.runs[0].widths
        if (size := _read(arm, w)) is not None and (estimate := acc1(arm, "truncate", w, part)) is not None
    ]
    front = pareto_front([(size, accuracy) for size, accuracy, _, _ in points])
    title = f"Accuracy against bytes read: {dataset}"
    figure = style.new(
        6.4,
        3.9,
        title,
        sorted({f"{_name(arm)}: one seed" for arm in arms if len(arm.runs) == 1} if len(arms) <= 6 else []),
    )
    axes = figure.add_subplot()
    ranked = sorted(
        arms, key=lambda arm: -sum(1 for size, accuracy, a, _ in points if a is arm and (size, accuracy) in front)
    )
    for i, arm in enumerate(ranked):
        own = [(size / 1024, accuracy, w) for size, accuracy, a, w in points if a is arm]
        x, y = [p[0] for p in own], [p[1] for p in own]
        if i >= len(SERIES):
            axes.plot(
                x, y, ".", color="#bbbbbb", markersize=3, zorder=1, label="other arms" if i == len(SERIES) else None
            )
            continue
        colour, marker, dashes = SERIES[i]
        axes.plot(x, y, color=colour, marker=marker, linestyle=dashes, linewidth=0.9, label=_name(arm), zorder=2)
    for size, accuracy, arm, w in points:
        if (size, accuracy) in front and arm in ranked[: len(SERIES)]:
            axes.annotate(
                str(w), (size / 1024, accuracy), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=6.5
            )
    axes.step(
        [s / 1024 for s, _ in front],
        [a for _, a in front],
        where="post",
        color=style.GREY,
        linewidth=2.5,
        alpha=0.35,
        label="Pareto front",
        zorder=1,
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bytes read to run at that width [KiB]")
    axes.set_ylabel(f"top-1 truncated [%], {SPLIT_WORDS[part]}")
    style.clip(axes)
    axes.legend(loc="lower right")
    words = ", ".join(f"{accuracy:.1f} at {size / 1024:.0f} KiB" for size, accuracy in front)
    caption = (
        f"Each marker is an arm at one width (digits: bits), mean over seeds, {SPLIT_WORDS[part]}. Bytes: planes read, what stays in float, scales "
        "and the norm set of that width. The grey step is the Pareto front."
    )
    return Drawn(f"pareto_{dataset}", "Pareto front", title, caption, f"Pareto front: {words}", figure)


def _name(arm: Arm) -> str:
    extra = [str(arm[k]) for k in ("model.level", "model.activations") if arm[k] not in (None, "endpoint", "none")]
    return ", ".join([str(arm["model.name"]), str(arm["model.quantizer"]), *extra])


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (cost, value) that no other point beats in both, by rising cost. [(1, 5), (2, 4), (3, 9)] -> [(1, 5), (3, 9)]."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def disagreement(evidence: Evidence) -> list[Drawn]:
    """Share of weight codes on which quantize and truncate disagree, beside the accuracy lost by truncation, trained networks."""
    settings = [s for s in evidence.qt_settings() if any(_share(arm, 2) for _, arm in s.arms)]
    settings = sorted(settings, key=lambda s: -len(s.runs))[: min(MAX_SETTINGS, len(SERIES) - 2)]
    if not settings:
        return []
    part = split_of([run for s in settings for run in s.runs])
    flags = [f"{s.label}: {flag}" for s in settings for flag in s.flags]
    title = "Codes that disagree, and the accuracy they cost, in trained networks"
    figure = style.new(7.0, 3.4, title, flags)
    left, right = figure.subplots(1, 2)
    words, widths = [], sorted({w for s in settings for r in s.runs for w in r.widths})
    drawn: list[tuple[str, Arm, int]] = []
    for i, setting in enumerate(settings):
        drawn += [
            (f"round, {setting.label}", arm, i + 1) for _, arm in setting.arms if arm["model.quantizer"] == "round"
        ][:1]
    floors = [arm for s in settings for _, arm in s.arms if arm["model.quantizer"] == "floor"]
    if floors:
        drawn.append((f"floor ({len(floors)} arm{'s' if len(floors) > 1 else ''}: 0 at every width)", floors[0], 0))
    for i, (name, arm, series) in enumerate(drawn):
        shift = 0.12 * (i - (len(drawn) - 1) / 2)
        shares = {w: e for w in arm.runs[0].widths if (e := _share(arm, w)) is not None}
        lost = {w: e for w in arm.runs[0].widths if (e := _lost(arm, w, part)) is not None}
        style.line(left, shares, series, name, arm.trained, shift)
        style.line(right, lost, series, name, arm.trained, shift)
        words.append(
            f"{name}: "
            + ", ".join(
                f"{shares[w].mean:.1f} % disagree and {lost[w].mean:.1f} points lost at {w}"
                for w in shares
                if w in lost
            )
        )
    for axes in (left, right):
        style.width_axis(axes, widths)
    left.set_ylabel("weight codes that disagree [%]")
    right.set_ylabel(f"accuracy lost by truncation [points]\n{SPLIT_WORDS[part]}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=1 if len(drawn) < 4 else 2)
    caption = (
        "Left: share of weight codes for which quantizing at n bits and shifting the 8-bit code to n bits give different integers. Right: the QT gap, "
        f"top-1 quantized minus truncated. Mean and 95 % t interval over seeds; hollow: width not trained. {' '.join(flags)}"
    )
    return [Drawn("mechanism_trained", "Mechanism", title, caption.strip(), "; ".join(words), figure)]


def _share(arm: Arm, width: int) -> Estimate | None:
    """Disagreeing weight codes in per cent over the seeds; None unless every run has the share."""
    values = [run.record["widths"].get(str(width), {}).get("disagree") for run in arm.runs]
    return None if any(v is None for v in values) else mean_interval([100.0 * v for v in values])


def _lost(arm: Arm, width: int, part: str) -> Estimate | None:
    """QT gap in percentage points over the seeds."""
    pairs = [(run.acc1("quantize", width, part), run.acc1("truncate", width, part)) for run in arm.runs]
    return (
        mean_interval([q - t for q, t in pairs if q is not None and t is not None])
        if all(None not in p for p in pairs)
        else None
    )
