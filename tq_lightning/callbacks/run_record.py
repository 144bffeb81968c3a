"""RunRecord: write record.json, the source of tables and figures."""

import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tq_lightning.callbacks.ema import MovingAverage
from tq_lightning.callbacks.metric_log import MetricLog
from tq_lightning.callbacks.own_data import (
    describe,
    other_settings,
    part_of_split,
    precision_name,
)
from tq_lightning.callbacks.setting_changes import calibration_of, changes_at
from tq_lightning.cost.size import record_bytes
from tq_lightning.errors import Interrupted, UserError, first_line
from tq_lightning.provenance import git_state, package_versions
from tq_lightning.quant.config import QuantConfig
from tq_lightning.quant.disagreement import code_disagreement
from tq_lightning.records import (
    NAME,
    Evaluation,
    Points,
    Record,
    TestResult,
    metric_of,
    read_record,
    record_at,
    width_results,
    write_record,
)

Curves = dict[str, dict[int, float]]  # {metric: {epoch: value}}


class RunRecord(L.Callback):
    """Write the record.json of a run.

    Only training and tests change the record. Its status is "running" once training starts, then
    "finished", "failed" or "interrupted" with a reason. Its metrics come from `MetricLog` and
    from the validations. It is written before each checkpoint, so it is never older than one. A
    resume with other settings adds them to `changes`. A test adds its block.

    Args:
        run_dir: the run's folder.
        config: the resolved configuration, plain types.
        checkpoint: checkpoint that a test evaluates ("best", "last" or a path), for its block.
    """

    def __init__(
        self, run_dir: str | Path, config: dict[str, Any], checkpoint: str | None = None
    ) -> None:
        self.path = Path(run_dir) / NAME
        self.config, self.checkpoint = config, checkpoint
        self._record: Record | None = None
        self._earlier: Record | None = None
        self._curves: Curves = {}
        self._trained: int | None = None  # epoch whose training metrics the record has
        self._start = 0.0

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Read the record of a run that resumes or is tested, before anything is written.

        Raises:
            UserError: the record is damaged.
        """
        if self.path.is_file():
            self._earlier = read_record(self.path)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        earlier, config = self._earlier, self.config
        if earlier is None:
            started = datetime.now(UTC).isoformat(timespec="seconds")
            record = Record(uuid.uuid4().hex, "running", config, started=started)
        else:
            record = record_at(earlier, trainer.current_epoch, trainer.global_step)
            # the model section of the earlier record has values that came from the data set
            config = config | {"model": earlier.config.get("model", config.get("model"))}
        self._resume(record)
        quant = QuantConfig(**pl_module.model.tq)
        commit, dirty = git_state()
        device = trainer.strategy.root_device
        self._record = replace(
            record,
            status="running",
            reason=None,
            # not program_name(): records have one form, however the run was started
            command=" ".join(["python -m tq_lightning", *sys.argv[1:]]),
            config=config,
            seed=config.get("seed_everything"),
            ste=quant.resolved_ste,
            nested=quant.nested,
            calibration=calibration_of(record, pl_module),
            versions=package_versions(),
            commit=commit,
            dirty=dirty,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            processes=trainer.world_size,
            parameters_quantized=pl_module.report.share,
            parameters_embedding=pl_module.report.embedding_share or None,
        )
        if earlier is not None:
            changes = changes_at(earlier, self._record, trainer.current_epoch, trainer.global_step)
            self._record = replace(self._record, changes=changes)
            new = [c.key for c in changes or [] if c.step == trainer.global_step]
            if new and trainer.is_global_zero:
                print(f"changed since the last step: {', '.join(new)} (see changes in {self.path})")
        self._save(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._take_training_metrics(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        if self._take_training_metrics(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._record is None or trainer.sanity_checking:
            return
        metrics = _rounded(trainer.callback_metrics, "val/")
        self._add(trainer.current_epoch, metrics)
        metric = metric_of(metrics)
        key = metric.monitor
        now = Evaluation(metrics, trainer.current_epoch, key, trainer.global_step)
        best = self._record.best
        # the same rule as for the best checkpoint: the first one of equal scores
        if best is None or metric.is_better(metrics[key], best.metrics[key]):
            best = now
        last = replace(now, monitor=None)
        self._record = replace(self._record, best=best, last=last, widths=width_results(best))
        self._take_training_metrics(trainer)
        self._save(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._record is None:
            self._take_over(trainer, pl_module)
        assert self._record is not None
        self._take_training_metrics(trainer)
        status, reason = "interrupted" if trainer.interrupted else "finished", None
        if self._record.best is None:
            status, reason = "failed", "the run ended without a validation"
        shares = code_disagreement(pl_module) if trainer.is_global_zero else {}
        self._record = replace(
            self._record,
            widths={
                bits: replace(result, disagree=round(shares[bits], 6))
                for bits, result in (self._record.widths or {}).items()
                if bits in shares
            },
            bytes=record_bytes(pl_module.model),
            status=status,
            reason=reason,
        )
        self._save(trainer)

    def _take_over(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Complete the record of a run that was killed after its last step.

        Raises:
            UserError: the record is finished, or of another step than the checkpoint.
        """
        earlier = self._earlier
        if earlier is None or earlier.status == "finished" or earlier.steps != trainer.global_step:
            raise UserError(
                f"nothing to train: the run is at epoch {trainer.current_epoch}, step "
                f"{trainer.global_step}; pass a larger trainer.max_epochs, max_steps or max_time"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, MovingAverage):  # the weights at the end of a fit
                callback.on_train_end(trainer, pl_module)
        self._record = earlier
        self._resume(earlier)

    def _resume(self, record: Record) -> None:
        """Take over the curves and the training time of a record."""
        self._curves = {key: dict(points) for key, points in (record.curves or {}).items()}
        self._start = time.monotonic() - record.seconds

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._record is None or self._record.status != "running":
            return
        stopped = isinstance(exception, KeyboardInterrupt | Interrupted)
        self._record = replace(
            self._record,
            status="interrupted" if stopped else "failed",
            reason=first_line(exception),
        )
        with suppress(UserError):  # a full disk may be the exception
            self._save(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        record = self._earlier
        if not trainer.is_global_zero or record is None:
            return
        metrics = _rounded(trainer.callback_metrics, "test/")
        data = trainer.datamodule  # type: ignore[attr-defined]
        given = self.config.get("data") or {}
        part = part_of_split(trainer.num_test_batches, trainer.test_dataloaders)
        other = other_settings(record.config, self.config, part)
        tested = (self.config.get("trainer") or {}).get("precision")
        result = TestResult(
            metrics,
            self.checkpoint,
            pl_module.loaded_epoch,
            images=_count(metrics.pop("test/images", None)),
            tokens=_count(metrics.pop("test/tokens", None)),
            data={key: given.get(key) for key in ("name", "root")},
            split=data.split_of("test") if hasattr(data, "split_of") else "test",
            batches=part,
            other_precision=precision_name(tested) if "precision" in other else None,
        )
        if not other:
            record = replace(record, test=result)
        else:
            print(f"not a test of {describe(other)}: added to tests in {self.path}")
            record = replace(record, tests=[*(record.tests or []), result])
        self._earlier = record
        write_record(self.path, record)

    def _take_training_metrics(self, trainer: L.Trainer) -> bool:
        """Add the training metrics of the last epoch; return False if the record has them."""
        log = next((c for c in trainer.callbacks if isinstance(c, MetricLog)), None)  # type: ignore[attr-defined]
        if self._record is None or log is None or log.epoch in (None, self._trained):
            return False
        self._trained = log.epoch
        metrics = _rounded(log.train_metrics, "train/")
        self._add(log.epoch, metrics)
        for name in ("best", "last"):
            block = getattr(self._record, name)
            if block is not None and block.epoch == log.epoch:
                both = {**block.metrics, **metrics}
                self._record = replace(self._record, **{name: replace(block, metrics=both)})
        return True

    def _add(self, epoch: int, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self._curves.setdefault(key, {})[epoch] = value

    def _save(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero or self._record is None:
            return
        curves = {
            key: Points([[epoch, value] for epoch, value in sorted(points.items())])
            for key, points in sorted(self._curves.items())
        }
        self._record = replace(
            self._record,
            seconds=round(time.monotonic() - self._start, 2),
            steps=trainer.global_step,
            epochs=len({epoch for points in self._curves.values() for epoch in points}),
            curves=curves,
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_record(self.path, self._record)


def _rounded(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {k: round(float(v), 5) for k, v in metrics.items() if k.startswith(prefix)}


def _count(value: float | None) -> int | None:
    return None if value is None else int(value)
