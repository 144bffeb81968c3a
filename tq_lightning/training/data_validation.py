"""Validation of the `model:` keys and the Trainer's intervals against the data set."""

from typing import Any

from torch import Tensor

from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.data.dataset_module import DatasetModule
from tq_lightning.errors import UserError, first_line


def check_against_data(hparams: Any, data: Any, trainer: Any) -> None:
    """Check the `model:` keys against the data set and the length of the fit.

    Args:
        hparams: hyperparameters of the TQModule.
        data: the TQDataModule, after its setup.
        trainer: the Trainer, in its setup.

    Raises:
        UserError: a fit on one class, fewer outputs than classes, another number of channels than
            the images, a warm-up that is longer than the training, or an interval without a batch.
    """
    classes = getattr(data, "num_classes", None)
    if hparams.num_classes is not None and classes is not None and hparams.num_classes < classes:
        raise UserError(
            f"model.num_classes: got {hparams.num_classes}, but the data has {classes} classes; "
            "pass that number, or null"
        )
    channels = (hparams.model_args or {}).get("in_chans", 3)
    if hasattr(data, "input_shape") and channels != data.input_shape[0]:
        raise UserError(
            f"model.model_args: got in_chans={channels}, but the images have "
            f"{data.input_shape[0]} channels; omit in_chans"
        )
    if trainer.state.fn != "fit":
        return
    if classes == 1:
        raise UserError("data: the training data has 1 class; pass data with 2 or more")
    soft_targets = getattr(data, "mixup", None) is not None
    if soft_targets and hparams.num_classes not in (None, data.num_classes):
        raise UserError(
            f"model.num_classes: got {hparams.num_classes}, but mixup, cutmix and smoothing make "
            f"targets of the data's {data.num_classes} classes; pass that number, or null"
        )
    epochs = trainer.max_epochs or 0
    if hparams.sched != "none" and 0 < epochs < hparams.warmup_epochs:
        raise UserError(
            f"model.warmup_epochs: got {hparams.warmup_epochs:g}, but trainer.max_epochs is "
            f"{epochs}; pass a shorter warm-up"
        )
    # the loader of another data module may have no length
    if isinstance(data, (TQDataModule, DatasetModule)):
        # created here so that its errors are raised before a model is built
        _check_intervals(trainer, len(data.train_dataloader()))


def _check_intervals(trainer: Any, batches: int) -> None:
    """Check `limit_train_batches` and `val_check_interval` against the batches of an epoch."""
    limit = trainer.limit_train_batches
    if isinstance(limit, float) and int(limit * batches) == 0:
        raise UserError(
            f"trainer.limit_train_batches={limit:g} of {batches} batches is less than one; pass a "
            "larger fraction, or a number of batches"
        )
    batches = int(limit * batches) if isinstance(limit, float) else min(limit, batches)
    # Lightning sets no `val_check_interval` for one in time
    every = getattr(trainer, "val_check_interval", None)
    by_epoch = trainer.check_val_every_n_epoch is not None
    if isinstance(every, int) and by_epoch and every > batches:
        raise UserError(
            f"trainer.val_check_interval: got {every}, but an epoch has {batches} batches; pass at "
            "most that number, or trainer.check_val_every_n_epoch=null to count over epochs"
        )
    if isinstance(every, float) and int(every * batches) == 0:
        raise UserError(
            f"trainer.val_check_interval: got {every:g}, which is less than one of {batches} "
            "batches; pass a larger fraction"
        )


def refused_shape(name: str, images: Tensor, error: BaseException) -> UserError:
    """Return the error for images (batch, channels, height, width) that a network cannot process.

    Args:
        name: name of the network.
        images: its input.
        error: the error that it raised.
    """
    return UserError(
        f"model.name: {name} cannot process inputs of shape {tuple(images.shape)} "
        f"({first_line(error)}); pass another data.image_size, or model.model_args with a size, "
        "e.g. {img_size: 32}"
    )
