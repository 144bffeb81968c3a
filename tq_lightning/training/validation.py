"""Validation of the `model:` and `trainer:` keys, before any model is built."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tq_lightning.errors import UserError, did_you_mean
from tq_lightning.models import check_name
from tq_lightning.quant.config import QuantConfig, check_widths
from tq_lightning.training.lists import as_floats, as_ints, as_list
from tq_lightning.training.losses import LOSSES, TEACHERS
from tq_lightning.training.optim import SCHEDULES, check_optimizer
from tq_lightning.training.width_schedules import WIDTH_SCHEDULES


class Progress(NamedTuple):
    """Progress of a training when it wrote a checkpoint."""

    step: int
    """Optimizer steps."""
    epochs: int
    """Completed epochs."""
    batches: dict[str, Any] | None
    """Loader state, if the checkpoint was written inside an epoch."""
    inside_accumulation: bool = False
    """See `resume_guard.inside_accumulation`."""


CHOICES: dict[str, tuple[str, ...]] = {
    "loss": tuple(LOSSES),
    "teacher": TEACHERS,
    "width_schedule": tuple(WIDTH_SCHEDULES),
    "sched": SCHEDULES,
}


def _from_zero(value: float) -> bool:
    return 0.0 <= value < math.inf


# key -> (test of a value, description of the accepted values)
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_classes": (lambda v: v is None or v >= 1, "1 or more, or null for those of the data"),
    "drop_rate": (lambda v: v is None or 0.0 <= v < 1.0, "a number from 0 to below 1, or null"),
    "drop_path_rate": (
        lambda v: v is None or 0.0 <= v < 1.0,
        "a number from 0 to below 1, or null",
    ),
    "distill_weight": (lambda v: 0.0 <= v <= 1.0, "a number from 0 to 1"),
    "temperature": (lambda v: 0.0 < v < math.inf, "a number above 0"),
    "lr": (_from_zero, "a number from 0"),
    "weight_decay": (_from_zero, "a number from 0"),
    "momentum": (lambda v: 0.0 <= v < 1.0, "a number from 0 to below 1"),
    "warmup_epochs": (_from_zero, "a number from 0"),
    "warmup_lr": (_from_zero, "a number from 0"),
    "min_lr": (_from_zero, "a number from 0"),
    "decay_rate": (lambda v: 0.0 < v < math.inf, "a number above 0"),
    "ema_decay": (
        lambda v: v is None or 0.0 <= v < 1.0,
        "a number from 0 to below 1, or null for no average",
    ),
    "calibration_batches": (lambda v: v >= 1, "1 or more"),
    "sandwich_random": (lambda v: v >= 0, "0 or more"),
    "seed": (lambda v: v is None or v >= 0, "0 or more, or null for the seed of the run"),
}


def check(h: Any) -> None:
    """Check the hyperparameters `h` of a TQModule.

    Raises:
        UserError: a value that is unknown or out of range; the message names the key.
    """
    for key, known in CHOICES.items():
        if h[key] not in known:
            hint = did_you_mean(h[key], known)
            raise UserError(f"model.{key}: got {h[key]!r}, pass one of {', '.join(known)}{hint}")
    for key, (fits, accepted) in _RANGES.items():
        if not fits(h[key]):
            raise UserError(f"model.{key}: got {h[key]}, pass {accepted}")
    for key in ("name", "teacher_name"):
        if h[key] is not None:
            try:
                check_name(h[key])
            except UserError as error:
                raise UserError(f"model.{key}: {error}") from None
    if h["teacher"] == "external" and h["teacher_name"] is None:
        raise UserError("model.teacher=external needs a teacher model: pass model.teacher_name")
    if min(as_floats(h["decay_epochs"], "model.decay_epochs"), default=0.0) <= 0.0:
        raise UserError(
            f"model.decay_epochs: got {h['decay_epochs']!r}, pass epochs above 0, e.g. 100,150,180"
        )
    check_optimizer(h)


def quant_config(h: Any) -> QuantConfig:
    """Return the QuantConfig of the hyperparameters `h`, whose lists may be in any spelling.

    Raises:
        UserError: a value that is unknown or out of range.
    """
    widths = as_ints(h["widths"], "model.widths")
    skip = as_list(h["skip"], "model.skip")
    shared = as_list(h["shared_norms"], "model.shared_norms")
    if h["float_pass"] not in (True, False, "normalized"):
        raise UserError(
            f"model.float_pass: got {h['float_pass']!r}, pass true, false or normalized"
        )
    float_pass = "normalized" if h["float_pass"] == "normalized" else "plain"
    try:
        check_widths(widths, h["max_bits"])
    except ValueError as error:
        key = "max_bits" if str(error).startswith("max_bits") else "widths"
        raise UserError(f"model.{key}: {error}") from None
    try:
        return QuantConfig.from_mapping(
            {**h, "widths": widths, "skip": skip, "shared_norms": shared, "float_pass": float_pass}
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def pass_weights(width_weights: Any, passes: Sequence[int | None]) -> dict[int | None, float]:
    """Return {pass: weight of its loss}.

    Args:
        width_weights: `model.width_weights` in any spelling; None is 1 for each pass.
        passes: passes in the order of `width_weights`.

    Raises:
        UserError: not one weight for each pass.
    """
    if width_weights is None:
        return dict.fromkeys(passes, 1.0)
    weights = as_floats(width_weights, "model.width_weights")
    if len(weights) != len(passes):
        raise UserError(
            f"model.width_weights: got {len(weights)} weights for {len(passes)} passes; "
            "pass one for each"
        )
    return dict(zip(passes, weights, strict=True))


# callbacks of Lightning that rebuild parts of the model -> why they are refused
_REFUSED_CALLBACKS = {
    "StochasticWeightAveraging": "resets the norm statistics of all widths; use model.ema_decay",
    "ModelPruning": "replaces the weights that are quantized; pass a model that is pruned already",
}


def check_trainer(trainer: Any) -> None:
    """Check the Trainer's strategy, precision, callbacks and accumulation.

    Raises:
        UserError: a strategy that shards weights, a precision or a callback that replaces layers or
            norm statistics, or an accumulation of less than one batch.
    """
    name = type(trainer.strategy).__name__
    if name in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
        raise UserError(
            f"trainer.strategy: {name} shards the weights, but the normalizer needs the maximum "
            "over the whole weight; pass ddp"
        )
    precision = type(getattr(trainer, "precision_plugin", None)).__name__
    if precision in ("HalfPrecision", "DoublePrecision"):
        raise UserError(
            f"trainer.precision: {trainer.precision} converts the weights, and codes need float32; "
            "pass bf16-mixed, 16-mixed or 32-true"
        )
    if precision in ("TransformerEnginePrecision", "BitsandbytesPrecision"):
        raise UserError(
            f"trainer.precision: {precision} replaces the quantized layers by its own; "
            "pass bf16-mixed, 16-mixed or 32-true"
        )
    for callback in getattr(trainer, "callbacks", []):
        hint = _REFUSED_CALLBACKS.get(type(callback).__name__)
        if hint is not None:
            raise UserError(f"trainer.callbacks: {type(callback).__name__} {hint}")
    if trainer.accumulate_grad_batches < 1:
        raise UserError(
            f"trainer.accumulate_grad_batches: got {trainer.accumulate_grad_batches}, "
            "pass 1 or more"
        )


# trainer key -> (test of a value that is not null, description of the accepted values); Lightning
# accepts the others, and divides by zero or ignores them
_TRAINER_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_epochs": (lambda v: v >= 1 or v == -1, "1 or more, or -1 for no limit"),
    "max_steps": (lambda v: v >= 1 or v == -1, "1 or more, or -1 for no limit"),
    "max_time": (lambda v: any(c in "123456789" for c in str(v)), "more, e.g. 00:01:00:00"),
    "check_val_every_n_epoch": (lambda v: v >= 1, "1 or more"),
    "val_check_interval": (lambda v: v != 0, "a share of an epoch or a number of batches"),
    "log_every_n_steps": (lambda v: v >= 0, "1 or more, or 0 for never"),
    "gradient_clip_val": (lambda v: v >= 0, "a number from 0"),
    "num_sanity_val_steps": (lambda v: v >= -1, "0 or more, or -1 for all"),
    "barebones": (lambda v: not v, "false: a fit needs its record"),
}


def check_run(verb: str, config: Any) -> None:
    """Check the keys of a parsed configuration that no class of ours receives.

    Args:
        verb: fit, validate, test or predict.
        config: the configuration of the verb.

    Raises:
        UserError: a value out of range, or a fit without an end.
    """
    seed = config.seed_everything
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise UserError(f"seed_everything: got {seed}, pass an integer from 0 to {2**32 - 1}")
    if config.checkpoint_every_n_steps < 0:
        raise UserError(
            f"checkpoint_every_n_steps: got {config.checkpoint_every_n_steps}, pass 1 or more, "
            "or 0 for a checkpoint at every epoch only"
        )
    trainer = config.trainer
    for key, (fits, accepted) in _TRAINER_RANGES.items():
        if trainer[key] is not None and not fits(trainer[key]):
            raise UserError(f"trainer.{key}: got {trainer[key]}, pass {accepted}")
    for least, most in (("min_epochs", "max_epochs"), ("min_steps", "max_steps")):
        if trainer[least] is not None and -1 != (trainer[most] or -1) < trainer[least]:
            raise UserError(
                f"trainer.{least}: got {trainer[least]}, but trainer.{most} is {trainer[most]}"
            )
    without_end = trainer.max_epochs in (None, -1) and trainer.max_steps == -1
    if verb in ("test", "predict") and config.ckpt_path is None:
        raise UserError(f"{verb} needs a checkpoint: pass --ckpt_path best, last, or a file")
    for key, left in (
        ("limit_train_batches", "nothing to train"),
        ("limit_val_batches", "the run without a result"),
    ):
        if verb == "fit" and trainer[key] == 0:
            raise UserError(f"trainer.{key}=0 leaves {left}; pass at least 1 batch")
    if verb == "fit" and without_end and not trainer.max_time and not trainer.fast_dev_run:
        raise UserError(
            "the training needs an end: pass --trainer.max_epochs, --trainer.max_steps or "
            "--trainer.max_time"
        )


def check_unfinished(path: Path, progress: Progress, finished: bool, trainer: Any) -> None:
    """Check that a checkpoint leaves something to train.

    Args:
        path: the checkpoint.
        progress: its steps and epochs.
        finished: the record of its run says "finished".
        trainer: the `trainer:` section of the configuration.

    Raises:
        UserError: the training has reached, or passed, the end that `trainer` asks for.
    """
    for key, done in (("max_epochs", progress.epochs), ("max_steps", progress.step)):
        limit = trainer[key]
        # at the limit an interrupted run still has its result to record
        if limit not in (None, -1) and (done > limit or (done == limit and finished)):
            raise UserError(
                f"ckpt_path: {path} has trained {done} {key.removeprefix('max_')}, and "
                f"trainer.{key} is {limit}: nothing is left to train; pass a larger "
                f"--trainer.{key} to continue, or test it with the verb test"
            )


def check_against_data(h: Any, data: Any, trainer: Any) -> None:
    """Check the model's keys against the data set and the length of the fit.

    Args:
        h: hyperparameters of the TQModule.
        data: the TQDataModule, after its setup.
        trainer: the Trainer, in its setup.

    Raises:
        UserError: fewer classes than labels, other channels than the images have, a warm-up that
            is longer than the training, or no batch to train on.
    """
    if h.num_classes is not None and h.num_classes < data.num_classes:
        raise UserError(
            f"model.num_classes: got {h.num_classes}, but the data has {data.num_classes} classes; "
            "pass that number, or null"
        )
    if data.mixup is not None and h.num_classes not in (None, data.num_classes):
        raise UserError(
            f"model.num_classes: got {h.num_classes}, but mixup, cutmix and smoothing make targets "
            f"of the data's {data.num_classes} classes; pass that number, or null"
        )
    channels = (h.model_args or {}).get("in_chans", 3)
    if channels != data.input_shape[0]:
        raise UserError(
            f"model.model_args: got in_chans={channels}, but the images have "
            f"{data.input_shape[0]} channels; leave in_chans out"
        )
    if trainer.state.fn != "fit":
        return
    batches = len(data.train_dataloader())  # its errors too come before a model is built
    limit = trainer.limit_train_batches
    if isinstance(limit, float) and int(limit * batches) == 0:
        raise UserError(
            f"trainer.limit_train_batches={limit:g} of {batches} batches is less than one; pass a "
            "larger share, or a number of batches"
        )
    batches = int(limit * batches) if isinstance(limit, float) else min(limit, batches)
    every, by_epoch = trainer.val_check_interval, trainer.check_val_every_n_epoch is not None
    if isinstance(every, int) and by_epoch and every > batches:
        raise UserError(
            f"trainer.val_check_interval: got {every}, but an epoch has {batches} batches; pass at "
            "most that number, or trainer.check_val_every_n_epoch=null to count over epochs"
        )
    if isinstance(every, float) and int(every * batches) == 0:
        raise UserError(
            f"trainer.val_check_interval: got {every:g}, which is less than one of {batches} "
            "batches; pass a larger share"
        )
    epochs = trainer.max_epochs or 0
    if h.sched != "none" and 0 < epochs < h.warmup_epochs:
        raise UserError(
            f"model.warmup_epochs: got {h.warmup_epochs:g}, but trainer.max_epochs is {epochs}; "
            "pass a shorter warm-up"
        )
