"""QuantConfig: the nine choices of `prepare`, typed and checked once."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tq_lightning.quant.activation import ACTIVATIONS
from tq_lightning.quant.codes import QUANTIZERS, check_bits
from tq_lightning.quant.levels import LEVELS
from tq_lightning.quant.normalizers import NORMALIZERS
from tq_lightning.quant.ste import resolve_ste

NORMS = ("per_width", "per_width_all", "shared")


@dataclass(frozen=True)
class QuantConfig:
    """How a model is quantized. Construction checks every value.

    Attributes:
        quantizer: Forward rule, a key of `codes.QUANTIZERS`.
        ste: Backward rule, a key of `ste.STES`; "auto" is the one paired with the quantizer.
        level: Placement of codes in [0, 1], a key of `levels.LEVELS`.
        normalizer: A key of `normalizers.NORMALIZERS`.
        widths: Widths that are trained; stored as a tuple, widest first.
        max_bits: Stored width, 1..8.
        activations: None, or a key of `activation.ACTIVATIONS`.
        skip: Layers that stay in float, see `layers.select_layers`.
        norm: One of `NORMS`: batch norms per width, layer, group and RMS norms too, or none.

    Raises:
        ValueError: A value that is unknown or out of range.
    """

    quantizer: str = "floor"
    ste: str = "auto"
    level: str = "endpoint"
    normalizer: str = "tanh"
    widths: tuple[int, ...] = (8, 4, 2, 1)
    max_bits: int = 8
    activations: str | None = None
    skip: tuple[str, ...] = ("first", "last")
    norm: str = "per_width"

    def __post_init__(self) -> None:
        for key, known in (
            ("quantizer", QUANTIZERS),
            ("level", LEVELS),
            ("normalizer", NORMALIZERS),
            ("norm", NORMS),
        ):
            value = getattr(self, key)
            if value not in known:
                raise ValueError(f"unknown {key} {value!r}; pass one of {', '.join(known)}")
        if self.activations is not None and self.activations not in ACTIVATIONS:
            raise ValueError(
                f"unknown activations {self.activations!r}; "
                f"pass null or one of {', '.join(ACTIVATIONS)}"
            )
        if isinstance(self.skip, str):
            raise ValueError(f"skip must be a list, got {self.skip!r}; pass [{self.skip!r}]")
        resolve_ste(self.ste, self.quantizer)
        object.__setattr__(self, "widths", check_widths(self.widths, self.max_bits))
        object.__setattr__(self, "skip", tuple(self.skip))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "QuantConfig":
        """Pick the nine choices out of a mapping; other keys are ignored, missing ones default.

        Raises:
            ValueError: As in the constructor.
        """
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def to_dict(self) -> dict[str, Any]:
        """Return the choices as plain JSON types: the form that files and checkpoints hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def resolved_ste(self) -> str:
        """The straight-through estimator of the weights: `ste` with "auto" resolved."""
        return resolve_ste(self.ste, self.quantizer)

    @property
    def nested(self) -> bool:
        """Whether the codes of the weights nest, see `codes.Quantizer`."""
        return QUANTIZERS[self.quantizer].nested


def check_widths(widths: Iterable[int], max_bits: int) -> tuple[int, ...]:
    """Check the trained widths and sort them widest first.

    Raises:
        ValueError: `max_bits` is not in 1..8, there are no widths, or one is out of range or given
            twice.
    """
    check_bits(max_bits, "max_bits")
    given = list(widths)
    if not given or any(type(b) is not int or not 1 <= b <= max_bits for b in given):
        raise ValueError(f"widths must be integers from 1 to max_bits={max_bits}, got {given!r}")
    if len(set(given)) < len(given):
        raise ValueError(f"widths must differ, got {given!r}")
    return tuple(sorted(given, reverse=True))
