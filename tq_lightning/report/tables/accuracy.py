"""Tables of accuracy: the first table of the page, the QT gap, arms, runs and differences."""

from collections.abc import Iterable, Mapping
from typing import Any

from tq_lightning.records import ACC1
from tq_lightning.report import best_other, labels
from tq_lightning.report.comparisons import PAPER, ComparisonGroup, Comparisons, NamedArm
from tq_lightning.report.groups import MAIN_KEYS, Arm, shown_extras
from tq_lightning.report.stats import Estimate, compare, gaps, number, score_float, scores, split_of
from tq_lightning.report.tables.render import Cell, Table

Row = dict[str, Cell]


def _widths(arms: Iterable[Arm]) -> list[int]:
    return sorted({w for arm in arms for run in arm.runs for w in run.widths}, reverse=True)


def by_width(widths: Iterable[int | None], cells: Mapping[Any, Any], unit: str = "") -> Row:
    """Return one cell per width, with the unit in the column header. None stands for float."""
    heads = {w: "float" if w is None else f"{labels.counted(w, 'bit')}{unit}" for w in widths}
    return {head: _cell(cells.get(width)) for width, head in heads.items()}


def _cell(value: Any) -> Cell:
    return (value.text(), value.mean) if isinstance(value, Estimate) else value


def headline(comparisons: Comparisons) -> Table:
    """Return the paper's rows at the trained widths, and below them the best other arm."""
    rows: list[Row] = []
    groups, metric = comparisons.by_quantizer, comparisons.metric
    trained = sorted({w for g in groups for _, arm in g.arms for w in arm.trained}, reverse=True)
    notes: list[str] = []
    for group in groups:
        named, note = best_other.rows(comparisons, group)
        notes += [f"{group.label}. {words}" for words in note]
        split = labels.SPLIT_WORDS[group.split].partition(",")[0]
        for name, arm, source in named:
            cells = by_width(trained, scores(arm, source, trained, group.split), metric.suffix)
            row = {"setting": group.label, "weights": name, **cells, "seeds": len(arm.runs)}
            flags = {"note": " ".join(group.flags)} if group.flags else {}
            rows.append({**row, "split": split, **flags})
    what = "Top-1 accuracy" if metric is ACC1 else metric.quantity
    caption = f"{what} at each trained width, mean ± half-width of the 95 % t interval over seeds."
    return Table("headline", f"{metric.quantity} by width", caption, rows, notes=tuple(notes))


def qt_gap(comparisons: Comparisons) -> Table:
    """Return the paper's rows for every group and the QT gap of each arm, at all widths."""
    groups, metric = comparisons.by_quantizer, comparisons.metric
    widths = _widths(arm for group in groups for _, arm in group.arms)
    columns = [*widths, None]  # None: float
    rows: list[Row] = []
    for group in groups:
        last = {"split": group.split, "flags": " ".join(group.flags)}
        for name, arm, source in group.rows:
            found = scores(arm, source, widths, group.split)
            cells = by_width(columns, {**found, None: score_float(arm, group.split)})
            row = {"setting": group.label, "row": name, "unit": metric.unit, "seeds": len(arm.runs)}
            rows.append({**row, **cells, **last})
            if name in PAPER and group.is_papers:
                row |= {"row": f"{name} (paper)", "unit": "%", "seeds": None}
                row |= by_width(columns, PAPER[name])
                rows.append({**row, "split": "test", "flags": "arXiv 2506.11431"})
        for value, arm in group.arms:
            row = {"setting": group.label, "row": f"QT gap of {value}", "unit": metric.gap_unit}
            cells = by_width(columns, gaps(arm, widths, group.split))
            rows.append({**row, "seeds": len(arm.runs), **cells, **last})
    what = (
        f"{metric.title} and QT gap by width, mean ± half-width of the 95 % t interval over seeds."
    )
    return Table("qt_gap", "QT gap", f"{what} {labels.METHOD}", rows, ("setting", "row"))


def arms(comparisons: Comparisons) -> Table:
    """Return every arm with its truncated accuracy by width."""
    widths = _widths(comparisons.arms)
    rows: list[Row] = []
    for arm, extra in zip(comparisons.arms, shown_extras(comparisons.arms), strict=True):
        split, seconds = split_of(arm.runs), sum(run.record.seconds for run in arm.runs)
        row = {**_facts(arm), "also": extra, "seeds": (arm.seeds, len(arm.runs))}
        cells = scores(arm, "truncate", widths, split)
        row |= {"budget": arm.budget, **by_width(widths, cells, comparisons.metric.suffix)}
        rows.append({**row, "split": split, "time [s]": (f"{seconds:.0f}", seconds)})
    name = comparisons.metric.title
    caption = f"{name} of the truncated weights by width (val: at the best epoch). {labels.METHOD}"
    facets = ("model", "data", "quantizer", "ste")
    notes = tuple(dict.fromkeys(filter(None, map(_embedding_note, comparisons.arms))))
    return Table("arms", "Arms", caption, rows, facets, notes)


def _embedding_note(arm: Arm) -> str:
    """Return the share of embedding tables in the parameters of a model, if it has any."""
    share = arm.runs[0].record.parameters_embedding
    how = "quantized" if arm["model.quantize_embeddings"] else "in float"
    words = f"of the parameters are embedding tables, {how}."
    return f"{labels.model_and_data(arm)}: {share:.1%} {words}" if share else ""


def _facts(arm: Arm, last: int | None = None) -> Row:
    facts = {"model": arm["model.name"], "data": arm["data.name"]}
    facts |= {labels.short_key(key): arm[key] for key in MAIN_KEYS[2:last]}
    return {name: labels.format_value(value) for name, value in facts.items()}


def runs(comparisons: Comparisons) -> Table:
    """Return one row per run; its first cell opens the configuration."""
    widths = _widths(comparisons.arms)
    rows: list[Row] = []
    for index, arm in enumerate(comparisons.arms):
        for run in arm.runs:
            split, alone = split_of([run]), Arm(arm.config, (run,))
            lost = [gap.mean for gap in gaps(alone, arm.trained, split).values()]
            cells = {w: run.score("truncate", w, split) for w in widths}
            row = {"run": (run.id[:10], run.id), "arm": index, **_facts(arm, -1)}
            row |= {"seed": run.seed, **by_width(widths, cells, comparisons.metric.suffix)}
            row |= {f"largest QT gap [{run.metric.gap_unit}]": max(lost, default=None)}
            row |= {"split": split, "epochs": run.record.epochs, "time [s]": run.record.seconds}
            rows.append({**row, "commit": str(run.record.commit)[:8]})
    caption = (
        f"{comparisons.metric.title} of the truncated weights by width, and the largest QT gap at "
        "a trained width. Click a run to see its configuration, seed, commit and versions. "
        "runs.csv has the full table, with one row per run, source and width."
    )
    facets = ("model", "data", "quantizer", "ste", "level", "seed")
    return Table("runs", "Runs", caption, rows, facets, has_files=False)


def differences(comparisons: Comparisons) -> Table:
    """Return every difference between two arms of a group, with interval and conclusion."""
    pairs: list[tuple[str, ComparisonGroup, NamedArm, NamedArm]] = []
    for group in comparisons.by_quantizer:
        others = [row for row in group.rows if not row[1].nested]
        nested = [row for row in group.rows if row[1].nested]
        best = best_other.rows(comparisons, group)[0][len(group.rows) :]
        pairs += [("quantizer", group, a, b) for b in others for a in nested]
        pairs += [(best_other.BEST, group, a, b) for a in best for b in group.rows]
    for group in (group for groups in comparisons.by_factor.values() for group in groups):
        factor, base = labels.short_key(group.factor), (*group.reference, "truncate")
        compared = [(*pair, "truncate") for pair in group.arms if pair[1] is not base[1]]
        pairs += [(factor, group, a, base) for a in compared]
    unit = comparisons.metric.gap_unit
    rows: list[Row] = [
        {
            "factor": factor,
            "setting": group.label,
            "a": a[0],
            "b": b[0],
            "width [bits]": width,
            f"a - b [{unit}]": (number(found.mean, 2, "+"), found.mean),
            f"95 % interval [{unit}]": found.interval,
            "how": found.how,
            "conclusion": found.verdict(),
            "split": group.split,
            "flags": " ".join(group.flags),
        }
        for factor, group, a, b in pairs
        for width, found in compare(a[1], b[1], a[1].widths, group.split, a[2], b[2]).items()
    ]
    what = f"Differences a - b of {comparisons.metric.name}, "
    what += "for truncated weights unless a row states otherwise."
    facets = ("factor", "setting", "width [bits]", "how")
    return Table("differences", "Differences between arms", f"{what} {labels.METHOD}", rows, facets)


def left_out(comparisons: Comparisons) -> Table:
    """Return the files that were found but not used, each with the reason."""
    rows: list[Row] = [{"record": path, "reason": why} for path, why in comparisons.left_out]
    return Table("left_out", "Left out", "Found, but not used in this report.", rows)
