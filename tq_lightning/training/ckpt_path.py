"""Resolve --ckpt_path: the checkpoint, its progress, its run, and the arguments it overrides."""

import inspect
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from tq_lightning.errors import UserError
from tq_lightning.factories import is_factory
from tq_lightning.models.weights import load_torch_file, why_not_loaded
from tq_lightning.quant.config import QuantConfig
from tq_lightning.records import NAME, read_record
from tq_lightning.records.publish import flatten
from tq_lightning.training.checkpoint_io import verify_checkpoint
from tq_lightning.training.lists import as_list
from tq_lightning.training.module import TQModule
from tq_lightning.training.resume_guard import (
    check_accumulation,
    inside_accumulation,
    saved_batches,
)
from tq_lightning.training.run_folder import (
    CONFIG,
    LAST,
    check_same_run,
    has_finished,
    is_finished,
    run_of,
)
from tq_lightning.training.trainer_validation import Progress, check_unfinished


class GivenCheckpoint(NamedTuple):
    """The checkpoint that a verb loads.

    Attributes:
        path: the file.
        given: the argument: best, last or a path.
        progress: progress of the training when the file was written.
        run: folder of its run; None if it is not in a run folder.
    """

    path: Path
    given: str
    progress: Progress
    run: Path | None


def find_checkpoint(given: str, root: Path, run_dir: Path | None) -> GivenCheckpoint:
    """Find and check the checkpoint of `--ckpt_path GIVEN`.

    Args:
        given: a path; last or best for the newest run below `root`, or for `run_dir`.
        root: trainer.default_root_dir.
        run_dir: --run_dir, None if it was not given.

    Raises:
        UserError: the file does not exist or is not a training checkpoint.
    """
    path = newest_checkpoint(root, given, run_dir) if given in ("last", "best") else Path(given)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise UserError(
            f"ckpt_path: {path} {what}; pass a file, or last or best for the newest run under "
            f"{root}"
        )
    return GivenCheckpoint(path, given, read_progress(path), run_of(path))


def newest_checkpoint(root: Path, which: str, run_dir: Path | None = None) -> Path:
    """Return the "last" or "best" checkpoint of the newest run under `root`, or of `run_dir`.

    Raises:
        UserError: the checkpoint does not exist.
    """
    pattern = LAST if which == "last" else "checkpoints/best*.ckpt"
    if run_dir is None:
        pattern = f"*/{pattern}"
    else:
        root = run_dir
    found = sorted(root.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"ckpt_path={which}: no {pattern} under {root}; pass a checkpoint file, or the "
            "trainer.default_root_dir of the run"
        )
    return found[-1]


def read_progress(path: Path) -> Progress:
    """Read the step and the epochs of a training checkpoint.

    Raises:
        UserError: the file is not a training checkpoint, or parts of it are missing.
    """
    verify_checkpoint(path)
    try:
        # mmap avoids reading the weights; formats that do not support it were not written by fit
        checkpoint = load_torch_file(path, mmap=True)
        if not all(isinstance(checkpoint[key], dict) for key in ("state_dict", "hyper_parameters")):
            raise TypeError("no state dict or no hyperparameters")
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        return Progress(
            int(checkpoint["global_step"]),
            int(epochs),
            saved_batches(checkpoint),
            inside_accumulation(checkpoint),
        )
    except Exception as error:
        raise UserError(
            f"ckpt_path: {path} is not a training checkpoint ({why_not_loaded(error)}); "
            "pass last, best, or a .ckpt file"
        ) from None


def check_resumable(checkpoint: GivenCheckpoint, trainer: Any) -> None:
    """Check that a fit can resume a checkpoint.

    Args:
        checkpoint: return value of `find_checkpoint`.
        trainer: the `trainer:` section of the configuration.

    Raises:
        UserError: nothing is left to train, or it was written inside an accumulation of gradients.
    """
    finished = checkpoint.run is not None and has_finished(checkpoint.run)
    check_unfinished(checkpoint.path, checkpoint.progress, finished, trainer)
    what = f"ckpt_path: {checkpoint.path}"
    check_accumulation(checkpoint.progress.inside_accumulation, what)


def network_keys() -> list[str]:
    """Return the `model:` keys that define the quantized network, unlike e.g. a learning rate."""
    return ["name", "model_args", "task", *(field.name for field in fields(QuantConfig))]


def differences(run: Path | None, config: Any) -> list[str]:
    """List the seed and the data set of a run that differ from those of a configuration."""
    path = None if run is None else run / NAME
    if path is None or not path.is_file():
        return []
    record = read_record(path)
    theirs = {
        "seed_everything": record.seed,
        "data.name": flatten(record.config).get("data.name"),
    }
    return [
        f"{key}={value}, not {config[key]}"
        for key, value in theirs.items()
        if value is not None and str(value) != str(config[key])
    ]


def check_newest(checkpoint: GivenCheckpoint, root: Path, differing: list[str]) -> None:
    """Check that `last` or `best` resumes the run that the configuration describes.

    The newest of several runs may be another one, e.g. if the run that is meant has no checkpoint.

    Args:
        checkpoint: return value of `find_checkpoint`, without a run folder.
        root: trainer.default_root_dir.
        differing: settings of the run that differ from the configuration.

    Raises:
        UserError: they differ, and `root` has several runs.
    """
    several = len(list(root.glob(f"*/{CONFIG}"))) > 1
    if checkpoint.given in ("last", "best") and several and differing:
        raise UserError(
            f"ckpt_path={checkpoint.given}: the newest of several runs under {root} is "
            f"{checkpoint.run}, with {'; '.join(differing)}; pass --ckpt_path {checkpoint.path} "
            "to resume it, or the checkpoint of another run"
        )


def find_auto(run_dir: Path, config: dict[str, Any]) -> Path | None:
    """Return the checkpoint that `--ckpt_path auto` resumes in `run_dir`; None for a first start.

    Args:
        run_dir: the run folder.
        config: the configuration of this fit, plain types.

    Raises:
        UserError: `run_dir` has a run with another configuration.
        SystemExit: the run is finished.
    """
    check_same_run(run_dir, config)
    if is_finished(run_dir, config):
        print(f"{run_dir} is finished; nothing to do", file=sys.stderr, flush=True)
        raise SystemExit(0)
    checkpoint = run_dir / LAST
    return checkpoint if checkpoint.is_file() else None


def overridden_arguments(given: dict[str, Any], kept: dict[str, Any]) -> list[str]:
    """List the model arguments that a checkpoint overrides, as `key=value, not value`.

    Args:
        given: the `model:` section of the command line and files. Default values do not count.
        kept: the same section with the values of the checkpoint.
    """
    defaults = {key: p.default for key, p in inspect.signature(TQModule).parameters.items()}
    return [
        f"model.{key}={kept[key]}, not {value}"
        for key, value in given.items()
        if key in kept
        and not _same(value, defaults.get(key), key)
        and not _same(value, kept[key], key)
    ]


def check_factories(given: dict[str, Any], kept: dict[str, Any], path: Any) -> None:
    """Check that every factory in a checkpoint was also passed by the user.

    A factory is imported code, so a file must not be able to select it.

    Args:
        given: the `model:` section of the user.
        kept: the same section with the values of the checkpoint.
        path: path of the checkpoint, for the message.

    Raises:
        UserError: the checkpoint names a factory that the user did not pass.
    """
    for key in ("name", "teacher_name"):
        if is_factory(kept[key]) and kept[key] != given[key]:
            raise UserError(
                f"ckpt_path: {path} names the factory {kept[key]}, which is not imported "
                f"automatically; pass --model.{key} {kept[key]}"
            )


def _same(one: Any, two: Any, key: str) -> bool:
    if isinstance(one, dict) and isinstance(two, dict):
        return one.items() <= two.items()  # model_args of a checkpoint include the dropout rates
    return [str(v) for v in as_list(one, f"model.{key}")] == [str(v) for v in as_list(two)]
