"""QuantizationSummary: print a summary of the quantized layers and write the list of layers."""

from pathlib import Path
from typing import Any

import lightning as L

from tq_lightning.files import atomic_write

LAYERS = "layers.txt"


def summary(report: Any, widths: tuple[int, ...], path: Path) -> str:
    """Return a one-line summary of the quantized layers.

    Args:
        report: the PrepareReport of the model.
        widths: trained widths.
        path: file with the list of layers.
    """
    weights = {name: rule for name, rule in report.items() if rule.startswith("weight ")}
    in_float = [name for name, rule in weights.items() if ": float" in rule]
    names = ", ".join(in_float[:3]) + (", ..." if len(in_float) > 3 else "")
    return (
        f"quantized: {len(weights) - len(in_float)} of {len(weights)} layers "
        f"({100 * report.share:.1f} % of all parameters), trained at "
        f"{'/'.join(map(str, widths))} bits; in float: {names or 'none'}; see {path}"
    )


class QuantizationSummary(L.Callback):
    """Print `summary` and write RUN/layers.txt when a fit has loaded its model."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LAYERS

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Print the line and write the file."""
        if trainer.is_global_zero:
            print(summary(pl_module.report, pl_module.widths, self.path), flush=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as temporary:
                temporary.write_text(f"{pl_module.report}\n", encoding="utf-8")
