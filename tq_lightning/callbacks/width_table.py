"""WidthTable: print the scores of an evaluation, one row per width."""

import sys
from typing import Any

import lightning as L

from tq_lightning.records import TASKS, metric_of


def print_widths(metrics: dict[str, float], stage: str, title: str, console: Any = None) -> None:
    """Print the scores by width: a table, or one line per validation without a terminal.

    Args:
        metrics: the metric keys of an evaluation.
        stage: "val" or "test".
        title: text above the table.
        console: rich console of a progress bar, to print above the bar; None for a new console.
    """
    metric = metric_of(metrics)
    name = f"{metric.name} {metric.unit}".strip()
    rows = []
    for bits in range(8, 0, -1):
        values = [
            metrics.get(f"{stage}/{key}_w{bits}")
            for key in (f"{metric.key}_quantize", f"{metric.key}_truncate", metric.gap_key)
        ]
        if None not in values:
            rows.append((bits, *(float(v) for v in values)))  # type: ignore[arg-type]
    if not rows:
        return
    if stage == "val" and not sys.stdout.isatty():
        cells = "  ".join(f"w{b} {q:.2f}/{t:.2f}" for b, q, t, _ in rows)
        in_float = f"float {metrics[f'{stage}/{metric.key}_float']:.2f}"
        print(f"{title}: {name} quantized/truncated  {cells}  {in_float}", flush=True)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    unit = metric.unit or metric.name
    for head in (
        "bits",
        f"quantized ({unit})",
        f"truncated ({unit})",
        f"QT gap ({metric.gap_unit})",
    ):
        table.add_column(head, justify="right")
    for b, q, t, gap in rows:
        style = "red" if gap >= (0.05 * q if metric.lower_is_better else 5) else None
        table.add_row(str(b), f"{q:.2f}", f"{t:.2f}", f"{gap:+.2f}", style=style)
    (console or Console()).print(table)


class WidthTable(L.Callback):
    """Call `print_widths` after each validation and test."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            title = f"epoch {trainer.current_epoch} (validation)"
            print_widths(trainer.callback_metrics, "val", title, _console(trainer))  # type: ignore[arg-type]

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            name = TASKS[pl_module.hparams.task].name
            title = f"{name} on the test split, trained with {pl_module.hparams.quantizer}"
            print_widths(trainer.callback_metrics, "test", title, _console(trainer))  # type: ignore[arg-type]


def _console(trainer: L.Trainer) -> Any:
    """Return the console of the progress bar, or None."""
    return getattr(trainer.progress_bar_callback, "_console", None)
