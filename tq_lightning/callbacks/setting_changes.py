"""Settings of a run that changed when it was resumed, for its record."""

from typing import Any

from torch import nn

from tq_lightning.callbacks.truncation_eval import CALIBRATION
from tq_lightning.files import expand_path
from tq_lightning.quant.switchable_norm import untrained_widths
from tq_lightning.records import Change, Record

_SECTIONS = ("trainer", "data")  # the model section of a resumed run is that of its checkpoint
_ENVIRONMENT = ("device", "processes", "commit")


def changes_at(earlier: Record, now: Record, epoch: int, step: int) -> list[Change] | None:
    """Return the changes of a run that resumes.

    A change at the step of the resume, or after it, is undone first: no step that remains was
    trained with it.

    Args:
        earlier: the record before the resume.
        now: the record after it.
        epoch: completed epochs of the checkpoint.
        step: its optimizer steps. At step 0 nothing was trained yet.

    Returns:
        The changes in the order of their steps, or None.
    """
    if step == 0:
        return None
    recorded, before, after = earlier.changes or [], _settings(earlier), _settings(now)
    for change in reversed(recorded):
        if change.step >= step:
            before[change.key] = change.before
    kept = [change for change in recorded if change.step < step]
    new = [
        Change(key, epoch, step, before[key], value)
        for key, value in after.items()
        if key in before and not is_same(before[key], value)
    ]
    return [*kept, *new] or None


def _settings(record: Record) -> dict[str, Any]:
    """Return the recorded settings by dotted key, without those that old records lack."""
    out = {
        f"{section}.{key}": value
        for section in _SECTIONS
        for key, value in (record.config.get(section) or {}).items()
    }
    known = {key: getattr(record, key) for key in _ENVIRONMENT}
    known |= {f"versions.{name}": version for name, version in record.versions.items()}
    return out | {key: value for key, value in known.items() if value is not None}


def calibration_of(earlier: Record, model: nn.Module) -> str | None:
    """Return the calibration of a run, or both if earlier epochs used another one."""
    now = CALIBRATION if untrained_widths(model) else None
    if earlier.calibration == now or not earlier.curves:
        return now
    if earlier.calibration is not None and earlier.calibration.endswith(f", then {now}"):
        return earlier.calibration
    return f"{earlier.calibration or 'not augmented'}, then {now}"


def is_same(one: Any, two: Any) -> bool:
    """Return True for equal values and for two forms of the same path."""
    if isinstance(one, str) and isinstance(two, str) and one and two:
        return one == two or expand_path(one).resolve() == expand_path(two).resolve()
    return bool(one == two)
