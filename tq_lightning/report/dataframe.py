"""The data frame of a report: one row per run, source and width, with all accuracies."""

from pathlib import Path
from typing import Any

import pandas as pd

from tq_lightning.records import SOURCES
from tq_lightning.report.groups import MAIN_KEYS, Arm
from tq_lightning.report.labels import ACTIVATIONS_SOURCE
from tq_lightning.report.runs import Run

FACTS: tuple[str, ...] = ("model.name", "data.name", *MAIN_KEYS[2:], ACTIVATIONS_SOURCE)
FACTS += ("model.normalizer", "model.norm", "model.scale")


def _row(number: int, arm: Arm, run: Run, source: str, width: int) -> dict[str, Any]:
    """Return a row: accuracies in %, qt_gap in points, bytes_read in bytes, disagree as a share.

    A language model has perplexities in place of accuracies, such as `val_ppl`.
    """
    record, result = run.record, (run.record.widths or {})[width]
    key = run.metric.key
    return {
        "run": run.id,
        "arm": number,
        **{key.replace(".", "_"): _plain(arm[key]) for key in FACTS},
        "trained_widths": _plain(arm.trained),
        "seed": run.seed,
        "source": source,
        "width": width,
        "trained": width in arm.trained,
        f"val_{key}": run.score(source, width, "val"),
        f"val_{run.metric.gap_key}": result.qt_gap,
        f"val_{key}_float": run.score_float("val"),
        f"test_{key}": run.score(source, width, "test"),
        f"test_{key}_float": run.score_float("test"),
        "disagree": result.disagree,
        "bytes_read": record.bytes.planes.get(width) if record.bytes else None,
        **{key: getattr(record, key) for key in ("epochs", "steps")},
        "best_epoch": record.best.epoch if record.best else None,
        **{key: getattr(record, key) for key in ("seconds", "device", "commit", "dirty")},
        "version": record.versions.get("tq_lightning"),
        "record": run.path,
    }


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value or "none")


def write(arms: list[Arm], folder: Path) -> list[str]:
    """Write `runs.csv`, and `runs.parquet` if pyarrow is installed; return the names written."""
    if not arms:
        return []
    runs = [(number, arm, run) for number, arm in enumerate(arms) for run in arm.runs]
    frame = pd.DataFrame(_row(*run, s, w) for run in runs for s in SOURCES for w in run[2].widths)
    frame.to_csv(folder / "runs.csv", index=False, encoding="utf-8")
    try:
        content = frame.to_parquet(engine="pyarrow", index=False)
    except ImportError:
        return ["runs.csv"]
    (folder / "runs.parquet").write_bytes(content)
    return ["runs.csv", "runs.parquet"]
