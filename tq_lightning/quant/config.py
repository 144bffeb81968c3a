"""QuantConfig: the choices of `prepare`, typed and checked once."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import torch

from tq_lightning.errors import did_you_mean
from tq_lightning.quant.activation import ACTIVATIONS
from tq_lightning.quant.codes import (
    LEVELS,
    QUANTIZERS,
    STORED_BITS,
    Quantizer,
    check_bits,
    truncate_codes,
)
from tq_lightning.quant.level_tables import LEVEL_TABLES
from tq_lightning.quant.normalizers import NORMALIZERS, SCALES
from tq_lightning.quant.ste import STES, resolve_ste

NORMS = ("per_width", "per_width_all", "shared")
FLOAT_PASSES = ("plain", "normalized")
# choices added after version 0.1.0; files omit them if they have these defaults
ADDED_CHOICES: dict[str, Any] = {
    "float_pass": "plain",
    "shared_norms": [],
    "scale": "mean",
    "quantize_embeddings": False,
}


@dataclass(frozen=True)
class QuantConfig:
    """Quantization choices of a model. Construction checks every value.

    Attributes:
        quantizer: forward rule, a key of `codes.QUANTIZERS`.
        ste: backward rule, a key of `ste.STES`; "auto" is the one paired with the quantizer,
            or with the normalizer if its row names one.
        level: placement of codes in [0, 1], a key of `codes.LEVELS` or
            `level_tables.LEVEL_TABLES`.
        normalizer: a key of `normalizers.NORMALIZERS`.
        widths: widths that are trained; stored as a tuple, widest first.
        max_bits: stored width, 1..8.
        activations: None, or a key of `activation.ACTIVATIONS`.
        skip: layers that stay in float, see `layers.select_layers`.
        norm: one of `NORMS`: "per_width" (batch norms), "per_width_all" (layer, group and RMS
            norms too) or "shared".
        float_pass: one of `FLOAT_PASSES`, the network at bits=None. "plain" has the float weights,
            and activations clipped as at the other widths. "normalized" is the limit of many bits,
            w^ = E (2u - 1), with activations that are not clipped above (Any-Precision DNNs).
        shared_norms: fnmatch patterns of norms that all widths share.
        scale: weight at level 1, one of `normalizers.SCALES`: "mean" is mean|w| (the paper), "span"
            is the weight that the normalizer maps to u = 1, so that weights keep their values.
        quantize_embeddings: quantize embedding tables too; a channel is then a row of the table.

    Raises:
        ValueError: a value is unknown or out of range, or a combination is not supported.
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
    scale: str = "mean"
    quantize_embeddings: bool = False

    def __post_init__(self) -> None:
        for key, known in (
            ("quantizer", QUANTIZERS),
            ("level", {**LEVELS, **LEVEL_TABLES}),
            ("normalizer", NORMALIZERS),
            ("norm", NORMS),
            ("float_pass", FLOAT_PASSES),
            ("scale", SCALES),
        ):
            value = getattr(self, key)
            if not isinstance(value, str) or value not in known:
                hint = did_you_mean(value, known)
                raise ValueError(f"unknown {key} {value!r}; pass one of {', '.join(known)}{hint}")
        if not isinstance(self.quantize_embeddings, bool):
            raise ValueError(
                f"quantize_embeddings must be true or false, got {self.quantize_embeddings!r}"
            )
        named = self.activations is None or isinstance(self.activations, str)
        if not named or self.activations not in (None, *ACTIVATIONS):
            raise ValueError(
                f"unknown activations {self.activations!r}; "
                f"pass null or one of {', '.join(ACTIVATIONS)}"
            )
        for key in ("skip", "shared_norms"):
            value = getattr(self, key)
            if isinstance(value, str):
                raise ValueError(f"{key} must be a list, got {value!r}; pass [{value!r}]")
            if not isinstance(value, Iterable) or not all(isinstance(v, str) for v in value):
                raise ValueError(
                    f"{key} must be a list of layer names, got {value!r}; pass e.g. []"
                )
            object.__setattr__(self, key, tuple(value))
        fixed = [name for name, row in NORMALIZERS.items() if row.reference == "max"]
        if self.float_pass == "normalized" and self.normalizer not in fixed:
            raise ValueError(
                f"float_pass 'normalized' is not supported with normalizer {self.normalizer!r}; "
                f"pass normalizer {', '.join(fixed)}"
            )
        resolve_ste(self.ste, self.quantizer)
        check_nested(self.quantizer)
        self._check_pairing()
        object.__setattr__(self, "widths", check_widths(self.widths, self.max_bits))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "QuantConfig":
        """Create a configuration from a mapping; ignore other keys, use defaults for missing ones.

        Raises:
            ValueError: as in the constructor.
        """
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def to_dict(self) -> dict[str, Any]:
        """Return the choices as plain JSON types, as files and checkpoints store them."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in plain.items() if k not in ADDED_CHOICES or v != ADDED_CHOICES[k]}

    @property
    def resolved_ste(self) -> str:
        """The straight-through estimator of the weights: `ste` with "auto" resolved."""
        paired = NORMALIZERS[self.normalizer].ste
        if self.ste == "auto" and paired is not None:
            return paired
        return resolve_ste(self.ste, self.quantizer)

    def _check_pairing(self) -> None:
        """Check that the combination of normalizer, level, scale, quantizer and STE is supported.

        Raises:
            ValueError: a combination is not supported; the message names the supported values.
        """
        row, ste = NORMALIZERS[self.normalizer], self.resolved_ste
        for key, value, known in (
            ("level", self.level, LEVELS if row.levels is None else row.levels),
            ("scale", self.scale, row.scales),
        ):
            if value not in known:
                raise ValueError(
                    f"{key} {value!r} is not supported with normalizer {self.normalizer!r}; "
                    f"pass {key} {' or '.join(known)}"
                )
        if self.level in LEVEL_TABLES and not self.nested:
            nested = [name for name, other in QUANTIZERS.items() if other.nested]
            raise ValueError(
                f"level {self.level!r} is not supported with quantizer {self.quantizer!r}, "
                f"which has other bins; pass quantizer {' or '.join(nested)}"
            )
        if row.reference == "rms" and STES[ste].uniform:
            raise ValueError(
                f"ste {ste!r} is not supported with normalizer {self.normalizer!r}, which is not "
                "uniform; pass ste auto"
            )

    @property
    def nested(self) -> bool:
        """True if the codes of the weights nest, see `codes.Quantizer`."""
        return QUANTIZERS[self.quantizer].nested


@cache
def _counter_example(row: Quantizer) -> tuple[float, int, int, int] | None:
    """Find u, a width, its code, and the other code that a shift gives; None if codes nest."""
    edges = torch.arange(513) / 512
    random = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    u = torch.cat([edges, edges.nextafter(edges - 1), edges.nextafter(edges + 1), random])
    u = u.clamp(0.0, 1.0)
    stored = row.codes(u, STORED_BITS)
    for bits in range(1, STORED_BITS):
        codes, shifted = row.codes(u, bits), truncate_codes(stored, STORED_BITS, bits)
        wrong = (codes != shifted).nonzero()
        if len(wrong):
            i = int(wrong[0])
            return float(u[i]), bits, int(codes[i]), int(shifted[i])
    return None


def check_nested(quantizer: str) -> None:
    """Check that the codes of a row of `QUANTIZERS` that declares nested codes nest.

    Raises:
        ValueError: the codes do not nest; the message gives a counter-example.
    """
    row = QUANTIZERS[quantizer]
    found = _counter_example(row) if row.nested else None
    if found is not None:
        u, bits, code, shifted = found
        raise ValueError(
            f"quantizer {quantizer!r} declares nested codes, but at u = {u:.6g} its {bits}-bit "
            f"code is {code} and its {STORED_BITS}-bit code shifted right is {shifted}; "
            "pass nested=False in its row"
        )


def check_widths(widths: Iterable[int], max_bits: int) -> tuple[int, ...]:
    """Check the trained widths and sort them widest first.

    Raises:
        ValueError: `max_bits` is not in 1..8, there are no widths, or one is out of range or given
            twice.
    """
    check_bits(max_bits, "max_bits")
    if isinstance(widths, str) or not isinstance(widths, Iterable):
        raise ValueError(f"widths must be a list of integers, got {widths!r}; pass e.g. [8, 4]")
    given = list(widths)
    if not given or any(type(b) is not int or not 1 <= b <= max_bits for b in given):
        raise ValueError(f"widths must be integers from 1 to max_bits={max_bits}, got {given!r}")
    if len(set(given)) < len(given):
        raise ValueError(f"widths must differ, got {given!r}")
    return tuple(sorted(given, reverse=True))
