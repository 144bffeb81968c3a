"""InspectRecord: the output of `inspect --out`, size and energy of a model without running it."""

from dataclasses import dataclass, field
from typing import Any

from tq_lightning.records.json_tree import SCHEMA, Number, to_tree

# storage schemes that serve every width -> label
STORAGE_LABELS = {
    "float_master": "float master, one norm set",
    "file_per_width": "one file per width",
    "master8": "8-bit codes, one norm set",
    "packed": "packed file, all norm sets",
    "paper": "accounting of the paper",
}


@dataclass(frozen=True)
class Layer:
    """A row of the byte table.

    `bits` is None for a layer left in float. `bytes` is keyed by storage scheme.
    """

    name: str
    kind: str
    shape: list[int]
    parameters: int
    bits: int | None = None
    bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StorageBytes:
    """Bytes of one storage scheme, in total and by part."""

    total: Number
    weights: Number = 0
    scales: Number = 0
    float: Number = 0
    norms: Number = 0


@dataclass(frozen=True)
class Energy:
    """The energy model: pJ by width and kind, its constants, its assumptions and its source."""

    assumptions: list[str]
    constants_pj: dict[str, Number] = field(default_factory=dict)
    source: str | None = None
    by_width: dict[int, dict[str, Number]] = field(default_factory=dict)


@dataclass(frozen=True)
class Mechanism:
    """Levels over u in [0, 1] by width: rounded, rounded at 8 bits then shifted, and floored."""

    bits: list[int]
    u: list[Number]
    round: dict[int, list[Number]]
    round_shifted: dict[int, list[Number]]
    floor: dict[int, list[Number]]


@dataclass(frozen=True)
class InspectRecord:
    """Bytes and energy of a model under a quantization policy, computed without running it."""

    id: str
    model: str
    parameters: int
    model_args: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    command: str | None = None
    quantized_parameters: int | None = None
    layers: list[Layer] = field(default_factory=list)
    # storage scheme, a key of STORAGE_LABELS -> its bytes
    ways: dict[str, StorageBytes] = field(default_factory=dict)
    read_at: dict[int, Number] = field(default_factory=dict)  # width -> bytes read to run at it
    paper_ratio: Number | None = None
    policy_ratio: Number | None = None
    energy: Energy | None = None
    inference: dict[str, Energy] = field(default_factory=dict)  # accelerator -> of one image
    mechanism: Mechanism | None = None
    accounting: list[str] = field(default_factory=list)

    def tree(self) -> dict[str, Any]:
        """Return the record as JSON types."""
        tree = {"schema": SCHEMA, "kind": "inspect", **to_tree(self)}
        if not self.inference:  # a field that was added later is omitted if it is empty
            del tree["inference"]
        return tree

    @property
    def skipped(self) -> str:
        """Layers left in float, as text."""
        return ", ".join(map(str, self.policy.get("skip") or [])) or "nothing"
