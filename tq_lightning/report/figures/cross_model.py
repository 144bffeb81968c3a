"""Figures across settings: low-bit robustness, Pareto front, and disagreeing codes beside the accuracy lost."""

from typing import Any

from matplotlib.axes import Axes

from tq_lightning.report.caveats import between, flags_of, mixed, seeds_words
from tq_lightning.report.comparisons import ROWS, Comparisons, row_arms
from tq_lightning.report.figures import style
from tq_lightning.report.figures.accuracy import capped
from tq_lightning.report.figures.style import SERIES, Figure
from tq_lightning.report.groups import START, Arm, ComparisonGroup
from tq_lightning.report.labels import ACTIVATIONS_SOURCE, bits_words, slug, unique, wrapped
from tq_lightning.report.stats import SPLIT_WORDS, Estimate, acc1, compare, mean_interval, split_of

LOW_BITS = (1, 2)
EXTRAS = (
    "model.level",
    "model.activations",
    ACTIVATIONS_SOURCE,
)  # what a legend tells beyond model and quantizer
FLOOR = 2  # the series of floor, as in the QT-gap figure
ROW_NAMES = [name for name, _, _ in ROWS]


def robustness(evidence: Comparisons) -> list[Figure]:
    """Top-1 at 1 and 2 bits, a line a setting, the paper's three rows side by side."""
    settings = capped(evidence.qt_settings(), "Low-bit robustness", evidence)
    if not settings:
        return []
    arms = [arm for s in settings for _, arm in s.arms]
    part, flags = split_of([run for arm in arms for run in arm.runs]), flags_of(settings)
    title = "Low-bit robustness across architectures"
    figure, body = style.new(7.0, 1.1 + 0.5 * len(settings), title, flags)
    grid = body.subplots(1, len(LOW_BITS), sharey=True, sharex=True)
    words = []
    for axes, bits in zip(grid, LOW_BITS, strict=True):
        for i, name in enumerate(ROW_NAMES):
            axes.plot([], [], SERIES[i][1], color=SERIES[i][0], label=name)
        for y, setting in enumerate(settings):
            words += _low_bits(axes, setting, y, bits, part)
        axes.set_title(bits_words(bits))
        axes.set_xlabel(f"top-1 accuracy [%]\n{SPLIT_WORDS[part]}, {seeds_words(arms)}")
    grid[0].set_yticks(range(len(settings)), [wrapped(s.label, 34) for s in settings], fontsize=7.5)
    grid[0].set_ylim(len(settings) - 0.5, -0.5)
    low, high = grid[0].get_xlim()
    grid[0].set_xlim(max(low, -2), min(high, 102))
    body.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    caption = " ".join(
        [
            f"Top-1 on the {SPLIT_WORDS[part]}, mean and 95 % t interval over seeds.",
            *flags,
            *mixed(arms),
        ]
    )
    return [
        Figure("low_bit_robustness", "Low-bit robustness", title, caption, "; ".join(words), figure)
    ]


def _low_bits(axes: Axes, setting: ComparisonGroup, y: int, bits: int, part: str) -> list[str]:
    """One setting's rows at height `y`; returns what they say."""
    words = []
    for name, arm, source in row_arms(setting):
        series = next(i for i, row in enumerate(ROW_NAMES) if name.startswith(row))
        if (e := acc1(arm, source, bits, part)) is not None:
            colour, marker, _ = SERIES[series]
            at = y + 0.2 * (series - 1)
            axes.errorbar(
                e.mean, at, xerr=e.half, fmt=marker, color=colour, capsize=2.5, elinewidth=1
            )
            words.append(f"{setting.label}, {name}, {bits_words(bits)}: {e.text()}")
    return words


def pareto(evidence: Comparisons) -> list[Figure]:
    """Accuracy of the truncated weights against the bytes read to run at that width with the Pareto front."""
    arms = [
        arm
        for arm in evidence.paired()
        if all(run.record.bytes and run.record.bytes.planes for run in arm.runs)
    ]
    datasets = list(dict.fromkeys(str(arm["data.name"]) for arm in arms))
    stems = unique([f"pareto_{slug(name)}" for name in datasets])
    pairs = zip(datasets, stems, strict=True)
    drawn = [
        _pareto(name, stem, [arm for arm in arms if str(arm["data.name"]) == name])
        for name, stem in pairs
    ]
    if len(evidence.paired()) < len(evidence.arms):
        for figure in drawn:
            figure.caption += (
                " Arms whose STE is not the paper's for their quantizer are not drawn."
            )
    return drawn


def _read(arm: Arm, width: int) -> float | None:
    size = arm.runs[0].record.bytes
    return size.planes.get(width) if size is not None else None


def _pareto(dataset: str, stem: str, arms: list[Arm]) -> Figure:
    part = split_of([run for arm in arms for run in arm.runs])
    points = [
        (size, estimate, arm, w)
        for arm in arms
        for w in arm.runs[0].widths
        if (size := _read(arm, w)) is not None
        and (estimate := acc1(arm, "truncate", w, part)) is not None
    ]
    front = pareto_front([(size, e.mean) for size, e, _, _ in points])
    title = f"Accuracy against bytes read: {dataset}"
    flags = between([[arm] for arm in arms], "arms")
    if single := sorted({_name(arm) for arm in arms if len(arm.runs) == 1}):
        flags.append(
            f"ONE SEED ({', '.join(single) if len(single) <= 6 else f'{len(single)} arms'})."
        )
    figure, body = style.new(6.4, 3.7, title, flags)
    axes = body.add_subplot()
    x, y = [size / 1024 for size, _, _, _ in points], [e.mean for _, e, _, _ in points]
    axes.plot(
        x, y, ".", color="#aaaaaa", markersize=4, label="every arm drawn, each width", zorder=1
    )
    on_front = [
        arm for arm in arms if any(a is arm and (size, e.mean) in front for size, e, a, _ in points)
    ]
    for arm, (colour, marker, dashes) in zip(on_front, SERIES, strict=False):
        own = [(size / 1024, e.mean, e.half or 0.0) for size, e, a, _ in points if a is arm]
        look: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "linestyle": dashes,
            "linewidth": 0.9,
        }
        sizes, means, halves = zip(*own, strict=True)
        axes.errorbar(
            sizes,
            means,
            halves,
            label=f"{_name(arm)} (on the front)",
            elinewidth=0.7,
            capsize=2,
            **look,
        )
    for size, e, _, w in points:
        if (size, e.mean) in front:
            at = (size / 1024, e.mean)
            axes.annotate(str(w), at, (0, 6), textcoords="offset points", ha="center", fontsize=6.5)
    x, y = [size / 1024 for size, _ in front], [accuracy for _, accuracy in front]
    axes.step(
        x,
        y,
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
    axes.set_ylabel(f"top-1 truncated [%]\n{SPLIT_WORDS[part]}, {seeds_words(arms)}")
    style.clip(axes)
    body.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    words = ", ".join(f"{accuracy:.1f} at {size / 1024:.0f} KiB" for size, accuracy in front)
    caption = (
        f"Each point is an arm at one width (digits: bits), mean over seeds, {SPLIT_WORDS[part]}; bars: 95 % t interval, of "
        "the arms on the front (the front is that of the means). Bytes: planes read, "
        "what stays in float, scales and the norm set of that width. The grey step is the Pareto front."
    )
    caption = " ".join([caption, *flags, *mixed(arms)])
    return Figure(stem, "Pareto front", title, caption, f"Pareto front: {words}", figure)


def _name(arm: Arm) -> str:
    extra = [str(arm[k]) for k in EXTRAS if arm[k] not in (None, "endpoint", "quantize")]
    return ", ".join(
        [
            str(arm["model.name"]),
            str(arm["model.quantizer"]),
            *extra,
            *(["fine-tuned"] if arm[START] else []),
        ]
    )


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (cost, value) that no other beats in both, by rising cost: [(1, 5), (2, 4), (3, 9)] -> [(1, 5), (3, 9)]."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def disagreement(evidence: Comparisons) -> list[Figure]:
    """Share of weight codes on which the two sources disagree, beside the accuracy lost by truncation."""
    settings = [s for s in evidence.qt_settings() if any(_share(arm, 2) for _, arm in s.arms)]
    if not settings:
        return []
    settings = capped(settings, "Codes that disagree", evidence, len(SERIES) - 1)
    part = split_of([run for s in settings for run in s.runs])
    flags = flags_of(settings)
    title = "Codes that disagree, and the accuracy they cost, in trained networks"
    figure, body = style.new(7.0, 2.6 + 0.17 * len(settings), title, flags)
    left, right = body.subplots(1, 2)
    words, widths = [], sorted({w for s in settings for r in s.runs for w in r.widths})
    drawn = [
        (f"{value}, {s.label}", arm)
        for s in settings
        for value, arm in s.arms
        if arm["model.quantizer"] == "round"
    ]
    floors = [arm for s in settings for _, arm in s.arms if arm["model.quantizer"] == "floor"]
    zero = all(
        not result.disagree
        for arm in floors
        for run in arm.runs
        for result in (run.record.widths or {}).values()
    )
    if floors:
        many = f"{len(floors)} arms, the first drawn" if len(floors) > 1 else "1 arm"
        drawn.append((f"floor ({many}{'; 0 at every width in each' if zero else ''})", floors[0]))
    for i, (name, arm) in enumerate(drawn):
        others = [k for k in range(len(SERIES)) if k != FLOOR]
        series = FLOOR if name.startswith("floor") else others[i % len(others)]
        shift = style.spread(i, len(drawn))
        shares = {w: e for w in arm.runs[0].widths if (e := _share(arm, w)) is not None}
        lost = {w: e for w in arm.runs[0].widths if (e := _lost(arm, w, part)) is not None}
        style.line(left, shares, series, name, arm.trained, shift)
        style.line(right, lost, series, name, arm.trained, shift)
        both = [
            f"{shares[w].mean:.1f} % disagree and {lost[w].mean:.1f} points lost at {w}"
            for w in shares
            if w in lost
        ]
        words.append(f"{name}: {', '.join(both)}")
    for axes in (left, right):
        style.width_axis(axes, widths)
    left.set_ylabel("weight codes that disagree [%]")
    right.set_ylabel("accuracy lost [points]")
    left.set_title("quantize and truncate disagree")
    arms = [arm for s in settings for _, arm in s.arms]
    right.set_title(f"QT gap, {SPLIT_WORDS[part]}, {seeds_words(arms)}")
    body.legend(*left.get_legend_handles_labels(), loc="outside lower left")
    caption = (
        "Left: share of weight codes for which quantizing at n bits and shifting the 8-bit code to n bits give different "
        "integers. Right: the QT gap, top-1 quantized minus truncated. Mean and 95 % t interval over seeds; hollow: width "
        "not trained."
    )
    caption = " ".join([caption, *flags, *mixed(arms)])
    return [Figure("mechanism_trained", "Mechanism", title, caption, "; ".join(words), figure)]


def _share(arm: Arm, width: int) -> Estimate | None:
    """Disagreeing weight codes in per cent over the seeds; None unless every run has the share."""
    results = [(run.record.widths or {}).get(width) for run in arm.runs]
    values = [r.disagree for r in results if r is not None and r.disagree is not None]
    return mean_interval([100.0 * v for v in values]) if len(values) == len(results) else None


def _lost(arm: Arm, width: int, part: str) -> Estimate | None:
    """QT gap in percentage points over the seeds."""
    gap = compare(arm, arm, "quantize", "truncate", width, part)
    return gap.estimate if gap is not None else None
