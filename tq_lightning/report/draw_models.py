"""Figures from inspect records: the staircases of the mechanism, bytes by way of serving, energy of a switch."""

import textwrap
from typing import Any

import numpy as np

from tq_lightning.report import style
from tq_lightning.report.evidence import Evidence
from tq_lightning.report.style import SERIES, Drawn

# Ways of serving widths 1..8, in the order of the bars.
WAYS = {
    "float_master": "float master",
    "file_per_width": "one file per width",
    "master8": "8-bit master (ours)",
    "packed": "packed file (ours)",
    "paper": "paper's accounting",
}
PARTS = {"weights": "quantized weights", "float": "left in float", "norms": "norm sets", "scales": "scales"}
HATCHES = ("", "///", "...", "xx")


def mib(value: float) -> float:
    """Bytes -> MiB."""
    return value / 2**20


def model_names(records: list[dict[str, Any]]) -> list[str]:
    """Model names; where a model comes twice, what its policy skips tells the two apart."""
    names = [str(r["model"]) for r in records]
    skips = [", ".join(map(str, (r.get("policy") or {}).get("skip") or [])) or "nothing" for r in records]
    return [f"{n} (skip {s})" if names.count(n) > 1 else n for n, s in zip(names, skips, strict=True)]


def mechanism(evidence: Evidence) -> list[Drawn]:
    """Round, round shifted and floor as staircases over u, with the stretches shaded where shifted bins are not the rounded ones."""
    record = next((r["mechanism"] for r in evidence.inspects if r.get("mechanism")), None)
    if record is None:
        return []
    bits = [int(b) for b in record["bits"]]
    u = np.asarray(record["u"], dtype=float)
    title = "Mechanism: a right shift cuts where floor cuts, not where round does"
    columns = 2 if len(bits) > 1 else 1
    figure = style.new(7.0, 0.9 + 2.3 * -(-len(bits) // columns), title)
    grid = figure.subplots(-(-len(bits) // columns), columns, squeeze=False).ravel()
    words = []
    for axes, b in zip(grid, bits, strict=False):
        rounded, shifted, floored = (
            np.asarray(record[kind][str(b)], dtype=float) for kind in ("round", "round_shifted", "floor")
        )
        wrong = ~np.isclose(rounded, shifted)
        axes.fill_between(
            u,
            0,
            1,
            where=wrong,
            step="mid",
            color=style.ORANGE,
            alpha=0.28,
            linewidth=0,
            transform=axes.get_xaxis_transform(),
            label="bins disagree",
        )
        for i, (name, levels, wide) in enumerate(
            (("round", rounded, 1.4), ("round, shifted", shifted, 1.4), ("floor (= floor, shifted)", floored, 2.6))
        ):
            # Floor lies under the others, thick and pale: where it meets one of them both can be seen.
            colour, _, dashes = SERIES[i]
            axes.step(
                u,
                levels,
                where="mid",
                color=colour,
                linestyle="-" if i == 2 else dashes,
                linewidth=wide,
                alpha=0.45 if i == 2 else 1,
                label=name,
                zorder=2 - (i == 2) * 0.5,
            )
        share = 100 * float(wrong.mean())
        axes.set_title(f"{b} bit{'s' if b > 1 else ''}: {share:.0f} % of [0, 1] disagrees")
        axes.set_xlabel("normalised weight u [1]")
        axes.set_ylabel("level [1]")
        words.append(f"{share:.0f} % at {b}")
    for axes in grid[len(bits) :]:
        axes.set_visible(False)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "What each rule makes of a normalised weight u in [0, 1]: rounded at n bits, rounded at 8 bits and shifted right by 8 - n, floored at n bits "
        "(which equals floored at 8 bits and shifted). Shaded: rounding and shifting put the same weight into different bins."
    )
    return [
        Drawn(
            "mechanism",
            "Mechanism",
            title,
            caption,
            f"Staircases by bits; share of [0, 1] where round and round shifted disagree: {', '.join(words)}",
            figure,
        )
    ]


def storage(evidence: Evidence) -> list[Drawn]:
    """Bytes to serve every width 1..8, a panel a model, a bar a way, cut into what the bytes are."""
    records = [r for r in evidence.inspects if r.get("ways")]
    if not records:
        return []
    columns = 2 if len(records) > 1 else 1
    rows = -(-len(records) // columns)
    title = "Storage: bytes to serve every width from 1 to 8 bits"
    figure = style.new(7.2 if columns == 2 else 5.2, 0.9 + 1.75 * rows, title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    words = []
    for axes, record, name in zip(grid, records, model_names(records), strict=False):
        ways = {key: label for key, label in WAYS.items() if key in record["ways"]}
        master = float(record["ways"]["float_master"]["total"])
        for y, key in enumerate(ways):
            way, left = record["ways"][key], 0.0
            for i, part in enumerate(PARTS):
                axes.barh(
                    y,
                    mib(way.get(part, 0)),
                    left=left,
                    color=(style.BLUE, style.ORANGE, style.GREEN, style.PURPLE)[i],
                    hatch=HATCHES[i],
                    edgecolor="white",
                    linewidth=0.3,
                    height=0.72,
                    label=PARTS[part] if y == 0 else None,
                )
                left += mib(way.get(part, 0))
            ratio = master / way["total"]
            note = f"{mib(way['total']):.3g} MiB" + ("" if key == "float_master" else f", {ratio:.2f}×")
            axes.text(mib(way["total"]), y, f"  {note}", va="center", fontsize=7)
            words.append(f"{name}, {ways[key]}: {note}")
        axes.set_yticks(range(len(ways)), list(ways.values()), fontsize=7.5)
        axes.set_ylim(len(ways) - 0.4, -0.6)
        axes.set_xlim(0, 1.42 * max(mib(record["ways"][k]["total"]) for k in ways))
        axes.set_title(name)
        axes.set_xlabel("size [MiB]")
        axes.grid(axis="y", visible=False)
    for axes in grid[len(records) :]:
        axes.set_visible(False)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = "× says how many times smaller than the float parameters. " + " ".join(
        ratio_words(r, n) for r, n in zip(records, model_names(records), strict=True)
    )
    return [Drawn("storage", "Storage", title, caption.strip(), "; ".join(words), figure)]


def ratio_words(record: dict[str, Any], name: str) -> str:
    """The paper's ratio and, beside it, the one without its favourable assumptions."""
    paper, policy = record.get("paper_ratio"), record.get("policy_ratio")
    words = [
        f"{paper:.3f}× under the paper's accounting" if paper else "",
        f"{policy:.3f}× under this policy as packed" if policy else "",
    ]
    return f"{name}: {', '.join(w for w in words if w)}." if any(words) else ""


def energy(evidence: Evidence) -> list[Drawn]:
    """Model of the energy to switch to a width: refetch and requantize the float master, or shift in place."""
    records = [r for r in evidence.inspects if (r.get("energy") or {}).get("by_width")]
    if not records:
        return []
    columns = 2 if len(records) > 1 else 1
    rows = -(-len(records) // columns)
    assumptions = list(dict.fromkeys(line for r in records for line in r["energy"].get("assumptions", [])))
    title = "Energy of a switch of width: a model, not a measurement"
    figure = style.new(7.2 if columns == 2 else 5.2, 0.9 + 2.1 * rows, title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    words = []
    for axes, record, name in zip(grid, records, model_names(records), strict=False):
        by_width = record["energy"]["by_width"]
        widths = sorted(int(w) for w in by_width)
        kinds = [k for k in by_width[str(widths[0])] if k.endswith("_pj")]
        for i, kind in enumerate(kinds):
            colour, marker, dashes = SERIES[i % len(SERIES)]
            values = [by_width[str(w)][kind] * 1e-6 for w in widths]
            axes.plot(widths, values, color=colour, marker=marker, linestyle=dashes, label=energy_name(kind))
            words.append(f"{name}, {energy_name(kind)}: {values[0]:.3g} to {values[-1]:.3g} µJ")
        style.width_axis(axes, widths)
        axes.set_yscale("log")
        axes.set_ylabel("modelled energy [µJ]")
        axes.set_title(name)
    for axes in grid[len(records) :]:
        axes.set_visible(False)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    foot = (
        "\n".join(textwrap.wrap("Assumes: " + "; ".join(a.rstrip(".") for a in assumptions), 125))
        if assumptions
        else ""
    )
    figure.supxlabel(foot, x=0.01, ha="left", fontsize=6.5)
    caption = "Computed from picojoule constants (Horowitz, ISSCC 2014, 45 nm), not measured. " + " ".join(assumptions)
    return [Drawn("energy", "Energy", title, caption.strip(), "; ".join(words), figure)]


def energy_name(kind: str) -> str:
    """A key of the record as words."""
    known = {"refetch_float_pj": "refetch float, requantize", "shift_pj": "shift in place"}
    return known.get(kind, kind.removesuffix("_pj").replace("_", " "))
