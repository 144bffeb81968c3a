"""Costs of inspected models: order, names, and ratios to the float parameters."""

from tq_lightning.records import Energy, InspectRecord

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
