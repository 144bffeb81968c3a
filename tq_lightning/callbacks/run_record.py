"""RunRecord: writes record.json, the one file that tables and figures are made from."""

import csv
import json
import sys
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tq_lightning.cost.size import record_bytes
from tq_lightning.errors import first_line
from tq_lightning.provenance import git_state, package_versions
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.codes import QUANTIZERS, truncate_codes
from tq_lightning.quant.weight import original, weight_quantizers
from tq_lightning.records import MONITOR, NAME, SCHEMA, write_json


def read_curves(metrics_file: Path) -> dict[str, list[list[float]]]:
    """{metric: [[epoch, value], ...]} of a run's metrics.csv, one value an epoch."""
    curves: dict[str, dict[int, float]] = {}
    if not metrics_file.is_file():
        return {}
    with metrics_file.open(newline="") as file:
        for row in csv.DictReader(file):
            if not row.get("epoch"):
                continue
            for key, value in row.items():
                if value and key not in ("epoch", "step"):
                    curves.setdefault(key, {})[int(float(row["epoch"]))] = round(float(value), 5)
    return {
        key: [[e, v] for e, v in sorted(points.items())] for key, points in sorted(curves.items())
    }


@torch.no_grad()
def code_disagreement(model: torch.nn.Module) -> dict[int, float]:
    """{width: share of the weight codes that differ between quantize and truncate}, over all quantized weights."""
    differ = dict.fromkeys(range(1, width_of(model).max_bits + 1), 0)
    total = 0
    for _, module, tensor_name, q in weight_quantizers(model):
        u, _ = q.normalise(original(module, tensor_name))
        stored = QUANTIZERS[q.quantizer](u, q.width.max_bits)
        total += stored.numel()
        for bits in differ:
            shifted = truncate_codes(stored, q.width.max_bits, bits)
            differ[bits] += int((QUANTIZERS[q.quantizer](u, bits) != shifted).sum())
    return {bits: count / total for bits, count in differ.items()}


def _at_epoch(curves: dict[str, list[list[float]]], epoch: int) -> dict[str, float]:
    return {key: value for key, points in curves.items() for e, value in points if e == epoch}


class RunRecord(L.Callback):
    """Keeps `run_dir`/record.json: "running" at the start of a fit, then finished, failed or interrupted with its reason.

    A test adds its block to the record of the run it tests.

    Args:
        run_dir: the run's directory.
        config: the resolved configuration, plain types.
        checkpoint: what a test reads ("best", "last" or a path), for its block.
    """

    def __init__(
        self, run_dir: str | Path, config: dict[str, Any], checkpoint: str | None = None
    ) -> None:
        self.path = Path(run_dir) / NAME
        self.config, self.checkpoint = config, checkpoint
        self._record: dict[str, Any] = {}
        self._start = 0.0

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self._record)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        earlier = json.loads(self.path.read_text()) if self.path.is_file() else {}
        # the model is the one of the start: its checkpoint adds what the data set had to say
        config = self.config | {
            key: value for key, value in earlier.get("config", {}).items() if key == "model"
        }
        commit, dirty = git_state()
        self._start = time.monotonic() - earlier.get("seconds", 0.0)
        device = trainer.strategy.root_device
        self._record = {
            "schema": SCHEMA,
            "id": earlier.get("id", uuid.uuid4().hex),
            "status": "running",
            "reason": None,
            "command": " ".join(["python -m tq_lightning", *sys.argv[1:]]),
            "config": config,
            "seed": config.get("seed_everything"),
            "versions": package_versions(),
            "commit": commit,
            "dirty": dirty,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": trainer.world_size,
            "started": earlier.get("started", datetime.now(UTC).isoformat(timespec="seconds")),
            "seconds": earlier.get("seconds", 0.0),
            "parameters_quantized": pl_module.report.share,
            # a run that goes on keeps what it had found until it finds more
            **{
                key: earlier[key]
                for key in ("steps", "epochs", "curves", "last", "best", "widths")
                if key in earlier
            },
        }
        self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._record and not trainer.sanity_checking:
            self._update(trainer)
            self._save(trainer)

    def _update(self, trainer: L.Trainer) -> None:
        record = self._record
        record["seconds"] = round(time.monotonic() - self._start, 2)
        record["steps"] = trainer.global_step
        curves = read_curves(self.path.parent / "metrics.csv")
        record["curves"] = curves
        scored = curves.get(MONITOR, [])
        record["epochs"] = len({epoch for points in curves.values() for epoch, _ in points})
        if not scored:
            return
        best = int(max(scored, key=lambda point: point[1])[0])
        last = int(scored[-1][0])
        record["last"] = {"epoch": last, "metrics": _at_epoch(curves, last)}
        record["best"] = {"epoch": best, "monitor": MONITOR, "metrics": _at_epoch(curves, best)}
        metrics = record["best"]["metrics"]
        bits = sorted(
            int(key.rsplit("_w", 1)[1]) for key in metrics if key.startswith("val/acc1_truncate_w")
        )
        record["widths"] = {
            str(b): {
                "quantize": metrics[f"val/acc1_quantize_w{b}"],
                "truncate": metrics[f"val/acc1_truncate_w{b}"],
                "qt_gap": metrics[f"val/qt_gap_w{b}"],
            }
            for b in bits
        }

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._update(trainer)
        for bits, share in code_disagreement(pl_module).items():
            self._record.setdefault("widths", {}).setdefault(str(bits), {})["disagree"] = round(
                share, 6
            )
        self._record["bytes"] = record_bytes(pl_module.model)
        interrupted = bool(trainer.interrupted)
        self._record["status"] = "interrupted" if interrupted else "finished"
        self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if not self._record or self._record["status"] != "running":
            return
        stopped = isinstance(exception, KeyboardInterrupt)
        self._record["status"] = "interrupted" if stopped else "failed"
        self._record["reason"] = first_line(exception)
        self._record["seconds"] = round(time.monotonic() - self._start, 2)
        self._save(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or not self.path.is_file():
            return
        metrics = {
            k: round(float(v), 5)
            for k, v in trainer.callback_metrics.items()
            if k.startswith("test/")
        }
        record = json.loads(self.path.read_text())
        record["test"] = {
            "checkpoint": self.checkpoint,
            "epoch": pl_module.loaded_epoch,
            "images": int(metrics.pop("test/images")),
            "metrics": metrics,
        }
        write_json(self.path, record)
