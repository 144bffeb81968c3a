"""Validation of the `data:` keys."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from tq_lightning.data.datasets import DATASETS
from tq_lightning.errors import UserError
from tq_lightning.factories import is_factory

_COUNT, _SHARE, _STRENGTH = (1, 10**9), (0.0, 1.0), (0.0, 1000.0)
_RANGES: dict[str, tuple[float, float]] = {
    "num_classes": (2, 10**9),
    "image_size": (1, 8192),
    "batch_size": _COUNT,
    "eval_batch_size": _COUNT,
    "samples": _COUNT,
    "workers": (0, 1024),
    "pad": (0, 1024),
    "val_fraction": (0.0, 0.9),
    "crop_pct": (0.01, 1.0),
    "scale": (0.001, 1.0),
    "hflip": _SHARE,
    "reprob": _SHARE,
    "smoothing": (0.0, 0.99),
    "mixup": _STRENGTH,
    "cutmix": _STRENGTH,
    "color_jitter": _STRENGTH,
    "seed": (0, 2**63 - 1),
}
# keys without effect, by whether images are in memory: those are not cropped one by one
_UNUSED = {True: ("train_interpolation", "crop_pct", "scale"), False: ("pad",)}
_CHOICES = {
    "name": (*(name for name in DATASETS if name != "hfds"), "hfds/PATH"),
    "interpolation": ("bilinear", "bicubic"),
    "train_interpolation": ("random", "bilinear", "bicubic"),
    "remode": ("const", "rand", "pixel"),
}


def _is_other(name: str) -> bool:
    """Return True for the name of a factory, or hfds/PATH."""
    return is_factory(name) or (name.startswith("hfds/") and len(name) > 5)


def check_data_options(given: dict[str, Any]) -> None:
    """Check the values of the `data:` keys.

    Args:
        given: value by key, of all arguments of the data module.

    Raises:
        UserError: a value is out of range or unknown, or a combination is not supported. The
            message names the key.
    """
    for key, allowed in _CHOICES.items():
        if given[key] not in allowed and not (key == "name" and _is_other(given[key])):
            own = " or package.module:factory" if key == "name" else ""
            raise UserError(
                f"data.{key}: got {given[key]!r}, pass one of {', '.join(allowed)}{own}"
            )
    if given["data_args"] and not is_factory(given["name"]):
        raise UserError(
            f"data.data_args: got {given['data_args']}, but data.name={given['name']} has no "
            "arguments; omit it, or pass data.name=package.module:factory"
        )
    for key, (low, high) in _RANGES.items():
        if given[key] is not None and not low <= given[key] <= high:
            raise UserError(f"data.{key}={given[key]} is out of range; pass {low} to {high}")
    mixed = any(given[key] for key in ("mixup", "cutmix", "smoothing"))
    if mixed and given["batch_size"] % 2:
        raise UserError(
            f"data.batch_size={given['batch_size']} is odd; pass an even number for mixup, cutmix "
            "and smoothing"
        )
    for key in ("mean", "std"):
        if given[key] is not None and len(given[key]) != 3:
            raise UserError(f"data.{key}: got {given[key]}, pass 3 numbers, one per channel")
    scaled = "pixels are scaled to 0..1, so divide values for 0..255 by 255"
    if given["mean"] is not None and not all(0 <= value <= 1 for value in given["mean"]):
        raise UserError(f"data.mean: got {given['mean']}, pass numbers from 0 to 1; {scaled}")
    if given["std"] is not None and not all(0 < value <= 1 for value in given["std"]):
        raise UserError(f"data.std: got {given['std']}, pass numbers above 0 and up to 1; {scaled}")
    if given["auto_augment"]:
        _check_policy(given["auto_augment"])
    policy = given["auto_augment"] or ""
    if policy and given["color_jitter"] and "3a" not in policy:  # as in timm
        raise UserError(
            f"data.color_jitter={given['color_jitter']} has no effect beside data.auto_augment="
            f"{policy}; omit one of them"
        )


def unused_keys(name: str) -> tuple[str, ...]:
    """Return the keys without effect on a data set.

    Args:
        name: key of `DATASETS`.
    """
    # not data.root: a configuration with one is tried with --data.name synthetic
    return _UNUSED[DATASETS[name]["size"] is not None]


def check_val_fraction(name: str | None, fraction: float, signature: inspect.Signature) -> None:
    """Check that no share of a data set with a validation split was asked for; 0 is accepted.

    Raises:
        UserError: `data.val_fraction` has another value than its default.
    """
    values = {"name": name, "val_fraction": fraction}
    if fraction:
        check_unused(values, signature, ("val_fraction",), ", since there is a validation split")


def check_unused(
    values: Mapping[str, Any], signature: inspect.Signature, keys: Iterable[str], hint: str = ""
) -> None:
    """Check that keys have their defaults: other values would be recorded, but do nothing.

    Args:
        values: value by key, of all arguments of the data module.
        signature: signature of the data module, for the defaults.
        keys: keys without effect on the data set.
        hint: end of the message.

    Raises:
        UserError: a key has another value. The message names it.
    """
    for key in keys:
        if values[key] != signature.parameters[key].default:
            raise UserError(
                f"data.{key}={values[key]} has no effect on the data of data.name="
                f"{values['name']}; omit it{hint}"
            )


def _check_policy(policy: str) -> None:
    """Raise UserError for an auto-augment policy that timm does not support."""
    from timm.data import create_transform

    try:
        create_transform(32, is_training=True, auto_augment=policy)
    except Exception as error:  # timm asserts, or fails on a part of the text
        raise UserError(
            f"data.auto_augment={policy!r} is not a policy of timm ({error or 'unknown'}); "
            "pass e.g. rand-m9-mstd0.5-inc1, original, augmix-m3-w3, or null"
        ) from None
