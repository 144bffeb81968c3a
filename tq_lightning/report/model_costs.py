"""TODO report/model_costs.py."""

from typing import Any

from tq_lightning.report.comparisons import Comparisons

# Ways of serving widths 1..8, in the order of the bars.
WAYS = {
    "float_master": "float master",
    "file_per_width": "one file per width",
    "master8": "8-bit master (ours)",
    "packed": "packed file (ours)",
    "paper": "paper's accounting",
}


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


def with_key(evidence: Comparisons, key: str) -> list[dict[str, Any]]:
    """Inspect records that hold `key`, smallest model first."""
    return sorted(
        (r for r in evidence.inspects if r.get(key)),
        key=lambda r: (r.get("parameters") or 0, r["model"]),
    )


def model_names(records: list[dict[str, Any]]) -> list[str]:
    """Model names; where a model comes twice, what its policy skips tells the two apart."""
    names = [str(r["model"]) for r in records]
    skips = [
        ", ".join(map(str, (r.get("policy") or {}).get("skip") or [])) or "nothing" for r in records
    ]
    return [
        f"{n} (skip {s})" if names.count(n) > 1 else n for n, s in zip(names, skips, strict=True)
    ]


def ratio(record: dict[str, Any], way: str) -> float:
    """Bytes of the float parameters, 4 each, over those of a way: what the paper's 3.53 is."""
    master = (
        4 * record["parameters"]
        if record.get("parameters")
        else record["ways"]["float_master"]["total"]
    )
    return master / record["ways"][way]["total"]


def times(value: float) -> str:
    """A ratio in words."""
    return f"{value:.2f}× smaller" if value >= 1 else f"{1 / value:.2f}× larger"


def energy_name(kind: str) -> str:
    """A key of the record as words."""
    return ENERGIES.get(kind, kind.removesuffix("_pj").replace("_", " "))
