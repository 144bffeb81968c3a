"""Comparison of the data and arithmetic of an evaluation with those of its run."""

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.data import sized_len

from tq_lightning.callbacks.setting_changes import is_same

# keys that must match for an evaluation to count as one of the run's own data
DATA_KEYS = ("name", "root", "data_args", "image_size", "mean", "std", "interpolation", "crop_pct")
# synthetic images depend on these too; for other data they only select training images
SYNTHETIC_KEYS = ("samples", "num_classes")
_ARITHMETIC = ("precision", "plugins")


def part_of_split(batches: Sequence[float], loaders: Any) -> int | None:
    """Return the number of batches of an evaluation, or None if it reads every batch.

    Args:
        batches: batches to read of each loader; infinite without a limit if it has no length.
        loaders: the loader, or a list of them.
    """
    loaders = loaders if isinstance(loaders, list) else [loaders]
    sizes = [float("inf") if (size := sized_len(x)) is None else size for x in loaders]
    return None if list(batches) == sizes else int(sum(batches))


def other_settings(
    trained: dict[str, Any], given: dict[str, Any], part: int | None = None
) -> list[str]:
    """Return the settings by which an evaluation is not one of the run's own data.

    Args:
        trained: configuration of the run.
        given: configuration of the evaluation.
        part: return value of `part_of_split`.
    """
    one, two = (config.get("data") or {} for config in (trained, given))
    synthetic = {"name": "synthetic"}.items() <= two.items()
    keys = DATA_KEYS + (SYNTHETIC_KEYS if synthetic else ())
    other = [] if part is None else ["a part of the split"]
    other += [key for key in keys if not is_same(one.get(key), two.get(key))]
    one, two = (config.get("trainer") or {} for config in (trained, given))
    if precision_name(one.get("precision")) != precision_name(two.get("precision")):
        other.append("precision")
    return [*other, "plugins"] if one.get("plugins") != two.get("plugins") else other


def describe(other: list[str]) -> str:
    """Return a result of `other_settings` in words, for a line "not a test of ..."."""
    own = "settings" if set(other) & set(_ARITHMETIC) else "data"
    return f"the run's own {own} ({', '.join(other)})"


def precision_name(value: Any) -> str:
    """Return the one name that Lightning gives to a precision, e.g. 32-true for 32 and null."""
    short = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "None": "32-true"}
    return short.get(str(value), str(value))
