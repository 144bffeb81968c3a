"""TruncQuant on PyTorch Lightning: one stored network, run at 8, 4, 2 or 1 bits by a right shift.

The public names need only PyTorch, so a plain training loop can use them without Lightning::

    model = timm.create_model("resnet18", num_classes=10)
    prepare(model, quantizer="floor", widths=(8, 4, 2, 1))
    with bit_width(model, 4):
        loss = cross_entropy(model(images), labels)

`python -m tq_lightning --help` lists the verbs of the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tq_lightning.provenance import __version__

if TYPE_CHECKING:
    from tq_lightning.export.packed import load_packed, save_packed
    from tq_lightning.quant.activation_ranges import calibrate_activations
    from tq_lightning.quant.bit_width import bit_width
    from tq_lightning.quant.codes import codes_to_levels, floor_codes, round_codes, truncate_codes
    from tq_lightning.quant.norm_calibration import calibrate_norms
    from tq_lightning.quant.prepare import prepare

__all__ = [
    "__version__",
    "bit_width",
    "calibrate_activations",
    "calibrate_norms",
    "codes_to_levels",
    "floor_codes",
    "load_packed",
    "prepare",
    "round_codes",
    "save_packed",
    "truncate_codes",
]

_HOMES = {
    "prepare": "quant.prepare",
    "bit_width": "quant.bit_width",
    "calibrate_norms": "quant.norm_calibration",
    "calibrate_activations": "quant.activation_ranges",
    "floor_codes": "quant.codes",
    "round_codes": "quant.codes",
    "truncate_codes": "quant.codes",
    "codes_to_levels": "quant.codes",
    "save_packed": "export.packed",
    "load_packed": "export.packed",
}


def __getattr__(name: str) -> Any:
    # Resolved on first use, so that `python -m tq_lightning --help` does not load torch.
    if name not in _HOMES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(_HOMES)}"
        )
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
