"""RunRecord: writes record.json, the one file that tables and figures are made from."""

import csv
import sys
import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tq_lightning.cost.size import record_bytes
from tq_lightning.errors import Interrupted, first_line
from tq_lightning.provenance import git_state, package_versions
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.codes import QUANTIZERS, truncate_codes
from tq_lightning.quant.config import QuantConfig
from tq_lightning.quant.weight import weight_quantizers
from tq_lightning.records import (
    MONITOR,
    NAME,
    Evaluation,
    Record,
    TestResult,
    WidthResult,
    read_record,
    write_record,
)


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
    for weight in weight_quantizers(model):
        q = weight.quantizer
        u, quantizer = q.normalize(weight.original).u, QUANTIZERS[q.quantizer]
        stored = quantizer.codes(u, q.width.max_bits)
        total += stored.numel()
        for bits in differ:
            shifted = truncate_codes(stored, q.width.max_bits, bits)
            differ[bits] += int((quantizer.codes(u, bits) != shifted).sum())
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
        self._record: Record | None = None
        self._start = 0.0

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero and self._record is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_record(self.path, self._record)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        earlier = read_record(self.path) if self.path.is_file() else None
        config = self.config
        if earlier is not None and "model" in earlier.config:
            # the model is the one of the start: its checkpoint adds what the data set had to say
            config = config | {"model": earlier.config["model"]}
        start = earlier or Record(
            id=uuid.uuid4().hex,
            status="running",
            config=config,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        quant = QuantConfig(**pl_module.model.tq)
        commit, dirty = git_state()
        device = trainer.strategy.root_device
        self._start = time.monotonic() - start.seconds
        # a resumed run keeps its earlier results until it has newer ones
        self._record = replace(
            start,
            status="running",
            reason=None,
            command=" ".join(["python -m tq_lightning", *sys.argv[1:]]),
            config=config,
            seed=config.get("seed_everything"),
            versions=package_versions(),
            commit=commit,
            dirty=dirty,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            processes=trainer.world_size,
            parameters_quantized=pl_module.report.share,
            ste=quant.resolved_ste,
            nested=quant.nested,
            bytes=None,
            test=None,
        )
        self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._record is not None and not trainer.sanity_checking:
            self._record = self._updated(self._record, trainer)
            self._save(trainer)

    def _updated(self, record: Record, trainer: L.Trainer) -> Record:
        curves = read_curves(self.path.parent / "metrics.csv")
        record = replace(
            record,
            seconds=round(time.monotonic() - self._start, 2),
            steps=trainer.global_step,
            curves=curves,
            epochs=len({epoch for points in curves.values() for epoch, _ in points}),
        )
        scored = curves.get(MONITOR, [])
        if not scored:
            return record
        best = int(max(scored, key=lambda point: point[1])[0])
        last = int(scored[-1][0])
        metrics = _at_epoch(curves, best)
        bits = sorted(
            int(key.rsplit("_w", 1)[1]) for key in metrics if key.startswith("val/acc1_truncate_w")
        )
        return replace(
            record,
            last=Evaluation(_at_epoch(curves, last), last),
            best=Evaluation(metrics, best, MONITOR),
            widths={
                b: WidthResult(
                    metrics[f"val/acc1_quantize_w{b}"],
                    metrics[f"val/acc1_truncate_w{b}"],
                    metrics[f"val/qt_gap_w{b}"],
                )
                for b in bits
            },
        )

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert self._record is not None
        record = self._updated(self._record, trainer)
        shares = code_disagreement(pl_module)
        widths = {
            bits: replace(result, disagree=round(shares[bits], 6))
            for bits, result in (record.widths or {}).items()
        }
        self._record = replace(
            record,
            widths=widths,
            bytes=record_bytes(pl_module.model),
            status="interrupted" if trainer.interrupted else "finished",
        )
        self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._record is None or self._record.status != "running":
            return
        stopped = isinstance(exception, KeyboardInterrupt | Interrupted)
        self._record = replace(
            self._record,
            status="interrupted" if stopped else "failed",
            reason=first_line(exception),
            seconds=round(time.monotonic() - self._start, 2),
        )
        self._save(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero or not self.path.is_file():
            return
        metrics = {
            k: round(float(v), 5)
            for k, v in trainer.callback_metrics.items()
            if k.startswith("test/")
        }
        images = int(metrics.pop("test/images"))
        test = TestResult(metrics, self.checkpoint, pl_module.loaded_epoch, images)
        write_record(self.path, replace(read_record(self.path), test=test))
