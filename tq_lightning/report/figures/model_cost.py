"""Figures from inspect records: the staircases of the mechanism, bytes by way of serving, energy of a switch."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from tq_lightning.records import STORAGE_LABELS, InspectRecord, Mechanism
from tq_lightning.report.comparisons import Comparisons
from tq_lightning.report.figures import style
from tq_lightning.report.figures.style import SERIES, Figure
from tq_lightning.report.labels import bits_words
from tq_lightning.report.model_costs import (
    energy_name,
    mib,
    model_names,
    ratio,
    times,
    with_energy,
    with_key,
)

# What bytes are: (words, colour, hatch).
PARTS = {
    "weights": ("quantized weights", style.BLUE, ""),
    "float": ("left in float", style.ORANGE, "///"),
    "norms": ("norm sets", style.GREEN, "..."),
    "scales": ("scales", style.PURPLE, "xx"),
}


def mechanism(evidence: Comparisons) -> list[Figure]:
    """Round, round shifted and floor as staircases over u; shaded where shifted bins are not the rounded ones."""
    record = next((r.mechanism for r in evidence.inspects if r.mechanism), None)
    if record is None:
        return []
    bits = record.bits
    title = "Mechanism: a right shift cuts where floor cuts, not where round does"
    rows = -(-len(bits) // 2)
    figure, body = style.new(7.0, 0.3 + 2.3 * rows, title)
    grid = np.ravel(body.subplots(rows, 2, squeeze=False))
    shares = {b: _staircases(axes, record, b) for axes, b in zip(grid, bits, strict=False)}
    for axes in grid[len(bits) :]:
        axes.set_visible(False)
    body.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "What each rule makes of a normalised weight u in [0, 1]: rounded at n bits, rounded at 8 bits and shifted right "
        "by 8 - n, floored at n bits (which equals floored at 8 bits and shifted). Shaded: rounding and shifting put the "
        "same weight into different bins."
    )
    words = ", ".join(f"{share:.0f} % at {b}" for b, share in shares.items())
    alt = f"Staircases of level over u by bits; share of [0, 1] where round and round shifted disagree: {words}"
    return [Figure("mechanism", "Mechanism", title, caption, alt, figure)]


def _staircases(axes: Axes, record: Mechanism, bits: int) -> float:
    """Draw one width; returns the share of [0, 1] in per cent where round and round shifted disagree."""
    u = np.asarray(record.u, dtype=float)
    rounded, shifted, floored = (
        np.asarray(levels[bits], dtype=float)
        for levels in (record.round, record.round_shifted, record.floor)
    )
    wrong = ~np.isclose(rounded, shifted)
    over = axes.get_xaxis_transform()
    axes.fill_between(
        u,
        0,
        1,
        where=wrong.tolist(),
        color=style.ORANGE,
        alpha=0.28,
        linewidth=0,
        transform=over,
        label="bins disagree",
    )
    # Floor lies under the others, thick and pale: where it meets one of them both can be seen.
    axes.step(
        u,
        floored,
        where="mid",
        color=style.GREEN,
        linewidth=3,
        alpha=0.45,
        label="floor (= floor, shifted)",
    )
    axes.step(u, rounded, where="mid", color=style.BLUE, linewidth=1.4, label="round")
    axes.step(
        u,
        shifted,
        where="mid",
        color=style.RED,
        linestyle="--",
        linewidth=1.4,
        label="round, shifted",
    )
    share = 100 * float(wrong.mean())
    axes.set_title(f"{bits_words(bits)}: {share:.0f} % of [0, 1] disagrees")
    axes.set_xlabel("normalised weight u (no unit)")
    axes.set_ylabel("level (no unit)")
    return share


def storage(evidence: Comparisons) -> list[Figure]:
    """Bytes to serve every width 1..8, a panel a model, a bar a way, cut into what the bytes are."""
    records = with_key(evidence, "ways")
    if not records:
        return []
    columns = min(2, len(records))
    rows = -(-len(records) // columns)
    title = "Storage: bytes to serve every width from 1 to 8 bits"
    figure, body = style.new(7.2 if columns == 2 else 5.2, 0.3 + 1.9 * rows, title)
    grid = np.ravel(body.subplots(rows, columns, squeeze=False))
    names = model_names(records)
    words = [w for axes, r, n in zip(grid, records, names, strict=False) for w in _bars(axes, r, n)]
    for axes in grid[len(records) :]:
        axes.set_visible(False)
    body.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "Smaller or larger than the float parameters, 4 bytes each. The paper's accounting leaves the stem alone in float; the "
        "other bars follow the policy named above them. The table below spells the accounting out."
    )
    return [Figure("storage", "Storage", title, caption, "; ".join(words), figure)]


def _bars(axes: Axes, record: InspectRecord, name: str) -> list[str]:
    """One model's bars; returns what each says."""
    ways = {key: label for key, label in STORAGE_LABELS.items() if key in record.ways}
    words = []
    for y, (key, label) in enumerate(ways.items()):
        way, left = record.ways[key], 0.0
        for part, (what, colour, hatch) in PARTS.items():
            size = mib(getattr(way, part))
            label_once = what if y == 0 else None
            axes.barh(
                y,
                size,
                0.72,
                left,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.3,
                label=label_once,
            )
            left += size
        note = f"{mib(way.total):.3g} MiB{'' if key == 'float_master' else ', ' + times(ratio(record, key))}"
        axes.text(mib(way.total), y, f"  {note}", va="center", fontsize=7)
        words.append(f"{name}, {label}: {note}")
    axes.set_yticks(range(len(ways)), list(ways.values()), fontsize=7.5)
    axes.set_ylim(len(ways) - 0.4, -0.6)
    axes.set_xlim(0, 2.0 * max(mib(record.ways[k].total) for k in ways))
    axes.set_title(f"{record.model}\nin float: {record.skipped}", fontsize=8)
    axes.set_xlabel("size [MiB]")
    axes.grid(axis="y", visible=False)
    return words


def energy(evidence: Comparisons) -> list[Figure]:
    """Model of the energy to switch to a width: refetch and requantize the float master, or shift in place."""
    records = with_energy(evidence)
    if not records:
        return []
    columns = min(2, len(records))
    rows = -(-len(records) // columns)
    assumptions = list(dict.fromkeys(line for _, e in records for line in e.assumptions))
    title = "Energy of a switch of width and of weight traffic: a model, not a measurement"
    foot = "Assumes: " + "; ".join(a.rstrip(".") for a in assumptions) if assumptions else ""
    figure, body = style.new(7.2 if columns == 2 else 5.2, 0.3 + 2.1 * rows, title, foot=foot)
    grid = np.ravel(body.subplots(rows, columns, squeeze=False))
    words = []
    names = model_names([record for record, _ in records])
    for axes, (_, model), name in zip(grid, records, names, strict=False):
        by_width = model.by_width
        widths = sorted(by_width)
        kinds = [
            k
            for k in by_width[widths[0]]
            if k.endswith("_pj") and all(k in row for row in by_width.values())
        ]
        for i, kind in enumerate(kinds):
            colour, marker, dashes = SERIES[i % len(SERIES)]
            values = [by_width[w][kind] * 1e-6 for w in widths]
            look = {
                "color": colour,
                "marker": marker,
                "linestyle": dashes,
                "label": energy_name(kind),
            }
            if kind.startswith(
                "traffic"
            ):  # close to the refetches: big and hollow, so that both are seen
                look |= {"markersize": 9, "markerfacecolor": "none", "linewidth": 0.8}
            axes.plot(widths, values, **look)
            words.append(
                f"{name}, {energy_name(kind)}: {values[0]:.3g} µJ at {widths[0]} to {values[-1]:.3g} µJ at {widths[-1]}"
            )
        drawn = [by_width[w][kind] * 1e-6 for w in widths for kind in kinds]
        style.width_axis(axes, widths)
        axes.set_yscale("log")
        axes.set_ylim(
            10 ** math.floor(math.log10(min(drawn))), 10 ** math.ceil(math.log10(max(drawn)))
        )
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("modelled energy [µJ]")
        axes.set_title(name)
    for axes in grid[len(records) :]:
        axes.set_visible(False)
    body.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    sources = dict.fromkeys(e.source for _, e in records if e.source)
    caption = " ".join(
        [
            "Computed from picojoule constants, not measured.",
            *(f"{line}." for line in [*sources, *assumptions]),
        ]
    )
    return [Figure("energy", "Energy", title, caption, "; ".join(words), figure)]
