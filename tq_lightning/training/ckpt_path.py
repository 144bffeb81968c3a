"""Resolve --ckpt_path and --run_dir: the checkpoint to load, and its run."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tq_lightning.errors import UserError
from tq_lightning.training.checkpoint_progress import (
    CheckpointProgress,
    check_unfinished,
    read_progress,
)
from tq_lightning.training.resume_guard import check_accumulation
from tq_lightning.training.run_folder import (
    LAST,
    auto_folder,
    check_files,
    check_no_other_files,
    check_same_run,
    check_unused,
    has_finished,
    is_finished,
    is_same_folder,
    run_of,
)


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
    progress: CheckpointProgress
    run: Path | None


class ResolvedPath(NamedTuple):
    """The run folder and the checkpoint of `--run_dir` and `--ckpt_path`.

    Attributes:
        run_dir: --run_dir, or the folder of `--ckpt_path auto`; None if neither was given.
        checkpoint: the checkpoint to load; None without one.
        resume_step: metrics from this step on are logged again; None for a new run.
    """

    run_dir: Path | None
    checkpoint: GivenCheckpoint | None
    resume_step: int | None

    @property
    def continues_run(self) -> bool:
        """True if a fit resumes the run of its checkpoint, from the end of an epoch."""
        checkpoint = self.checkpoint
        return (
            checkpoint is not None
            and (self.run_dir is None or is_same_folder(self.run_dir, checkpoint.run))
            and checkpoint.progress.batches is None
        )


def resolve_ckpt_path(
    verb: str, config: Any, root: Path, plain_config: Callable[[], dict[str, Any]]
) -> ResolvedPath:
    """Resolve `--ckpt_path` and `--run_dir` before the checkpoint is loaded.

    Args:
        verb: fit, validate, test or predict.
        config: the configuration of the verb.
        root: trainer.default_root_dir.
        plain_config: returns the configuration as plain types, for `auto`.

    Raises:
        UserError: the checkpoint does not exist or can't be resumed, or the folder already has
            another run.
        SystemExit: `auto`, and the run is finished.
    """
    fits, given = verb == "fit", config.ckpt_path
    run_dir = None if config.run_dir is None else Path(config.run_dir)
    if given == "auto":
        if not fits:
            raise UserError("ckpt_path=auto is for fit; pass best, last or a file, and --run_dir")
        run_dir = auto_folder(config.run_dir, root)
        check_no_other_files(run_dir)
        given = find_auto(run_dir, plain_config())
        if given is None:  # rows of an attempt without a checkpoint will be logged again
            return ResolvedPath(run_dir, None, 0)
    elif given is None:
        if run_dir is not None and fits:
            check_unused(run_dir)
            check_no_other_files(run_dir)
        return ResolvedPath(run_dir, None, None)
    checkpoint = find_checkpoint(str(given), root, run_dir)
    folder = checkpoint.run if run_dir is None else run_dir
    if fits and is_same_folder(folder, checkpoint.path.absolute().parent.parent):
        check_files(folder, checkpoint.path, config.trainer.logger)  # type: ignore[arg-type]
    if run_dir is not None and not is_same_folder(run_dir, checkpoint.run):
        check_unused(run_dir, f"ckpt_path: {checkpoint.path} is not a checkpoint of it")
        if fits:
            check_no_other_files(run_dir)
    if fits:
        check_resumable(checkpoint, config.trainer)
    return ResolvedPath(run_dir, checkpoint, checkpoint.progress.step)


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
