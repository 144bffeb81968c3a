"""What a user may pass for each key of `model:`, in every spelling that command lines and sweep engines send."""

from collections.abc import Sequence
from typing import Any

from tq_lightning.errors import UserError
from tq_lightning.quant.config import check_widths
from tq_lightning.training.losses import LOSSES, TEACHERS
from tq_lightning.training.width_schedules import WIDTH_SCHEDULES

_CHOICES = {"loss": tuple(LOSSES), "teacher": TEACHERS, "width_schedule": tuple(WIDTH_SCHEDULES)}
# key -> (whether a value will do, what to pass)
_RANGES: dict[str, tuple[Any, str]] = {
    "distill_weight": (lambda v: 0.0 <= v <= 1.0, "a share from 0 to 1"),
    "temperature": (lambda v: v > 0.0, "a number above 0"),
    "ema_decay": (
        lambda v: v is None or 0.0 <= v < 1.0,
        "a number from 0 to below 1, or null for no average",
    ),
    "calibration_batches": (lambda v: v >= 1, "1 or more"),
    "sandwich_random": (lambda v: v >= 0, "0 or more"),
    "seed": (lambda v: v is None or v >= 0, "0 or more, or null for the run's"),
}


def as_list(value: Any) -> list:
    """`8,4,2,1`, `[8,4,2,1]`, `8` and their string twins as a list."""
    if isinstance(value, str):
        value = [
            part.strip().strip("'\"")
            for part in value.strip().strip("[]()").split(",")
            if part.strip()
        ]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def as_ints(value: Any, key: str) -> list[int]:
    """`as_list` with whole numbers; a UserError that names `key` where one is none."""
    try:
        return [int(v) for v in as_list(value)]
    except (TypeError, ValueError):
        raise UserError(f"{key}: got {value!r}, pass whole numbers such as 8,4,2,1") from None


def as_floats(value: Any, key: str) -> list[float]:
    """`as_list` with numbers; a UserError that names `key` where one is none."""
    try:
        return [float(v) for v in as_list(value)]
    except (TypeError, ValueError):
        raise UserError(f"{key}: got {value!r}, pass numbers such as 1,0.5,0.5,1") from None


def check(h: Any) -> None:
    """Raises UserError, with the key, for a value of the hyper-parameters `h` that means nothing."""
    for key, known in _CHOICES.items():
        if h[key] not in known:
            raise UserError(f"model.{key}: got {h[key]!r}, pass one of {', '.join(known)}")
    for key, (fits, what) in _RANGES.items():
        if not fits(h[key]):
            raise UserError(f"model.{key}: got {h[key]}, pass {what}")
    if h["teacher"] == "external" and h["teacher_name"] is None:
        raise UserError("model.teacher=external needs a model: pass model.teacher_name")


def trained_widths(widths: Any, max_bits: int) -> tuple[int, ...]:
    """`model.widths` in any spelling as a tuple, widest first; UserError where one is no width."""
    try:
        return check_widths(as_ints(widths, "model.widths"), max_bits)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"model.widths: {error}") from None


def pass_weights(width_weights: Any, passes: Sequence[int | None]) -> dict[int | None, float]:
    """{pass: factor of its loss}; `passes` in the order in which the factors were given. null is 1 each."""
    if width_weights is None:
        return dict.fromkeys(passes, 1.0)
    weights = as_floats(width_weights, "model.width_weights")
    if len(weights) != len(passes):
        raise UserError(
            f"model.width_weights: got {len(weights)} factors for {len(passes)} passes; pass one each"
        )
    return dict(zip(passes, weights, strict=True))


def check_trainer(trainer: Any) -> None:
    """Raises UserError for a strategy of Lightning's that splits a weight over processes, and for steps of no batches."""
    name = type(trainer.strategy).__name__
    if name in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
        raise UserError(
            f"trainer.strategy: {name} shards the weights, and the normalizer needs the maximum of a whole one; pass ddp"
        )
    if trainer.accumulate_grad_batches < 1:
        raise UserError(
            f"trainer.accumulate_grad_batches: got {trainer.accumulate_grad_batches}, pass 1 or more"
        )
