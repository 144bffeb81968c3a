"""Validation of the `model:` keys, before any model is built."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tq_lightning.errors import UserError, did_you_mean
from tq_lightning.models import check_arguments, check_name
from tq_lightning.quant.config import check_widths
from tq_lightning.records import TASKS
from tq_lightning.training.compiling import COMPILE_MODES
from tq_lightning.training.lists import as_floats, as_ints, as_list
from tq_lightning.training.losses import LOSSES, TEACHERS
from tq_lightning.training.optim import SCHEDULES, check_optimizer
from tq_lightning.training.width_schedules import WIDTH_SCHEDULES

CHOICES: dict[str, tuple[str, ...]] = {
    "task": tuple(TASKS),
    "loss": tuple(LOSSES),
    "teacher": TEACHERS,
    "width_schedule": tuple(WIDTH_SCHEDULES),
    "sched": SCHEDULES,
    "compile_mode": COMPILE_MODES,
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


def check_hparams(hparams: Any) -> None:
    """Check the hyperparameters of a TQModule.

    Raises:
        UserError: a value that is unknown or out of range; the message names the key.
    """
    for key, known in CHOICES.items():
        if hparams[key] not in known:
            hint = did_you_mean(hparams[key], known)
            raise UserError(
                f"model.{key}: got {hparams[key]!r}, pass one of {', '.join(known)}{hint}"
            )
    for key, (fits, accepted) in _RANGES.items():
        if not fits(hparams[key]):
            raise UserError(f"model.{key}: got {hparams[key]}, pass {accepted}")
    for key in ("name", "teacher_name"):
        if hparams[key] is not None:
            try:
                check_name(hparams[key])
            except UserError as error:
                raise UserError(f"model.{key}: {error}") from None
    check_arguments(hparams.model_args)
    if hparams.task == "language_modeling" and hparams.loss != "cross_entropy":
        raise UserError(
            f"model.loss: got {hparams.loss!r}, which is for classification; pass cross_entropy "
            "with model.task=language_modeling"
        )
    if hparams.teacher == "external" and hparams.teacher_name is None:
        raise UserError("model.teacher=external needs a teacher model: pass model.teacher_name")
    if min(as_floats(hparams.decay_epochs, "model.decay_epochs"), default=0.0) <= 0.0:
        raise UserError(
            f"model.decay_epochs: got {hparams.decay_epochs!r}, pass epochs above 0, e.g. "
            "100,150,180"
        )
    check_optimizer(hparams)


def check_fit_keys(hparams: Any) -> None:
    """Check the keys that only a fit uses against each other; checkpoints with others still load.

    Raises:
        UserError: a key contradicts another one, or has no effect beside it.
    """
    rates = ("min_lr", "warmup_lr") if hparams.warmup_epochs else ("min_lr",)
    for key in rates:
        if hparams.sched != "none" and hparams[key] > hparams.lr:
            raise UserError(
                f"model.{key}: got {hparams[key]:g}, which is above model.lr={hparams.lr:g}; pass "
                "at most that"
            )
    decays = as_floats(hparams.decay_epochs, "model.decay_epochs")
    if hparams.sched == "step" and len(decays) > 1:
        raise UserError(
            f"model.decay_epochs: got {hparams.decay_epochs!r}, but model.sched=step has one "
            "interval; pass one number, or model.sched=multistep"
        )
    for key in ("lr", "weight_decay", "momentum"):
        if key in (hparams.opt_args or {}):
            raise UserError(f"model.opt_args: got {key}; pass it as model.{key} instead")
    inner = len(as_ints(hparams.widths, "model.widths")) + bool(hparams.float_pass) - 2
    # the default is 1
    if hparams.width_schedule == "sandwich" and hparams.sandwich_random > max(1, inner):
        raise UserError(
            f"model.sandwich_random: got {hparams.sandwich_random}, but there are {inner} passes "
            "between the widest and the narrowest; pass at most that number, or "
            "model.width_schedule=all"
        )
    if hparams.teacher_checkpoint_path is not None and hparams.teacher_name is None:
        raise UserError(
            f"model.teacher_checkpoint_path: got {hparams.teacher_checkpoint_path}, which needs a "
            "teacher model; pass model.teacher_name"
        )


def quant_choices(hparams: Any) -> dict[str, Any]:
    """Return the hyperparameters with the lists of a `QuantConfig` parsed, which may be text.

    Raises:
        UserError: a list cannot be parsed, widths are out of range, or `float_pass` is unknown.
    """
    widths = as_ints(hparams.widths, "model.widths")
    skip = as_list(hparams.skip, "model.skip")
    shared = as_list(hparams.shared_norms, "model.shared_norms")
    if hparams.float_pass not in (True, False, "normalized"):
        raise UserError(
            f"model.float_pass: got {hparams.float_pass!r}, pass true, false or normalized"
        )
    float_pass = "normalized" if hparams.float_pass == "normalized" else "plain"
    try:
        check_widths(widths, hparams.max_bits)
    except ValueError as error:
        key = "max_bits" if str(error).startswith("max_bits") else "widths"
        raise UserError(f"model.{key}: {error}") from None
    lists = {"widths": widths, "skip": skip, "shared_norms": shared, "float_pass": float_pass}
    return hparams | lists


@contextmanager
def naming_model_keys(hparams: Any) -> Iterator[None]:
    """Raise the ValueError of a `QuantConfig` as a UserError that names the key.

    The message of the ValueError begins with the key, e.g. "unknown level 'x'" or "level 'x' is not
    supported with ...".
    """
    try:
        yield
    except ValueError as error:
        key = str(error).removeprefix("unknown ").split(maxsplit=1)[0]
        where = f"model.{key}" if key in hparams else "model"
        raise UserError(f"{where}: {error}") from None


def pass_weights(width_weights: Any, passes: Sequence[int | None]) -> dict[int | None, float]:
    """Return {pass: weight of its loss}.

    Args:
        width_weights: `model.width_weights`, as a list or text; None is 1 for each pass.
        passes: passes in the order of `width_weights`.

    Raises:
        UserError: not one weight for each pass, a negative weight, or only zeros.
    """
    if width_weights is None:
        return dict.fromkeys(passes, 1.0)
    weights = as_floats(width_weights, "model.width_weights")
    if len(weights) != len(passes):
        raise UserError(
            f"model.width_weights: got {len(weights)} weights for {len(passes)} passes; "
            "pass one for each"
        )
    if min(weights) < 0 or sum(weights) == 0:
        raise UserError(
            f"model.width_weights: got {width_weights!r}, pass numbers from 0, at least one above 0"
        )
    return dict(zip(passes, weights, strict=True))
