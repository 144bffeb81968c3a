"""The packed file: one stored network that a device truncates for itself."""

from tq_lightning.export.packed.reader import load_packed
from tq_lightning.export.packed.writer import save_packed

__all__ = ["load_packed", "save_packed"]
