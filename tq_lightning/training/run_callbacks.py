"""Callbacks, loggers and plugins of each verb, and the saved configuration."""

import sys
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback

from tq_lightning.callbacks.csv_logger import ResumableCSVLogger
from tq_lightning.callbacks.ema import MovingAverage
from tq_lightning.callbacks.metric_log import MetricLog
from tq_lightning.callbacks.prediction_writer import PredictionWriter
from tq_lightning.callbacks.progress import FitProgressBar, ProgressLines
from tq_lightning.callbacks.quantization_summary import QuantizationSummary
from tq_lightning.callbacks.resume import (
    RemoveLaterBest,
    StepCheckpoint,
    StepSeeds,
    UpdateCheckpointFolder,
)
from tq_lightning.callbacks.run_record import RunRecord
from tq_lightning.callbacks.stop_on_signal import CheckpointOnSignal, SignalFlag, StopOnSignal
from tq_lightning.callbacks.truncation_eval import TruncationEval
from tq_lightning.files import atomic_write
from tq_lightning.records import NAME, TASKS, read_record
from tq_lightning.training.checkpoint_io import AtomicCheckpointIO
from tq_lightning.training.cluster import cluster_environment
from tq_lightning.training.run_folder import CONFIG


class SaveConfig(SaveConfigCallback):
    """Write RUN/config.yaml when training starts, without `ckpt_path`, so that it starts new runs.

    A fit that trains nothing does not change the file.
    """

    def __init__(self, *args: Any, run_dir: Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_dir = run_dir

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Do nothing: training may not start."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write the file."""
        if trainer.is_global_zero:
            config = self.config.clone()
            config.pop("ckpt_path", None)
            text = self._changes() + self.parser.dump(config, skip_none=False)
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.run_dir / CONFIG) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _changes(self) -> str:
        """Return a comment on settings that changed at a resume; RunRecord has written them."""
        record = self.run_dir / NAME
        changes = read_record(record).changes if record.is_file() else None
        return f"# settings of the last resume; see changes in {NAME}\n" if changes else ""


def module_callbacks(hparams: Any) -> list[Callback]:
    """Create the callbacks that a TQModule adds to every Trainer.

    The moving average comes before the evaluation, which uses its weights.
    """
    callbacks: list[Callback] = [
        StepSeeds(),
        TruncationEval(hparams.calibration_batches),
        MetricLog(),
    ]
    if hparams.ema_decay is not None:
        callbacks.insert(0, MovingAverage(hparams.ema_decay))
    return callbacks


def fit_callbacks(
    run_dir: Path, config: Any, config_dump: dict[str, Any], stop_flag: SignalFlag
) -> list[Callback]:
    """Create the callbacks of a fit, in the order in which Lightning calls them.

    Args:
        run_dir: the run's folder.
        config: the parsed options of `fit`.
        config_dump: the resolved configuration, plain types.
        stop_flag: the signals of this process.
    """
    callbacks: list[Callback] = [
        RunRecord(run_dir, config_dump),
        QuantizationSummary(run_dir),
    ]
    if config["wandb"]:
        from tq_lightning.callbacks.wandb_logger import WandbRecord

        callbacks.append(WandbRecord(run_dir / NAME))
    if config["trainer"]["enable_checkpointing"] is False or config["trainer"]["fast_dev_run"]:
        return [*callbacks, StopOnSignal(stop_flag)]
    folder = run_dir / "checkpoints"
    # Lightning confuses an interval of 1 batch with 1.0, a full epoch
    every_batch = isinstance(config["trainer"]["val_check_interval"], int)
    metric = TASKS[config["model"].hparams.task]  # instantiated
    best = ModelCheckpoint(
        folder,
        filename="best-{epoch}",
        monitor=metric.monitor,
        mode=metric.mode,
        save_top_k=1,
        save_on_train_epoch_end=False if every_batch else None,
        auto_insert_metric_name=False,
        enable_version_counter=False,  # an epoch that is repeated after a kill overwrites its file
    )
    every = config["checkpoint_every_n_steps"]
    last = ModelCheckpoint(
        folder,
        filename="last",
        enable_version_counter=False,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
    )
    callbacks += [UpdateCheckpointFolder(), RemoveLaterBest(folder), best, last]
    if every > 0:
        callbacks.append(StepCheckpoint(folder, every))
    callbacks.append(CheckpointOnSignal(stop_flag, folder))
    return callbacks


def evaluation_callbacks(
    verb: str,
    run_dir: Path,
    config_dump: dict[str, Any],
    stop_flag: SignalFlag,
    checkpoint: str | None,
) -> list[Callback]:
    """Create the callbacks of validate, test and predict.

    Args:
        verb: the verb.
        run_dir: the run's folder.
        config_dump: the resolved configuration, plain types.
        stop_flag: the signals of this process.
        checkpoint: the checkpoint as it was given, for the record of a test; None for none.
    """
    callbacks: list[Callback] = [StopOnSignal(stop_flag)]
    if verb == "predict":
        callbacks.append(PredictionWriter(run_dir, config_dump))
    if verb == "test" and checkpoint is not None:
        callbacks.append(RunRecord(run_dir, config_dump, checkpoint))
    return callbacks


def make_loggers(
    run_dir: Path, config: Any, config_dump: dict[str, Any], resume_step: int | None
) -> list[Any]:
    """Create the loggers of a fit: metrics.csv, and TensorBoard or W&B if enabled.

    Args:
        run_dir: the run's folder.
        config: the parsed options of `fit`.
        config_dump: the resolved configuration, plain types.
        resume_step: optimizer step that the fit resumes from; its later rows are dropped.
    """
    from lightning.pytorch.loggers import TensorBoardLogger

    loggers: list[Any] = [ResumableCSVLogger(str(run_dir.parent), run_dir.name, resume_step)]
    if config["tensorboard"]:
        loggers.append(
            TensorBoardLogger(
                run_dir,
                name="",
                version="tensorboard",
                default_hp_metric=False,
                purge_step=resume_step,  # the steps from there on are logged again
            )
        )
    if config["wandb"]:
        from tq_lightning.callbacks.wandb_logger import make_wandb_logger

        loggers.append(make_wandb_logger(run_dir, config_dump))
    return loggers


def progress_callbacks(bar: bool, fits: bool) -> list[Callback]:
    """Return the progress callbacks: a bar in a terminal, else `ProgressLines` for a fit."""
    if bar and sys.stdout.isatty():
        return [FitProgressBar()]
    return [ProgressLines()] if fits else []


def make_plugins(given: Any) -> list[Any]:
    """Return the plugins of the Trainer: the given ones, atomic checkpoints, the cluster."""
    plugins, environment = listed(given), cluster_environment()
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpointIO())
    return plugins if environment is None else [*plugins, environment]


def listed(given: Any) -> list[Any]:
    """Return a Trainer option that may be one object, a list or None, as a list."""
    return list(given) if isinstance(given, list) else [given] if given else []
