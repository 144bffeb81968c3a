"""Checks before a fit resumes a checkpoint that was written within an epoch.

Lightning restores the state of a loader too late to influence it, and saves no gradients.
"""

from typing import Any

from tq_lightning.errors import UserError


def check_resume(checkpoint: dict[str, Any], data: Any) -> None:
    """Check that a fit can resume a checkpoint.

    Args:
        checkpoint: a loaded checkpoint.
        data: the TQDataModule, after its setup, or None.

    Raises:
        UserError: the checkpoint has no optimizer state, was written between accumulated batches,
            or within an epoch of other batches.
    """
    if not checkpoint.get("optimizer_states"):
        raise UserError("the checkpoint has no optimizer state; pass an intact checkpoint")
    check_accumulation(inside_accumulation(checkpoint), "the checkpoint")
    check_batches(saved_batches(checkpoint), data)


def saved_batches(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Return the loader state of a checkpoint that was written within an epoch, else None."""
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    states = loop["state_dict"].get("combined_loader")
    if not states or progress["is_last_batch"] or not progress["current"]["ready"]:
        return None
    return states[0] if isinstance(states[0], dict) else None


def inside_accumulation(checkpoint: dict[str, Any]) -> bool:
    """Return True if a checkpoint was written between the batches of one optimizer step.

    It lacks the gradients of the earlier batches. Such a checkpoint is written only by a validation
    within an epoch whose interval is not a multiple of `accumulate_grad_batches`.
    """
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop.get("epoch_loop.automatic_optimization.optim_progress")
    if progress is None:  # written by a loop of another kind, e.g. manual optimization
        return False
    optimizer = progress["optimizer"]
    # gradients are cleared once at the start of each accumulation
    cleared, stepped = (optimizer[key]["current"]["completed"] for key in ("zero_grad", "step"))
    return bool(cleared > stepped)


def check_accumulation(inside: bool, what: str) -> None:
    """Raise UserError if the checkpoint `what` lacks the gradients of an accumulation."""
    if inside:
        raise UserError(
            f"{what} was written inside an accumulation of gradients, which it does not contain; "
            "resume from last, and pass a val_check_interval that is a multiple of "
            "accumulate_grad_batches"
        )


def check_batches(saved: dict[str, Any] | None, data: Any) -> None:
    """Compare the batches of a checkpoint with those of this run.

    Args:
        saved: return value of `saved_batches`.
        data: the TQDataModule, after its setup.

    Raises:
        UserError: another data set, seed, number of samples or global batch size.
    """
    if saved is None or data is None:
        return
    here = data.train_dataloader().state_dict()
    different = [f"{k} {here[k]}, not {saved[k]}" for k in here if here[k] != saved.get(k, here[k])]
    if different:
        raise UserError(
            "ckpt_path: the checkpoint was written inside an epoch, and the batches of this run "
            f"differ ({', '.join(different)}); pass the same data, seed and global batch size, or "
            "a checkpoint from the end of an epoch"
        )
