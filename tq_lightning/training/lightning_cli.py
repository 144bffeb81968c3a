"""fit, validate, test and predict: LightningCLI over TQModule and TQDataModule."""

import os
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tq_lightning.callbacks.rank_monitor import RankMonitor
from tq_lightning.callbacks.stop_on_signal import SignalFlag
from tq_lightning.callbacks.width_table import WidthTable
from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.data.sampling import run_seed
from tq_lightning.errors import Interrupted, TrainingError, UserError, file_error, first_line
from tq_lightning.files import remove_temporaries
from tq_lightning.records import NAME, read_record, write_record
from tq_lightning.training.checkpoint_settings import check_settings
from tq_lightning.training.ckpt_path import GivenCheckpoint, resolve_ckpt_path
from tq_lightning.training.cli_messages import rewrite_parser_error
from tq_lightning.training.cluster import check_tasks
from tq_lightning.training.fit_parser import (
    add_run_options,
    check_nulls,
    drop_append_options,
    expand_paths,
    make_parser,
    preprocess_argv,
)
from tq_lightning.training.help_pages import page, wanted_page
from tq_lightning.training.module import TQModule
from tq_lightning.training.open_run import OpenRun, check_writable
from tq_lightning.training.run_callbacks import (
    SaveConfig,
    evaluation_callbacks,
    fit_callbacks,
    listed,
    make_loggers,
    make_plugins,
    progress_callbacks,
)
from tq_lightning.training.run_messages import (
    StartLine,
    end_lines,
    how_to_resume,
    quiet,
    start_line,
)
from tq_lightning.training.trainer_validation import check_precision, check_run
from tq_lightning.training.yaml_values import as_plain_strings

ROOT = "runs"  # the default of trainer.default_root_dir


def _root(config: Any) -> Path:
    """Return the parent of the run folders; `ROOT` if the key is null."""
    return Path(config.trainer.default_root_dir or ROOT)


class TQCLI(LightningCLI):
    """LightningCLI over TQModule and TQDataModule.

    `run_dir` is the folder of this run: --run_dir, that of the checkpoint to resume, or a new one
    under trainer.default_root_dir.
    """

    run_dir: Path
    checkpoint: GivenCheckpoint | None = None
    resume_step: int | None = None
    stop_flag: SignalFlag
    _rank_monitor: RankMonitor | None = None
    _open_run: OpenRun | None = None  # on rank 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with SignalFlag() as self.stop_flag:
            try:
                super().__init__(*args, **kwargs)
            except BaseException as error:
                if isinstance(error, Interrupted) and not self.stop_flag.deferred:
                    self._stop_children()
                if self._open_run is not None:
                    self._open_run.close(error)
                if (
                    isinstance(error, RuntimeError)
                    and self._rank_monitor
                    and self._rank_monitor.message
                ):
                    lost = self._rank_monitor.message if self._rank_monitor.reports() else ""
                    raise TrainingError(lost) from None
                if isinstance(error, SystemExit) and error.code not in (0, None):  # Ctrl-C
                    raise KeyboardInterrupt(self._how_to_resume()) from None
                raise
            if self._open_run is not None:
                self._open_run.close(None)

    def _fail_record(self, reason: str) -> None:
        path = self.run_dir / NAME
        if self.subcommand == "fit" and self._open_run is not None and path.is_file():
            write_record(path, replace(read_record(path), status="failed", reason=reason))

    def _how_to_resume(self) -> str:
        return how_to_resume(str(self.subcommand), self.run_dir)

    def _stop_children(self) -> None:
        """Forward SIGTERM to the ranks that Lightning started; in a fit, ranks agree on signals."""
        trainer = getattr(self, "trainer", None)
        launcher = trainer.strategy.launcher if trainer is not None else None
        for process in getattr(launcher, "procs", ()):
            process.terminate()

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Create a parser with our YAML loader; LightningCLI calls this for each verb."""
        return make_parser(**kwargs)

    def _prepare_subcommand_parser(self, *args: Any, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(*args, **kwargs)
        drop_append_options(parser)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, or print a help page and exit."""
        verb = args[0] if args and args[0] in self._subcommand_parsers else ""
        section = wanted_page(verb, args) if verb else None
        if section is not None:
            print(page(verb, section, self._subcommand_parsers[verb]))
            raise SystemExit(0)
        super().parse_arguments(parser, preprocess_argv(args))
        config = self.config[self.config.subcommand]
        for section in ("model", "data", "trainer"):
            if config[section] is None:
                raise UserError(f"{section}: the section is empty; add keys to it, or remove it")
            check_nulls(section, config[section])
        expand_paths(config)
        check_run(self.config.subcommand, config)
        if config.seed_everything is True:  # a number: a later start compares it with the record
            config.seed_everything = run_seed()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options outside of the sections."""
        add_run_options(parser)

    def _parse_ckpt_path(self) -> None:
        verb = self.config.subcommand
        config = self.config[verb]
        root = _root(config)
        resolved = resolve_ckpt_path(verb, config, root, self._plain_config)
        if resolved.run_dir is not None:
            self.run_dir = resolved.run_dir
        self.checkpoint, self.resume_step = resolved.checkpoint, resolved.resume_step
        config.ckpt_path = None if self.checkpoint is None else str(self.checkpoint.path)
        given_model = config.model.as_dict()
        super()._parse_ckpt_path()  # replaces the model arguments by those of the checkpoint
        kept = check_settings(verb, resolved, root, given_model, self.config[verb])
        if kept:
            print(
                f"the model keeps the settings of its checkpoint: {'; '.join(kept)}",
                file=sys.stderr,
                flush=True,
            )

    def _plain_config(self) -> dict[str, Any]:
        """Return the configuration of the verb as plain types."""
        dumped = self.parser.dump(self.config, skip_none=False, format="yaml")
        plain: dict[str, Any] = yaml.safe_load(dumped)[self.config.subcommand]
        return plain

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and lock it."""
        config = self.config[self.subcommand]
        root = _root(config)
        if hasattr(self, "run_dir"):
            config.run_dir = None  # the saved configuration may start other runs
        elif self.checkpoint is not None and self.checkpoint.run is not None:
            self.run_dir = self.checkpoint.run
        else:  # also for a checkpoint outside of a run folder
            self.run_dir = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        if self.checkpoint is None or self.checkpoint.run is None:
            check_writable(self.run_dir.parent)
        self._dump_config()
        if self.subcommand != "validate" and getattr(rank_zero_only, "rank", 0) == 0:
            self._open_run = OpenRun(self.run_dir)

    def instantiate_classes(self) -> None:
        """Create the data module, the module and the Trainer, with one-line errors."""
        self._typed_config, self.config = self.config, as_plain_strings(self.config)
        try:
            super().instantiate_classes()
        except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(rewrite_parser_error(error)) from error
        except RuntimeError as error:
            if "more than one stateful callback" not in str(error):
                raise
            raise UserError(rewrite_parser_error(error)) from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in ("validate", "test"):
            kwargs["verbose"] = False  # the width table is shorter than a line per metric
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        first = getattr(rank_zero_only, "rank", 0) == 0
        try:
            super()._run_subcommand(subcommand)
        except UserError as error:
            if str(error).startswith("the checkpoint") and self.checkpoint is not None:
                raise UserError(f"ckpt_path: {self.checkpoint.path}: {error}") from None
            raise
        except (TrainingError, MisconfigurationException, OSError):
            raise
        except Exception as error:
            if "Early stopping conditioned on metric" in str(error):
                raise UserError(rewrite_parser_error(error)) from None
            lost = self._rank_monitor and self._rank_monitor.message
            if self.checkpoint is None or self.model.began or lost:
                raise
            raise UserError(
                f"ckpt_path: {self.checkpoint.path} can't be loaded into this run "
                f"({first_line(error)}); pass a checkpoint of the same model"
            ) from error
        if first:
            for line in end_lines(subcommand, self.run_dir):
                print(line, flush=True)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Create the Trainer with the callbacks, loggers and plugins of the verb."""
        self.config = self._typed_config  # SaveConfig quotes `Text`, so that it stays a string
        config, fits = self.config_init[self.subcommand], self.subcommand == "fit"
        trainer, given = config["trainer"], self.checkpoint
        self.model.restored_from_checkpoint = given is not None
        self.model.resumed_batches = None if given is None else given.progress.batches
        # Lightning looks for its own checkpoints in its root, which must not be shared by runs
        kwargs["default_root_dir"] = str(self.run_dir)
        kwargs["plugins"] = make_plugins(trainer["plugins"])
        if trainer["enable_progress_bar"] is None:
            kwargs["enable_progress_bar"] = sys.stdout.isatty()
        if trainer["enable_model_summary"] is None:  # replaced by `QuantizationSummary`
            kwargs["enable_model_summary"] = False
        bar = kwargs.get("enable_progress_bar", trainer["enable_progress_bar"])
        self._rank_monitor = RankMonitor(self._fail_record, self._how_to_resume)
        # RankMonitor comes first: it names the cause of an error before the record is written
        path = None if given is None else given.path
        line = start_line(str(self.subcommand), self.run_dir, path, self.resume_step)
        callbacks = [self._rank_monitor, StartLine(line), WidthTable()]
        callbacks += progress_callbacks(bar, fits)
        if self._open_run is not None:
            remove_temporaries(self.run_dir)
            remove_temporaries(self.run_dir / "checkpoints")
        if fits:
            self.save_config_kwargs = {"run_dir": self.run_dir}
            callbacks += fit_callbacks(self.run_dir, config, self.config_dump, self.stop_flag)
            if trainer["logger"] in (None, True):
                kwargs["logger"] = make_loggers(
                    self.run_dir, config, self.config_dump, self.resume_step
                )
        else:
            self.save_config_callback = None
            kwargs["logger"] = False
            tested = None if given is None else given.given
            callbacks += evaluation_callbacks(
                str(self.subcommand), self.run_dir, self.config_dump, self.stop_flag, tested
            )
        kwargs["callbacks"] = [*listed(trainer["callbacks"]), *callbacks]
        made = super().instantiate_trainer(**kwargs)
        check_tasks(made.num_devices, made.num_nodes, fits)
        check_precision(trainer["precision"], made.precision)
        return made


def run(argv: list[str]) -> dict[str, Any]:
    """Run `argv` ("fit", "--config", ...) in this process.

    Returns:
        The last metrics as floats, "run_dir" and "record".

    Raises:
        UserError, TrainingError, KeyboardInterrupt: as `cli.run_fit`.
    """
    quiet()
    seed = os.environ.get("PL_GLOBAL_SEED")
    try:
        cli = TQCLI(
            TQModule,
            TQDataModule,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={
                "default_root_dir": ROOT,
                "num_sanity_val_steps": 0,
                "use_distributed_sampler": False,
            },
            args=argv,
        )
    except (ArgumentError, MisconfigurationException) as error:
        raise UserError(rewrite_parser_error(error)) from None
    except OSError as error:
        known = file_error(error)
        if known is None:
            raise
        raise known from error
    except SystemExit as stop:
        if stop.code in (0, None):  # --help, --print_config
            return {}
        raise
    finally:  # Lightning sets it; seed_everything=true would repeat the seed in the next fit
        os.environ.pop("PL_GLOBAL_SEED", None)
        if seed is not None:
            os.environ["PL_GLOBAL_SEED"] = seed
    metrics = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    return {**metrics, "run_dir": str(cli.run_dir), "record": str(cli.run_dir / NAME)}


def run_fit(argv: list[str]) -> dict[str, Any]:
    """Run `fit` in this process, like the command line; for callers such as a sweep.

    Args:
        argv: arguments as on the command line, after `fit`.

    Returns:
        The last metrics as floats, and "run_dir" and "record" (paths).

    Raises:
        UserError: bad input.
        TrainingError: the training cannot continue.
        KeyboardInterrupt: Ctrl-C.
    """
    return run(["fit", *argv])
