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
FLOAT_PASSES = ("plain", "normalized")
_FIXED_RANGE = ("tanh", "tanh_channel", "absmax", "absmax_channel")


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
        float_pass: One of `FLOAT_PASSES`, the network at bits=None. "plain" has the float weights,
            and activations clipped as at the other widths. "normalized" is the limit of many bits,
            w^ = E (2u - 1), with activations that are not clipped above (Any-Precision DNNs).
        shared_norms: fnmatch patterns of norms that stay one for all widths.

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
    float_pass: str = "plain"
    shared_norms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, known in (
            ("quantizer", QUANTIZERS),
            ("level", LEVELS),
            ("normalizer", NORMALIZERS),
            ("norm", NORMS),
            ("float_pass", FLOAT_PASSES),
        ):
            value = getattr(self, key)
            if value not in known:
                raise ValueError(f"unknown {key} {value!r}; pass one of {', '.join(known)}")
        if self.activations is not None and self.activations not in ACTIVATIONS:
            raise ValueError(
                f"unknown activations {self.activations!r}; "
                f"pass null or one of {', '.join(ACTIVATIONS)}"
            )
        for key in ("skip", "shared_norms"):
            value = getattr(self, key)
            if isinstance(value, str):
                raise ValueError(f"{key} must be a list, got {value!r}; pass [{value!r}]")
            object.__setattr__(self, key, tuple(value))
        if self.float_pass == "normalized" and self.normalizer not in _FIXED_RANGE:
            raise ValueError(
                f"float_pass 'normalized' does not go with normalizer {self.normalizer!r}; "
                f"pass normalizer {', '.join(_FIXED_RANGE)}"
            )
        resolve_ste(self.ste, self.quantizer)
        object.__setattr__(self, "widths", check_widths(self.widths, self.max_bits))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "QuantConfig":
        """Pick the nine choices out of a mapping; other keys are ignored, missing ones default.

        Raises:
            ValueError: As in the constructor.
        """
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def to_dict(self) -> dict[str, Any]:
        """Return the choices as plain JSON types: the form that files and checkpoints hold."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        # choices that files of earlier versions do not have, at their defaults
        added = {"float_pass": "plain", "shared_norms": []}
        return {k: v for k, v in plain.items() if k not in added or v != added[k]}

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
