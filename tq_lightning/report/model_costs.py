"""TODO report/model_costs.py."""

from tq_lightning.records import Energy, InspectRecord
from tq_lightning.report.comparisons import Comparisons

ENERGIES = {
    "refetch_float_pj": "switch: refetch float, requantize",
    "refetch_planes_pj": "switch: refetch bit planes",
    "shift_pj": "switch: shift in place",
    "traffic_float_pj": "inference: float weights read",
    "traffic_pj": "inference: n-bit weights read",
}


def mib(value: float) -> float:
    """Bytes -> MiB."""
    return value / 2**20


def with_key(evidence: Comparisons, key: str) -> list[InspectRecord]:
    """Inspect records that hold `key`, smallest model first."""
    found = [record for record in evidence.inspects if getattr(record, key)]
    return sorted(found, key=lambda r: (r.parameters, r.model))


def with_energy(evidence: Comparisons) -> list[tuple[InspectRecord, Energy]]:
    """Inspect records with an energy model, smallest model first."""
    found = [(r, r.energy) for r in with_key(evidence, "energy")]
    return [(record, energy) for record, energy in found if energy and energy.by_width]


def model_names(records: list[InspectRecord]) -> list[str]:
    """Model names; where a model comes twice, what its policy skips tells the two apart."""
    names = [r.model for r in records]
    return [
        f"{r.model} (skip {r.skipped})" if names.count(r.model) > 1 else r.model for r in records
    ]


def ratio(record: InspectRecord, way: str) -> float:
    """Bytes of the float parameters, 4 each, over those of a way: what the paper's 3.53 is."""
    master = 4 * record.parameters if record.parameters else record.ways["float_master"].total
    return master / record.ways[way].total


def times(value: float) -> str:
    """A ratio in words."""
    return f"{value:.2f}× smaller" if value >= 1 else f"{1 / value:.2f}× larger"


def energy_name(kind: str) -> str:
    """A key of the record as words."""
    return ENERGIES.get(kind, kind.removesuffix("_pj").replace("_", " "))
