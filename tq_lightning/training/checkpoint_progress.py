"""Progress of a training checkpoint: its steps, epochs and loader state."""

from pathlib import Path
from typing import Any, NamedTuple

from tq_lightning.errors import UserError
from tq_lightning.models.weights import load_torch_file, why_not_loaded
from tq_lightning.training.checkpoint_io import verify_checkpoint
from tq_lightning.training.resume_guard import inside_accumulation, saved_batches


class CheckpointProgress(NamedTuple):
    """Progress of a training when it wrote a checkpoint."""

    step: int
    """Optimizer steps."""
    epochs: int
    """Completed epochs."""
    batches: dict[str, Any] | None
    """Loader state, if the checkpoint was written inside an epoch."""
    inside_accumulation: bool = False
    """See `resume_guard.inside_accumulation`."""


def read_progress(path: Path) -> CheckpointProgress:
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
        return CheckpointProgress(
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


def check_unfinished(
    path: Path, progress: CheckpointProgress, finished: bool, trainer: Any
) -> None:
    """Check that a resumed fit has steps left to train.

    Args:
        path: the checkpoint.
        progress: its steps and epochs.
        finished: True if the record of its run has the status "finished".
        trainer: the `trainer:` section of the configuration.

    Raises:
        UserError: the checkpoint has reached `max_epochs` or `max_steps`.
    """
    for key, done in (("max_epochs", progress.epochs), ("max_steps", progress.step)):
        limit = trainer[key]
        # an interrupted run at the limit still has to record its result
        if limit not in (None, -1) and (done > limit or (done == limit and finished)):
            unit = key.removeprefix("max_").removesuffix("s" if done == 1 else "")
            raise UserError(
                f"ckpt_path: {path} has trained {done} {unit}, and "
                f"trainer.{key} is {limit}: nothing is left to train; pass a larger "
                f"--trainer.{key} to continue, or evaluate it with `test`"
            )
