"""Packed file: one stored network that runs at any width up to the stored width."""

from tq_lightning.export.packed.reader import load_packed
from tq_lightning.export.packed.writer import save_packed

__all__ = ["load_packed", "save_packed"]
