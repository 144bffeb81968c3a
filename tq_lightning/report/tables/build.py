"""Which tables a report has, and what stands in their cells."""

from typing import Any

from tq_lightning.records import STORAGE_LABELS
from tq_lightning.report.comparisons import (
    PAPER,
    ROWS,
    Comparisons,
    is_papers,
    reference,
    row_arms,
    split,
)
from tq_lightning.report.groups import Arm, ComparisonGroup, shown_extras
from tq_lightning.report.model_costs import (
    energy_name,
    model_names,
    ratio,
    with_energy,
    with_key,
)
from tq_lightning.report.stats import METHOD, acc1, acc1_float, compare, number, split_of
from tq_lightning.report.tables.render import Cell, Table


def tables(evidence: Comparisons) -> list[Table]:
    """Every table that has rows, in the order of the page."""
    made = [
        qt_gap(evidence),
        arms(evidence),
        differences(evidence),
        storage(evidence),
        read_at(evidence),
        energy(evidence),
        constants(evidence),
    ]
    return [table for table in [*made, left_out(evidence)] if table.rows]


def _widths(arms: list[Arm]) -> list[int]:
    return sorted({w for arm in arms for run in arm.runs for w in run.widths}, reverse=True)


def _estimate(estimate: Any) -> Cell:
    return None if estimate is None else (estimate.text(), estimate.mean)


def qt_gap(evidence: Comparisons) -> Table:
    """The paper's three rows for every setting, and the QT gap of each arm, all widths."""
    found = evidence.qt_settings()
    widths = _widths([arm for s in found for _, arm in s.arms])
    rows: list[list[Cell]] = []
    for setting in found:
        part = split(setting)
        flags = " ".join(setting.flags)
        for words, arm, source in row_arms(setting):
            values = [_estimate(acc1(arm, source, w, part)) for w in widths]
            rows.append(
                [
                    setting.label,
                    words,
                    len(arm.runs),
                    *values,
                    _estimate(acc1_float(arm, part)),
                    part,
                    flags,
                ]
            )
            if words in PAPER and is_papers(setting):
                paper = [PAPER[words].get(str(w)) for w in widths]
                rows.append(
                    [
                        setting.label,
                        f"{words} (paper)",
                        None,
                        *paper,
                        PAPER[words]["float"],
                        "test",
                        "arXiv 2506.11431",
                    ]
                )
        for value, arm in setting.arms:
            gaps = [compare(arm, arm, "quantize", "truncate", w, part) for w in widths]
            cells = [None if g is None else _estimate(g.estimate) for g in gaps]
            rows.append(
                [
                    setting.label,
                    f"QT gap of {value} [points]",
                    len(arm.runs),
                    *cells,
                    None,
                    part,
                    flags,
                ]
            )
    caption = f"Top-1 in per cent by width in bits, mean ± half of the 95 % t interval over seeds. {METHOD}"
    return Table(
        "qt_gap",
        "QT gap",
        caption,
        ["setting", "row", "seeds", *map(str, widths), "float", "split", "flags"],
        rows,
        ("setting", "row"),
    )


def arms(evidence: Comparisons) -> Table:
    """Every arm with its truncated accuracy by width."""
    widths = _widths(evidence.arms)
    extras = shown_extras(evidence.arms)
    rows: list[list[Cell]] = []
    for arm, extra in zip(evidence.arms, extras, strict=True):
        part = split_of(arm.runs)
        facts = [
            arm["model.name"],
            arm["data.name"],
            *(_plain(arm[f"model.{k}"]) for k in ("quantizer", "ste", "level", "activations")),
        ]
        seconds = sum(run.record.seconds for run in arm.runs)
        values = [_estimate(acc1(arm, "truncate", w, part)) for w in widths]
        rows.append(
            [
                *facts,
                extra,
                (",".join(map(str, arm.seeds)), len(arm.seeds)),
                arm.budget,
                *values,
                part,
                (f"{seconds:.0f}", seconds),
            ]
        )
    columns = [
        "model",
        "data",
        "quantizer",
        "ste",
        "level",
        "activations",
        "also",
        "seeds",
        "budget",
        *map(str, widths),
        "split",
        "seconds",
    ]
    caption = f"Top-1 in per cent of the truncated weights by width in bits. {METHOD} Val: at the best epoch."
    return Table("arms", "Arms", caption, columns, rows, ("model", "data", "quantizer", "ste"))


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def differences(evidence: Comparisons) -> Table:
    """Every difference between two arms that differ in one key, with its interval and the verdict in words."""
    rows: list[list[Cell]] = []
    for setting in evidence.qt_settings():
        part = split(setting)
        named = row_arms(setting)
        ours = [(n, a, s) for n, a, s in named if n.startswith(ROWS[2][0])]
        for base in [r for r in named if r[1]["model.quantizer"] == "round"]:
            for other in ours:
                rows += _differences("quantizer", setting, other, base, part)
    for key in evidence.factors():
        for setting in evidence.factor_settings(key):
            name, short = reference(setting), key.removeprefix("model.")
            base = (name, setting.values(name)[0], "truncate")
            for value, arm in setting.arms:
                if arm is not base[1]:
                    rows += _differences(
                        short, setting, (value, arm, "truncate"), base, split(setting)
                    )
    caption = f"a - b in percentage points of top-1, truncated weights unless the row says otherwise. {METHOD}"
    columns = [
        "factor",
        "setting",
        "a",
        "b",
        "bits",
        "a - b",
        "interval",
        "how",
        "in words",
        "split",
        "flags",
    ]
    return Table(
        "differences",
        "Differences between arms",
        caption,
        columns,
        rows,
        ("factor", "setting", "bits", "how"),
    )


def _differences(
    factor: str,
    setting: ComparisonGroup,
    a: tuple[str, Arm, str],
    b: tuple[str, Arm, str],
    part: str,
) -> list[list[Cell]]:
    out = []
    for w in a[1].runs[0].widths:
        found = compare(a[1], b[1], a[2], b[2], w, part)
        if found is None:
            continue
        e = found.estimate
        interval = "" if e.half is None else f"[{number(e.low, 2, '+')}, {number(e.high, 2, '+')}]"
        cells = [
            (number(e.mean, 2, "+"), e.mean),
            interval,
            found.how,
            found.verdict(),
            part,
            " ".join(setting.flags),
        ]
        out.append([factor, setting.label, a[0], b[0], w, *cells])
    return out


def _size(value: float | None) -> Cell:
    return None if value is None else (f"{value / 2**20:.2f}", value)


def storage(evidence: Comparisons) -> Table:
    """Bytes by model and way, and how many times smaller than the float parameters; the accounting in its notes."""
    rows: list[list[Cell]] = []
    records = with_key(evidence, "ways")
    names = model_names(records)
    for record, name in zip(records, names, strict=True):
        for key, words in STORAGE_LABELS.items():
            if way := record.ways.get(key):
                times = ratio(record, key)
                sizes = (way.total, way.weights, way.float, way.norms, way.scales)
                parts = [_size(size) for size in sizes]
                rows.append([name, words, int(way.total), *parts, (f"{times:.3f}×", times)])
    notes = [f"{n}: {line}" for r, n in zip(records, names, strict=True) for line in r.accounting]
    columns = [
        "model",
        "way",
        "bytes",
        "total",
        "quantized weights",
        "left in float",
        "norm sets",
        "scales",
        "float parameters over this",
    ]
    return Table(
        "storage",
        "Storage",
        "Sizes in MiB; total also in bytes.",
        columns,
        rows,
        ("model", "way"),
        tuple(notes),
    )


def read_at(evidence: Comparisons) -> Table:
    """Bytes read to run at each width."""
    records = with_key(evidence, "read_at")
    widths = sorted({w for r in records for w in r.read_at})
    rows: list[list[Cell]] = [
        [n, *(_size(r.read_at.get(w)) for w in widths)]
        for r, n in zip(records, model_names(records), strict=True)
    ]
    caption = "MiB read from the packed file, by width in bits."
    return Table(
        "read_at", "Bytes read to run at a width", caption, ["model", *map(str, widths)], rows
    )


def energy(evidence: Comparisons) -> Table:
    """The energy model by model and width."""
    records = with_energy(evidence)
    kinds = list(
        dict.fromkeys(
            k
            for _, energy in records
            for v in energy.by_width.values()
            for k in v
            if k.endswith("_pj")
        )
    )
    rows: list[list[Cell]] = [
        [name, w, *((f"{v[k] * 1e-6:.4g}", v[k]) if k in v else None for k in kinds)]
        for (_, energy), name in zip(records, model_names([r for r, _ in records]), strict=True)
        for w, v in sorted(energy.by_width.items())
    ]
    notes = tuple(dict.fromkeys(line for _, energy in records for line in energy.assumptions))
    columns = ["model", "bits", *(f"{energy_name(k)} [µJ]" for k in kinds)]
    return Table(
        "energy",
        "Energy of a switch of width and of weight traffic",
        "Modelled, not measured.",
        columns,
        rows,
        ("model",),
        notes,
    )


def constants(evidence: Comparisons) -> Table:
    """The picojoule constants that the energy model rests on, as the inspect records carry them."""
    rows: dict[str, list[Cell]] = {}
    for record in evidence.inspects:
        if record.energy is not None:
            for name, pj in record.energy.constants_pj.items():
                source = record.energy.source or "not recorded"
                rows.setdefault(f"{name} {pj}", [name, pj, source])
    caption = "What the model rests on, as each inspect record carries it."
    return Table(
        "constants",
        "Constants of the energy model",
        caption,
        ["operation", "pJ", "source"],
        list(rows.values()),
    )


def left_out(evidence: Comparisons) -> Table:
    """What was found and not used, with the reason."""
    rows: list[list[Cell]] = [[path, reason] for path, reason in evidence.left_out]
    return Table(
        "left_out",
        "Left out",
        "Found, and in no number of this report.",
        ["record", "reason"],
        rows,
    )
