"""tq_lightning: TruncQuant on PyTorch Lightning. One stored network that runs at 8, 4, 2 or 1 bits by a right shift."""

from importlib import import_module
from typing import Any

from tq_lightning.provenance import __version__

_HOMES = {
    "prepare": "quant.prepare",
    "bit_width": "quant.bit_width",
    "calibrate_norms": "quant.switchable_norm",
    "floor_codes": "quant.codes",
    "round_codes": "quant.codes",
    "truncate_codes": "quant.codes",
    "codes_to_levels": "quant.codes",
    "save_packed": "export.packed",
    "load_packed": "export.packed",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    # resolved on first use, so that `python -m tq_lightning --help` need not load torch
    if name not in _HOMES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(_HOMES)}"
        )
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
