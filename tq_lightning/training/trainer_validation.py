"""Validation of the `trainer:` keys and of the options of a verb, before anything is built."""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tq_lightning.errors import UserError

MAX_DEVICES = 1024  # processes of one machine
# Lightning callbacks that are not supported -> reason and alternative
_REFUSED_CALLBACKS = {
    "StochasticWeightAveraging": "resets the norm statistics of all widths; use model.ema_decay",
    "ModelPruning": "replaces the weights that are quantized; pass a model that is pruned already",
    "WeightAveraging": "averages the counters of norms too; use model.ema_decay",
    "EMAWeightAveraging": "averages the counters of norms too; use model.ema_decay",
    "BatchSizeFinder": "changes the batch size, but not in the record; pass data.batch_size",
    "LearningRateFinder": "changes the learning rate, but not in the record; pass model.lr",
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
            "over the full weight; pass ddp"
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


def check_precision(given: Any, used: Any) -> None:
    """Check that the Trainer uses the given precision: on a CPU, Lightning replaces float16.

    Raises:
        UserError: it uses another one, which the record of the run would not have.
    """
    if str(given) in ("16", "16-mixed") and str(used) != "16-mixed":
        raise UserError(
            f"trainer.precision: got {given}, which this device does not support; pass {used}"
        )


def _is_time(value: Any) -> bool:
    """Return True for days:hours:minutes:seconds, or arguments of a timedelta, above 0."""
    if isinstance(value, dict):
        try:
            return timedelta(**value) > timedelta()
        except (TypeError, OverflowError):
            return False
    text = str(value).strip()
    form = re.fullmatch(r"\d+:\d\d:\d\d:\d\d", text)
    return bool(form) and any(c in "123456789" for c in text)


def _is_share(value: float) -> bool:
    """Return True for a count from 0, which may be 20.0, or a fraction from 0 to 1."""
    return 0 <= value <= 1 or (value > 1 and float(value).is_integer())


def _is_count(value: int) -> bool:
    """Return True for a number from 1 that fits the 32-bit integers of PyTorch."""
    return 1 <= value < 2**31


def _is_devices(value: Any) -> bool:
    """Return True for a count, -1, "auto", or a list of indices such as "0,1".

    On a CPU, Lightning starts as many processes as it is told to.
    """
    if isinstance(value, list):
        return bool(value)
    text = str(value).strip()
    listed = re.fullmatch(r"\d+,|\d+(\s*,\s*\d+)+", text)
    counted = re.fullmatch(r"0*\d{1,4}", text) and 1 <= int(text) <= MAX_DEVICES
    return text in ("auto", "-1") or bool(listed or counted)


_COUNT = (_is_count, f"1 or more, up to {2**31 - 1}")
_SHARE = (_is_share, "a fraction from 0.0 to 1.0, or a number of batches")

_PROFILERS = ("simple", "advanced", "pytorch", "xla")

# trainer key -> (test of a value that is not null, description of the accepted values). Lightning
# accepts other values, and ignores them or divides by zero.
_TRAINER_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "devices": (
        _is_devices,
        f"a number from 1 to {MAX_DEVICES}, -1 for all, auto, or indices such as 0,1",
    ),
    "num_nodes": _COUNT,
    "accumulate_grad_batches": _COUNT,
    "max_epochs": (lambda v: v >= 1 or v == -1, "1 or more, or -1 for no limit"),
    "max_steps": (lambda v: v >= 1 or v == -1, "1 or more, or -1 for no limit"),
    "max_time": (_is_time, "days:hours:minutes:seconds above 0, e.g. 00:01:00:00"),
    "check_val_every_n_epoch": (lambda v: v >= 1, "1 or more"),
    "val_check_interval": (
        lambda v: _is_time(v) if isinstance(v, str | dict) else v != 0 and _is_share(v),
        "a fraction of an epoch up to 1.0, a number of batches, or days:hours:minutes:seconds",
    ),
    "log_every_n_steps": (lambda v: v >= 0, "1 or more, or 0 for never"),
    "gradient_clip_val": (lambda v: v >= 0, "a number from 0"),
    "limit_train_batches": _SHARE,
    "limit_val_batches": _SHARE,
    "limit_test_batches": _SHARE,
    "limit_predict_batches": _SHARE,
    "overfit_batches": _SHARE,
    "num_sanity_val_steps": (lambda v: v >= -1, "0 or more, or -1 for all"),
    "fast_dev_run": (lambda v: v >= 0, "true, false, or a number of batches from 0"),
    "gradient_clip_algorithm": (lambda v: v.lower() in ("norm", "value"), "norm or value"),
    "profiler": (
        lambda v: not isinstance(v, str) or v.lower() in _PROFILERS,
        f"{', '.join(_PROFILERS)} or null",
    ),
    "reload_dataloaders_every_n_epochs": (lambda v: v >= 0, "0 or more"),
    "barebones": (lambda v: not v, "false: a fit needs its record"),
}


def check_run(verb: str, config: Any) -> None:
    """Check the keys of a parsed configuration outside of the `model:` and `data:` sections.

    Args:
        verb: fit, validate, test or predict.
        config: the configuration of the verb.

    Raises:
        UserError: a value out of range, or a fit without an end.
    """
    seed = config.seed_everything
    if seed is False or (seed is not True and not 0 <= seed < 2**32):
        raise UserError(f"seed_everything: got {seed}, pass an integer from 0 to {2**32 - 1}")
    if config.checkpoint_every_n_steps < 0:
        raise UserError(
            f"checkpoint_every_n_steps: got {config.checkpoint_every_n_steps}, pass 1 or more, "
            "or 0 for a checkpoint at every epoch only"
        )
    trainer = config.trainer
    if verb == "fit" and config.checkpoint_every_n_steps and trainer.enable_checkpointing is False:
        raise UserError(
            f"checkpoint_every_n_steps: got {config.checkpoint_every_n_steps}, but "
            "trainer.enable_checkpointing is false; omit one of them"
        )
    for key, (fits, accepted) in _TRAINER_RANGES.items():
        if trainer[key] is not None and not fits(trainer[key]):
            raise UserError(f"trainer.{key}: got {trainer[key]}, pass {accepted}")
    if trainer.gradient_clip_algorithm is not None and trainer.gradient_clip_val is None:
        raise UserError(
            f"trainer.gradient_clip_algorithm: got {trainer.gradient_clip_algorithm}, but no "
            "gradient is clipped; pass trainer.gradient_clip_val, or omit it"
        )
    for least, most in (("min_epochs", "max_epochs"), ("min_steps", "max_steps")):
        if trainer[least] is not None and -1 != (trainer[most] or -1) < trainer[least]:
            raise UserError(
                f"trainer.{least}: got {trainer[least]}, but trainer.{most} is {trainer[most]}"
            )
    for flag in ("wandb", "tensorboard"):
        if verb == "fit" and config[flag] and trainer.logger not in (None, True):
            raise UserError(
                f"{flag}: got true, but trainer.logger replaces the loggers of a fit; omit "
                "trainer.logger, or add the logger to it"
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
