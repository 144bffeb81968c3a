"""Figures from inspect records: the mechanism, bytes by storage scheme, and energy of a switch."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tq_lightning.records import STORAGE_LABELS, InspectRecord
from tq_lightning.report.comparisons import Comparisons
from tq_lightning.report.figures import style
from tq_lightning.report.figures.style import Drawing, Figure
from tq_lightning.report.labels import PARTS, counted, energy_name, format_range
from tq_lightning.report.tables.model_cost import MIB, energies, ratio, smallest_first

PART_LOOKS = {  # slate tones, which no other figure uses
    "weights": ("#33475b", ""),
    "float": ("#8fa1b3", "///"),
    "norms": ("#d3dbe3", "..."),
    "scales": ("#000000", ""),
}


def mechanism(comparisons: Comparisons) -> Drawing:
    """Draw the levels of round, shifted round and floor over u; shade where both rounds differ."""
    record = next((r.mechanism for r in comparisons.inspects if r.mechanism), None)
    if record is None:
        return [], []
    wrong = {b: ~np.isclose(record.round[b], record.round_shifted[b]) for b in record.bits}
    shares = {bits: 100 * float(where.mean()) for bits, where in wrong.items()}
    worst = max(shares, key=lambda bits: shares[bits])
    title = (
        f"A right shift gives the bins of floor: at {counted(worst, 'bit')}, rounding puts "
        f"{shares[worst]:.0f} % of [0, 1] into other bins"
    )
    rows = -(-len(record.bits) // 2)
    canvas, body = style.new((7.0, 0.3 + 2.3 * rows), title)
    lines: list[tuple[Any, str, dict[str, Any]]] = [
        (record.floor, "floor (= floor, shifted)", {"color": style.GREEN, "lw": 4, "alpha": 0.5}),
        (record.round, "round", {"color": style.PALE[style.ORANGE], "lw": 2}),
        (record.round_shifted, "round, shifted", {"color": style.ORANGE, "lw": 1.2, "ls": "--"}),
    ]
    grid = _grid(body, rows, 2, len(record.bits))
    for axes, bits in zip(grid, record.bits, strict=True):
        shade: Any = {"color": style.GRAY, "alpha": 0.22, "linewidth": 0, "label": "bins disagree"}
        over, where = axes.get_xaxis_transform(), wrong[bits].tolist()
        axes.fill_between(record.u, 0, 1, where=where, transform=over, **shade)
        for levels, label, look in lines:
            axes.step(record.u, levels[bits], where="mid", label=label, **look)
        axes.set_title(f"{counted(bits, 'bit')}: {shares[bits]:.0f} % of [0, 1] disagrees")
        axes.set(xlabel="normalized weight u (no unit)", ylabel="level (no unit)")
    body.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "Level of a normalized weight u in [0, 1] under each rule: rounded at n bits, rounded at "
        "8 bits and shifted right by 8 - n, and floored at n bits, which equals floored at 8 bits "
        "and shifted. Shaded: rounding and shifting put the same weight into different bins."
    )
    words = ", ".join(f"{share:.0f} % at {bits}" for bits, share in shares.items())
    alt = f"Levels over u by bits; share of [0, 1] where round and round shifted disagree: {words}"
    return [Figure("mechanism", "Mechanism", title, caption, alt, canvas)], []


def _grid(body: Any, rows: int, columns: int, used: int) -> list[Axes]:
    grid = list(np.ravel(body.subplots(rows, columns, squeeze=False)))
    for axes in grid[used:]:
        axes.set_visible(False)
    return grid[:used]


def storage(comparisons: Comparisons) -> Drawing:
    """Draw the bytes to serve the widths 1 to 8, one panel per model, one bar per scheme."""
    records = smallest_first(comparisons.inspects, "ways")
    if not records:
        return [], []
    title = "Bytes to serve every width from 1 to 8 bits"
    if packed := [ratio(r, "packed") for r in records.values() if "packed" in r.ways]:
        span = " to ".join(f"{v:.1f}" for v in dict.fromkeys((min(packed), max(packed))))
        title = f"One packed file serves 1 to 8 bits in {span}× fewer bytes than float parameters"
    columns = min(2, len(records))
    rows = -(-len(records) // columns)
    canvas, body = style.new((7.4 if columns == 2 else 5.4, 0.3 + 1.9 * rows), title)
    grid = _grid(body, rows, columns, len(records))
    words: list[str] = []
    for axes, (name, record) in zip(grid, records.items(), strict=True):
        words += [f"{name}, {note}" for note in _bars(axes, record)]
    body.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "Smaller or larger than the float parameters, 4 bytes each. The accounting of the paper "
        "leaves only the stem in float; the other bars follow the policy above them. The storage "
        "table gives the accounting."
    )
    return [Figure("storage", "Storage", title, caption, "; ".join(words), canvas)], []


def _bars(axes: Axes, record: InspectRecord) -> list[str]:
    """Draw the bars of one model and return a text for each."""
    labels = {key: label for key, label in STORAGE_LABELS.items() if key in record.ways}
    words = []
    for y, (key, label) in enumerate(labels.items()):
        way, left = record.ways[key], 0.0
        for part, (color, hatch) in PART_LOOKS.items():
            size, entry = getattr(way, part) / MIB, PARTS[part] if y == 0 else None
            look: Any = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.3}
            axes.barh(y, size, 0.72, left, label=entry, **look)
            left += size
        times = ratio(record, key)
        side = f", {times:.2f}× smaller" if times >= 1 else f", {1 / times:.2f}× larger"
        note = f"{way.total / MIB:.3g} MiB{'' if key == 'float_master' else side}"
        axes.text(way.total / MIB, y, f"  {note}", va="center", fontsize=7)
        words.append(f"{label}: {note}")
    axes.set_yticks(range(len(labels)), list(labels.values()), fontsize=7.5)
    widest = max(record.ways[key].total for key in labels) / MIB
    axes.set(xlim=(0, 2.4 * widest), ylim=(len(labels) - 0.4, -0.6), xlabel="size [MiB]")
    axes.set_title(f"{record.model}\nin float: {record.skipped}", fontsize=8)
    axes.grid(axis="y", visible=False)
    return words


def energy(comparisons: Comparisons) -> Drawing:
    """Draw the energy model on a log axis, one row per model, one line per kind of energy."""
    models = energies(comparisons.inspects)
    if not models:
        return [], []
    every = [pj for model in models.values() for pj in model.by_width.values()]
    kinds = [k for k in every[0] if k.endswith("_pj") and all(k in pj for pj in every)]
    title = "Modeled energy of a width switch and of weight traffic"
    if {"refetch_float_pj", "shift_pj"} <= set(kinds):
        times = [pj["refetch_float_pj"] / pj["shift_pj"] for pj in every]
        title = (
            f"Modeled, not measured: a shift in place takes {format_range(times, 0)} "
            "times less energy than refetching the float weights"
        )
    assumptions = list(dict.fromkeys(line for m in models.values() for line in m.assumptions))
    foot = "Assumes: " + "; ".join(a.rstrip(".") for a in assumptions) if assumptions else ""
    size = (7.2, 0.9 + 0.16 * len(kinds) * len(models))
    canvas, body = style.new(size, title, foot=foot)
    axes = body.add_subplot()
    words = []
    for y, (name, model) in enumerate(models.items()):
        for i, kind in enumerate(kinds):
            values = {w: pj[kind] * 1e-6 for w, pj in sorted(model.by_width.items())}
            at = [y + style.series_offset(i, len(kinds), 0.64)] * len(values)
            look: Any = {"color": style.SERIES[i % 6], "lw": 1, "marker": "|", "ms": 6}
            label = energy_name(kind)
            axes.plot(list(values.values()), at, label=label if y == 0 else None, **look)
            ends = [f"{v:.3g} µJ at {w}" for w, v in values.items()]
            words.append(f"{name}, {label}: {ends[0]} to {ends[-1]}")
    axes.set(xscale="log", xlabel="modeled energy [µJ], a tick per width from 1 to 8 bits")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_yticks(range(len(models)), list(models))
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    body.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    sources = dict.fromkeys(model.source for model in models.values() if model.source)
    lines = [f"{line.rstrip('.')}." for line in [*sources, *assumptions]]
    caption = " ".join(["Computed from picojoule constants, not measured.", *lines])
    return [Figure("energy", "Energy", title, caption, "; ".join(words), canvas)], []
