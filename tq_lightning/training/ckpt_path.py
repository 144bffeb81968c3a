"""Resolve --ckpt_path: the checkpoint file, its progress and its run."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from tq_lightning.errors import UserError
from tq_lightning.training.checkpoint import newest_checkpoint, read_progress, run_folder
from tq_lightning.training.resume_guard import check_accumulation
from tq_lightning.training.run_folder import LAST, check_same_run, has_finished, is_finished
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
    return GivenCheckpoint(path, given, read_progress(path), run_folder(path))


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
