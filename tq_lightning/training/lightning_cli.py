"""fit, validate, test and predict: a LightningCLI with flat keys of our own, and a run directory that nothing overwrites."""

import logging
import os
import re
import shutil
import sys
import time
import uuid
import warnings
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionYesNo, ArgumentError, set_loader
from jsonargparse.loaders_dumpers import yaml_load
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tq_lightning.callbacks.csv_logger import RunLogger
from tq_lightning.callbacks.prediction_writer import PredictionWriter
from tq_lightning.callbacks.resume import MovedRun, StepCheckpoint
from tq_lightning.callbacks.run_record import RunRecord
from tq_lightning.callbacks.width_table import WidthTable
from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.errors import UserError
from tq_lightning.records import MONITOR, NAME
from tq_lightning.training.checkpoint import (
    checkpoint_step,
    newest_checkpoint,
    overridden_arguments,
)
from tq_lightning.training.cli_messages import _KINDS, one_line
from tq_lightning.training.module import TQModule

ROOT = "runs"  # trainer.default_root_dir where none is given
_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def _plain(value: Any) -> Any:
    """What sweep engines send as text becomes what was meant: None and null, and numbers such as 1e-3."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, str):
        if value in ("None", "null"):
            return None
        if _SCIENTIFIC.fullmatch(value):
            return float(value)
    return value


set_loader("tq", lambda text: _plain(yaml_load(text)), exceptions=(yaml.YAMLError,))


def _root(config: Any) -> Path:
    """Where the runs of a configuration lie; trainer.default_root_dir=null says nothing of it."""
    return Path(config.trainer.default_root_dir or ROOT)


def _check_root(root: Path) -> None:
    """Raises UserError where no run can be written below `root`. Nothing is made: bad input leaves no trace."""
    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"trainer.default_root_dir={root}: cannot write in {there}; pass a folder for the runs"
        )


class TQCLI(LightningCLI):
    """LightningCLI over TQModule and TQDataModule.

    `run_dir` is the directory of this run: a new one under trainer.default_root_dir, or that of the checkpoint it goes on
    from.
    """

    run_dir: Path
    resumed: Path | None = None
    resume_step: int | None = None
    given_checkpoint: str | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--checkpoint_every_n_steps",
            type=int,
            default=0,
            help="write checkpoints/last.ckpt every N optimizer steps as well as at every validation (0: only then)",
        )
        for flag, what in (
            ("wandb", "Weights & Biases (WANDB_MODE=offline works)"),
            ("tensorboard", "TensorBoard"),
        ):
            parser.add_argument(
                f"--{flag}", action=ActionYesNo, nargs="?", default=False, help=f"log to {what} too"
            )

    def _parse_ckpt_path(self) -> None:
        config = self.config[self.config.subcommand]
        given = config.get("ckpt_path")
        if given is not None:
            root = _root(config)
            path = newest_checkpoint(root, given) if given in ("last", "best") else Path(given)
            if not path.is_file():
                raise UserError(
                    f"ckpt_path: {path} does not exist; pass a file, or last or best for the newest run under {root}"
                )
            self.resume_step = checkpoint_step(path)
            self.given_checkpoint = str(given)
            config.ckpt_path = str(path)
            self.resumed = path
        asked = config.model.as_dict()
        super()._parse_ckpt_path()  # the checkpoint's model arguments replace those given
        kept = overridden_arguments(asked, self.config[self.config.subcommand].model.as_dict())
        if kept:
            print(
                f"the model stays as its checkpoint was trained: {'; '.join(kept)}",
                file=sys.stderr,
                flush=True,
            )

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        root = _root(config)
        if self.resumed is not None:
            self.run_dir = self.resumed.parent.parent
        else:
            _check_root(root)
            self.run_dir = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        self._dump_config()

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (TypeError, ValueError, MisconfigurationException) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(one_line(error)) from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in ("validate", "test"):
            kwargs["verbose"] = False  # the width table says it shorter than a line a metric
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except UserError:
            # bad input that shows late leaves no trace of a run that never was; what has trained is kept
            if self.resumed is None and not any(self.run_dir.glob("checkpoints/*")):
                shutil.rmtree(self.run_dir, ignore_errors=True)
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        config = self.config_init[self.subcommand]
        trainer = config["trainer"]
        plain: list[Callback] = [WidthTable()]
        for key in ("enable_progress_bar", "enable_model_summary"):
            if trainer[key] is None:
                kwargs[key] = sys.stdout.isatty()
        if (
            kwargs.get("enable_progress_bar", trainer["enable_progress_bar"])
            and sys.stdout.isatty()
        ):
            plain.append(RichProgressBar())
        if self.subcommand == "fit":
            plain += self._fit_callbacks(config)
            if trainer["logger"] in (None, True):
                kwargs["logger"] = self._loggers(config)
        else:
            self.save_config_callback = None
            kwargs["logger"] = False
            if (
                self.resumed is None and self.subcommand != "validate"
            ):  # that may score float weights as they are
                raise UserError(
                    f"{self.subcommand} needs a checkpoint: pass --ckpt_path best, last, or a file"
                )
            if self.subcommand == "predict":
                plain.append(PredictionWriter(self.run_dir))
            if self.subcommand == "test":
                plain.append(RunRecord(self.run_dir, self.config_dump, self.given_checkpoint))
        given = trainer["callbacks"]
        kwargs["callbacks"] = [
            *(given if isinstance(given, list) else [given] if given else []),
            *plain,
        ]
        return super().instantiate_trainer(**kwargs)

    def _fit_callbacks(self, config: Any) -> list[Callback]:
        callbacks: list[Callback] = [RunRecord(self.run_dir, self.config_dump)]
        if config["wandb"]:
            from tq_lightning.callbacks.wandb_logger import WandbRecord

            callbacks.append(WandbRecord(self.run_dir / NAME))
        if config["trainer"]["enable_checkpointing"] is False or config["trainer"]["fast_dev_run"]:
            return callbacks
        folder = self.run_dir / "checkpoints"
        best = ModelCheckpoint(
            folder,
            filename="best-{epoch}",
            monitor=MONITOR,
            mode="max",
            save_top_k=1,
            auto_insert_metric_name=False,
            enable_version_counter=False,  # an epoch that is run again after a kill writes over its own file
        )
        every = config["checkpoint_every_n_steps"]
        last = ModelCheckpoint(
            folder,
            filename="last",
            enable_version_counter=False,
            every_n_epochs=1,
            save_on_train_epoch_end=True,
        )
        callbacks += [MovedRun(), best, last]
        if every > 0:
            callbacks.append(StepCheckpoint(folder, every))
        return callbacks

    def _loggers(self, config: Any) -> list[Any]:
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers: list[Any] = [
            RunLogger(str(self.run_dir.parent), self.run_dir.name, self.resume_step)
        ]
        if config["tensorboard"]:
            loggers.append(
                TensorBoardLogger(
                    self.run_dir, name="", version="tensorboard", default_hp_metric=False
                )
            )
        if config["wandb"]:
            from tq_lightning.callbacks.wandb_logger import make_wandb_logger

            loggers.append(make_wandb_logger(self.run_dir, self.config_dump))
        return loggers


def _quiet() -> None:
    # what Lightning says of hardware and data loaders at every start hides the one line a user needs
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*args parameter is intended to run from within Python.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*LeafSpec.*",
        ".*overrides the configure_model callback.*",
        ".*The number of training batches.*",
        ".*when using `ckpt_path`, callbacks used to create the checkpoint.*",
        ".*The dirpath has changed from.*",
        ".*`weights_only` was not set.*",
        ".*`isinstance\\(treespec.*",
        ".*Couldn't infer the batch indices.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)


_KINDS |= {"list": "a list", "NoneType": "null"}


def _unquote(argument: str) -> str:
    """`--model.lr='1e-3'` and "'1e-3'", as some sweep engines quote a number, without the quotes."""
    key, equals, value = (
        argument.partition("=") if argument.startswith("--") else ("", "", argument)
    )
    bare = value.strip("'\"")
    return f"{key}{equals}{bare}" if bare != value and _SCIENTIFIC.fullmatch(bare) else argument


def run(argv: list[str]) -> dict[str, Any]:
    """Runs `argv` ("fit", "--config", ...) in this process.

    Returns:
        The last metrics as floats, "run_dir" and "record".

    Raises:
        UserError, TrainingError, KeyboardInterrupt: as `cli.run_fit`.
    """
    _quiet()
    try:
        cli = TQCLI(
            TQModule,
            TQDataModule,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={
                "default_root_dir": ROOT,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
            },
            parser_kwargs={"parser_mode": "tq", "exit_on_error": False},
            args=[_unquote(argument) for argument in argv],
        )
    except (ArgumentError, MisconfigurationException) as error:
        raise UserError(one_line(error)) from None
    except SystemExit as stop:
        if stop.code in (0, None):  # --help, --print_config
            return {}
        raise KeyboardInterrupt("go on with the same command and --ckpt_path last") from None
    metrics = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    return {**metrics, "run_dir": str(cli.run_dir), "record": str(cli.run_dir / NAME)}


def run_fit(argv: list[str]) -> dict[str, Any]:
    """A whole `fit` in this process: what the command line does, for callers such as a sweep.

    Args:
        argv: arguments as on the command line, after `fit`.

    Returns:
        The last metrics as floats, and "run_dir" and "record" (paths).

    Raises:
        UserError: bad input. TrainingError: a run that can't go on. KeyboardInterrupt: it was interrupted.
    """
    return run(["fit", *argv])
