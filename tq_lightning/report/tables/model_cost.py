"""Tables of a model's cost: storage, bytes read, and modeled energy."""

from typing import Any

from tq_lightning.records import STORAGE_LABELS, Energy, InspectRecord
from tq_lightning.report import labels
from tq_lightning.report.comparisons import Comparisons
from tq_lightning.report.tables.accuracy import Row, by_width
from tq_lightning.report.tables.render import Cell, Table

MIB = 2**20


def smallest_first(records: list[InspectRecord], field: str) -> dict[str, InspectRecord]:
    """Return {unique name: record} of the records that have `field`, smallest model first."""
    held = [record for record in records if getattr(record, field)]
    held.sort(key=lambda record: (record.parameters, record.model))
    names = [record.model for record in held]
    return {
        f"{r.model} (skip {r.skipped})" if names.count(r.model) > 1 else r.model: r for r in held
    }


def energies(records: list[InspectRecord]) -> dict[str, Energy]:
    """Return {name: energy model} of the records that have one, smallest model first."""
    held = smallest_first(records, "energy")
    return {name: r.energy for name, r in held.items() if r.energy and r.energy.by_width}


def ratio(record: InspectRecord, scheme: str) -> float:
    """Return the size of the float parameters, 4 bytes each, divided by the size of a scheme."""
    return 4 * record.parameters / record.ways[scheme].total


def _mebibytes(size: float) -> Cell:
    return f"{size / MIB:.2f}", size


def _microjoules(energies: dict[str, float]) -> Row:
    """Return one cell per kind of energy, given in pJ: four digits, without an exponent."""
    cells: Row = {}
    for kind, value in energies.items():
        shown = f"{value * 1e-6:.4g}"
        shown = f"{float(shown):.0f}" if "e+" in shown else shown
        cells[f"{labels.energy_name(kind)} [µJ]"] = (shown, value)
    return cells


def storage(comparisons: Comparisons) -> Table:
    """Return bytes by model and storage scheme, and the ratio to the float parameters."""
    records = smallest_first(comparisons.inspects, "ways")
    parts = {"total": "total", **labels.PARTS}
    rows: list[Row] = []
    for name, record in records.items():
        for key in (key for key in STORAGE_LABELS if key in record.ways):
            way, times = record.ways[key], ratio(record, key)
            row = {"model": name, "storage": STORAGE_LABELS[key], "size [bytes]": int(way.total)}
            row |= {f"{words} [MiB]": _mebibytes(getattr(way, p)) for p, words in parts.items()}
            rows.append({**row, "float parameters / total": (f"{times:.3f}×", times)})
    notes = tuple(f"{name}: {line}" for name, r in records.items() for line in r.accounting)
    caption = "Bytes to serve every width from 1 to 8 bits; the notes give the accounting."
    return Table("storage", "Storage", caption, rows, ("model", "storage"), notes)


def read_at(comparisons: Comparisons) -> Table:
    """Return the bytes read to run at each width."""
    records = smallest_first(comparisons.inspects, "read_at")
    widths = sorted({w for record in records.values() for w in record.read_at})
    rows: list[Row] = []
    for name, record in records.items():
        sizes = {width: _mebibytes(size) for width, size in record.read_at.items()}
        rows.append({"model": name, **by_width(widths, sizes, " [MiB]")})
    caption = "Bytes read from the packed file, by width."
    return Table("read_at", "Bytes read", caption, rows)


def energy(comparisons: Comparisons) -> Table:
    """Return the energy model by model and width."""
    models = energies(comparisons.inspects)
    rows: list[Row] = [
        {"model": name, "width [bits]": width, **_microjoules(pj)}
        for name, model in models.items()
        for width, pj in sorted(model.by_width.items())
    ]
    notes = tuple(dict.fromkeys(line for m in models.values() for line in m.assumptions))
    return Table("energy", "Energy", "Modeled, not measured.", rows, ("model",), notes)


def inference(comparisons: Comparisons) -> Table:
    """Return the modeled energy of an inference by model, accelerator and width."""
    rows: list[Row] = []
    notes: dict[str, None] = {}
    for name, record in smallest_first(comparisons.inspects, "inference").items():
        for accelerator, model in record.inference.items():
            notes |= dict.fromkeys(model.assumptions)
            for width, pj in sorted(model.by_width.items(), reverse=True):
                row: Row = {"model": name, "accelerator": accelerator, "width [bits]": width}
                rows.append({**row, **_microjoules({**pj, "total_pj": sum(pj.values())})})
    caption = "Energy of one inference, modeled by ZigZag, not measured."
    keys = ("model", "accelerator")
    return Table("inference", "Energy of an inference", caption, rows, keys, tuple(notes))


def constants(comparisons: Comparisons) -> Table:
    """Return the constants of the energy model in the inspect records."""
    rows: dict[tuple[str, Any], Row] = {}
    for model in (record.energy for record in comparisons.inspects if record.energy):
        for name, pj in model.constants_pj.items():
            row = {"operation": name, "energy [pJ]": pj, "source": model.source or "not recorded"}
            rows.setdefault((name, pj), row)
    caption = "Constants of the energy model, from the inspect records."
    return Table("constants", "Energy constants", caption, list(rows.values()))
