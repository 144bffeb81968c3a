"""The tables of a report."""

from typing import Any

from tq_lightning.records import STORAGE_LABELS
from tq_lightning.report.comparisons import PAPER, ComparisonGroup, Comparisons
from tq_lightning.report.groups import MAIN_KEYS, Arm, shown_extras
from tq_lightning.report.labels import (
    METHOD,
    PARTS,
    SPLIT_WORDS,
    bits_words,
    energy_name,
    short,
    text,
)
from tq_lightning.report.model_costs import MIB, energies, ratio, smallest_first
from tq_lightning.report.stats import Estimate, acc1, acc1_float, compare, gap, number, split_of
from tq_lightning.report.tables.render import Cell, Link, Table

Row = dict[str, Cell]


def tables(comparisons: Comparisons) -> list[Table]:
    """Return every table that has rows, in the order of the page."""
    functions = (qt_gap, arms, differences, storage, read_at, energy, constants, left_out)
    return [table for function in functions if (table := function(comparisons)).rows]


def _widths(arms: list[Arm]) -> list[int]:
    return sorted({w for arm in arms for run in arm.runs for w in run.widths}, reverse=True)


def _estimate(estimate: Estimate | None) -> Cell:
    return None if estimate is None else (estimate.text(), estimate.mean)


def headline(comparisons: Comparisons) -> Table:
    """The paper's rows at the trained widths: the first table of the page."""
    groups = comparisons.by_quantizer
    trained = {w for group in groups for _, arm in group.arms for w in arm.trained}
    notes = any(group.flags for group in groups)
    rows: list[Row] = [
        {
            "setting": group.label,
            "weights": name,
            **{
                f"{bits_words(w)} [%]": _estimate(acc1(arm, source, w, group.split))
                for w in sorted(trained, reverse=True)
            },
            "seeds": len(arm.runs),
            "split": SPLIT_WORDS[group.split].partition(",")[0],
            **({"note": " ".join(group.flags)} if notes else {}),
        }
        for group in groups
        for name, arm, source in group.rows
    ]
    caption = "Top-1 accuracy at each trained width, mean ± half of the 95 % t interval over seeds."
    return Table("headline", "Accuracy by width", caption, rows)


def qt_gap(comparisons: Comparisons) -> Table:
    """The paper's rows for every group and the QT gap of each arm, at all widths."""
    groups = comparisons.by_quantizer
    widths = _widths([arm for group in groups for _, arm in group.arms])
    rows: list[Row] = []

    def add(group: ComparisonGroup, row: str, unit: str, values: list[Cell], **more: Cell) -> None:
        cells = dict(zip([*map(bits_words, widths), "float"], values, strict=True))
        rest = {"split": group.split, "flags": " ".join(group.flags), **more}
        seeds = rest.pop("seeds")
        head = {"setting": group.label, "row": row, "unit": unit, "seeds": seeds}
        rows.append({**head, **cells, **rest})

    for group in groups:
        split = group.split
        for name, arm, source in group.rows:
            values = [_estimate(acc1(arm, source, w, split)) for w in widths]
            values.append(_estimate(acc1_float(arm, split)))
            add(group, name, "%", values, seeds=len(arm.runs))
            if name in PAPER and group.is_papers:
                paper = [PAPER[name].get(key) for key in [*map(str, widths), "float"]]
                source = {"split": "test", "flags": "arXiv 2506.11431", "seeds": None}
                add(group, f"{name} (paper)", "%", paper, **source)
        for value, arm in group.arms:
            gaps = [_estimate(d.estimate) if (d := gap(arm, w, split)) else None for w in widths]
            add(group, f"QT gap of {value}", "points", [*gaps, None], seeds=len(arm.runs))
    caption = f"Top-1 and QT gap by width, mean ± half of the 95 % t interval over seeds. {METHOD}"
    return Table("qt_gap", "QT gap", caption, rows, ("setting", "row"))


def arms(comparisons: Comparisons) -> Table:
    """Every arm with its truncated accuracy by width."""
    widths = _widths(comparisons.arms)
    rows: list[Row] = []
    for arm, extra in zip(comparisons.arms, shown_extras(comparisons.arms), strict=True):
        split = split_of(arm.runs)
        seconds = sum(run.record.seconds for run in arm.runs)
        rows.append(
            {
                **_facts(arm),
                "also": extra,
                "seeds": (",".join(map(str, arm.seeds)), len(arm.seeds)),
                "budget": arm.budget,
                **{
                    f"{bits_words(w)} [%]": _estimate(acc1(arm, "truncate", w, split))
                    for w in widths
                },
                "split": split,
                "time [s]": (f"{seconds:.0f}", seconds),
            }
        )
    caption = f"Top-1 of the truncated weights by width. {METHOD} Validation: at the best epoch."
    return Table("arms", "Arms", caption, rows, ("model", "data", "quantizer", "ste"))


def _facts(arm: Arm, last: int | None = None) -> Row:
    keys = ["model.name", "data.name", *MAIN_KEYS[2:last]]
    return {
        short(key).removesuffix(".name").replace("name", "model"): text(arm[key]) for key in keys
    }


def runs(comparisons: Comparisons) -> Table:
    """One row per run; its first cell opens the exact configuration."""
    widths = _widths(comparisons.arms)
    rows: list[Row] = []
    for index, arm in enumerate(comparisons.arms):
        for run in arm.runs:
            split = "test" if run.has_test else "val"
            pairs = [
                (run.acc1("quantize", w, split), run.acc1("truncate", w, split))
                for w in arm.trained
            ]
            gaps = [q - t for q, t in pairs if q is not None and t is not None]
            rows.append(
                {
                    "run": Link(run.id[:10], run.id),
                    "arm": index,
                    **_facts(arm, -1),
                    "seed": run.seed,
                    **{f"{bits_words(w)} [%]": run.acc1("truncate", w, split) for w in widths},
                    "largest QT gap [points]": max(gaps, default=None),
                    "split": split,
                    "epochs": run.record.epochs,
                    "time [s]": run.record.seconds,
                    "commit": str(run.record.commit)[:8],
                }
            )
    caption = (
        "Top-1 of the truncated weights by width, and the largest QT gap at a trained width. The "
        "button of a run opens its configuration, seed, commit and versions. runs.csv holds the "
        "full table, one row per run, source and width."
    )
    facets = ("model", "data", "quantizer", "ste", "level", "seed")
    return Table("runs", "Runs", caption, rows, facets)


def differences(comparisons: Comparisons) -> Table:
    """Every difference between two arms of a group, with its interval and conclusion."""
    rows: list[Row] = []
    for group in comparisons.by_quantizer:
        nested = [row for row in group.rows if row[1].nested]
        for b in (row for row in group.rows if not row[1].nested):
            for a in nested:
                rows += _differences("quantizer", group, a, b)
    for key, groups in comparisons.by_factor.items():
        for group in groups:
            base = (*group.reference, "truncate")
            for value, arm in group.arms:
                if arm is not base[1]:
                    rows += _differences(short(key), group, (value, arm, "truncate"), base)
    caption = (
        "Differences a - b of top-1, of truncated weights unless the row says otherwise. " + METHOD
    )
    facets = ("factor", "setting", "width [bits]", "how")
    return Table("differences", "Differences between arms", caption, rows, facets)


def _differences(
    factor: str, group: ComparisonGroup, a: tuple[str, Arm, str], b: tuple[str, Arm, str]
) -> list[Row]:
    found = {w: compare(a[1], b[1], a[2], b[2], w, group.split) for w in a[1].runs[0].widths}
    return [
        {
            "factor": factor,
            "setting": group.label,
            "a": a[0],
            "b": b[0],
            "width [bits]": width,
            "a - b [points]": (number(d.estimate.mean, 2, "+"), d.estimate.mean),
            "95 % interval [points]": d.interval,
            "how": d.how,
            "conclusion": d.verdict(),
            "split": group.split,
            "flags": " ".join(group.flags),
        }
        for width, d in found.items()
        if d is not None
    ]


def _mib(value: float | None) -> Cell:
    return None if value is None else (f"{value / MIB:.2f}", value)


def storage(comparisons: Comparisons) -> Table:
    """Bytes by model and storage scheme, and the ratio of the float parameters to them."""
    records = smallest_first(comparisons.inspects, "ways")
    rows: list[Row] = [
        {
            "model": name,
            "storage": label,
            "size [bytes]": int(way.total),
            "total [MiB]": _mib(way.total),
            **{f"{words} [MiB]": _mib(getattr(way, part)) for part, words in PARTS.items()},
            "float parameters / total": (f"{ratio(record, key):.3f}×", ratio(record, key)),
        }
        for name, record in records.items()
        for key, label in STORAGE_LABELS.items()
        if (way := record.ways.get(key)) is not None
    ]
    notes = tuple(f"{name}: {line}" for name, r in records.items() for line in r.accounting)
    caption = "Bytes to serve every width from 1 to 8 bits; the notes give the accounting."
    return Table("storage", "Storage", caption, rows, ("model", "storage"), notes)


def read_at(comparisons: Comparisons) -> Table:
    """Bytes read to run at each width."""
    records = smallest_first(comparisons.inspects, "read_at")
    widths = sorted({w for record in records.values() for w in record.read_at})
    rows: list[Row] = [
        {"model": name, **{f"{bits_words(w)} [MiB]": _mib(r.read_at.get(w)) for w in widths}}
        for name, r in records.items()
    ]
    caption = "Bytes read from the packed file, by width."
    return Table("read_at", "Bytes read to run at a width", caption, rows)


def energy(comparisons: Comparisons) -> Table:
    """The energy model by model and width."""
    models = energies(comparisons.inspects)
    every = [(name, w, pj) for name, m in models.items() for w, pj in sorted(m.by_width.items())]
    kinds = dict.fromkeys(kind for _, _, pj in every for kind in pj if kind.endswith("_pj"))
    rows: list[Row] = [
        {
            "model": name,
            "width [bits]": width,
            **{f"{energy_name(k)} [µJ]": _microjoule(pj.get(k)) for k in kinds},
        }
        for name, width, pj in every
    ]
    notes = tuple(dict.fromkeys(line for m in models.values() for line in m.assumptions))
    title = "Energy of a width switch and of weight traffic"
    return Table("energy", title, "Modeled, not measured.", rows, ("model",), notes)


def _microjoule(pj: float | None) -> Cell:
    return None if pj is None else (f"{pj * 1e-6:.4g}", pj)


def constants(comparisons: Comparisons) -> Table:
    """The constants of the energy model, as the inspect records carry them."""
    rows: dict[tuple[str, Any], Row] = {}
    for model in (record.energy for record in comparisons.inspects if record.energy):
        for name, pj in model.constants_pj.items():
            row = {"operation": name, "energy [pJ]": pj, "source": model.source or "not recorded"}
            rows.setdefault((name, pj), row)
    caption = "The constants that the inspect records carry."
    return Table("constants", "Constants of the energy model", caption, list(rows.values()))


def left_out(comparisons: Comparisons) -> Table:
    """Files that were found and not used, with the reason."""
    rows: list[Row] = [{"record": path, "reason": reason} for path, reason in comparisons.left_out]
    return Table("left_out", "Left out", "Found, but in no number of this report.", rows)
