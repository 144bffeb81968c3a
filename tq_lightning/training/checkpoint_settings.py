"""Settings of a checkpoint and its run: compare them with the given ones, which they override."""

import inspect
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from tq_lightning.callbacks.own_data import DATA_KEYS, SYNTHETIC_KEYS
from tq_lightning.errors import UserError
from tq_lightning.factories import is_factory
from tq_lightning.quant.config import QuantConfig
from tq_lightning.records import NAME, Record, read_record
from tq_lightning.records.publish import flatten
from tq_lightning.training.ckpt_path import ResolvedPath
from tq_lightning.training.lists import as_list
from tq_lightning.training.module import TQModule
from tq_lightning.training.run_folder import CONFIG

# data keys that define the validation images and how they are read
_VALIDATION_KEYS = (*(key for key in DATA_KEYS if key != "root"), "val_fraction")


def check_settings(
    verb: str, resolved: ResolvedPath, root: Path, given: dict[str, Any], config: Any
) -> list[str]:
    """Check the settings of a loaded checkpoint, and keep the seed of a resumed run, in place.

    Args:
        verb: fit, validate, test or predict.
        resolved: return value of `resolve_ckpt_path`.
        root: trainer.default_root_dir.
        given: the `model:` section of the command line and files.
        config: the configuration of the verb, with the model settings of the checkpoint.

    Returns:
        The given model settings that the checkpoint overrides.

    Raises:
        UserError: a factory that was not given, other data than that of the run, or another run
            than the configuration describes.
    """
    kept, checkpoint = config.model.as_dict(), resolved.checkpoint
    check_factories(given, kept, config.ckpt_path)
    if verb == "fit" and checkpoint is not None:
        _check_newest(resolved, root, given, config)
        if resolved.continues_run:
            check_same_data(config, checkpoint.run)
            keep_seed(config, checkpoint.run)
    return overridden_arguments(given, kept)


def _check_newest(resolved: ResolvedPath, root: Path, given: dict[str, Any], config: Any) -> None:
    """Check that `last` or `best` resumes the run that the configuration describes.

    The newest of several runs may be another one, e.g. if the run that is meant has no checkpoint.
    A fit with --run_dir names its run, and is not checked.

    Args:
        resolved: return value of `resolve_ckpt_path`.
        root: trainer.default_root_dir.
        given: the `model:` section of the command line and files.
        config: the configuration of the fit, with the model settings of the checkpoint.

    Raises:
        UserError: `root` has several runs, and settings of the newest one differ.
    """
    checkpoint = resolved.checkpoint
    if resolved.run_dir is not None or checkpoint is None:
        return
    network = {key: given[key] for key in network_keys()}
    differing = _differences(checkpoint.run, config)
    differing += overridden_arguments(network, config.model.as_dict())
    several = len(list(root.glob(f"*/{CONFIG}"))) > 1
    if checkpoint.given in ("last", "best") and several and differing:
        raise UserError(
            f"ckpt_path={checkpoint.given}: the newest of several runs under {root} is "
            f"{checkpoint.run}, with {'; '.join(differing)}; pass --ckpt_path {checkpoint.path} "
            "to resume it, or the checkpoint of another run"
        )


def network_keys() -> list[str]:
    """Return the `model:` keys that define the quantized network, unlike e.g. a learning rate."""
    return ["name", "model_args", "task", *(field.name for field in fields(QuantConfig))]


def _record_of(run: Path | None) -> Record | None:
    """Read the record of a run; None if there is no run, or it has none yet."""
    path = None if run is None else run / NAME
    return read_record(path) if path is not None and path.is_file() else None


def _differences(run: Path | None, config: Any) -> list[str]:
    """List the seed and the data set of a run that differ from those of a configuration."""
    record = _record_of(run)
    if record is None:
        return []
    theirs = {
        "seed_everything": record.seed,
        "data.name": flatten(record.config).get("data.name"),
    }
    return [
        f"{key}={value}, not {config[key]}"
        for key, value in theirs.items()
        if value is not None and str(value) != str(config[key])
    ]


def check_same_data(config: Any, run: Path | None) -> None:
    """Check that a resumed fit reads the data of its run, whose record has one data set.

    Other settings may change, and the record lists them. These may not: the scores of the epochs
    would not be comparable, and the best one could be of either data.

    Raises:
        UserError: another data set, other arguments of it, or other validation images.
    """
    record = _record_of(run)
    data = {} if record is None else record.config.get("data") or {}
    keys = _VALIDATION_KEYS + (SYNTHETIC_KEYS if config.data.name == "synthetic" else ())
    for key in keys:
        if key in data and data[key] != config.data[key]:
            raise UserError(
                f"data.{key}: got {config.data[key]}, but {run} was trained with {data[key]}; pass "
                "the same data, or the checkpoint file and a new --run_dir"
            )


def keep_seed(config: Any, run: Path | None) -> None:
    """Replace a different seed of a resumed fit by the seed in the record of its run, in place.

    The weights come from that seed. Within an epoch, another seed is an error instead.
    """
    record = _record_of(run)
    seed = None if record is None else record.seed
    if seed is not None and seed != config.seed_everything:
        print(
            f"the run keeps its seed: seed_everything={seed}, not {config.seed_everything}",
            file=sys.stderr,
            flush=True,
        )
        config.seed_everything = seed


def overridden_arguments(given: dict[str, Any], kept: dict[str, Any]) -> list[str]:
    """List the model arguments that a checkpoint overrides, as `key=value, not value`.

    Args:
        given: the `model:` section of the command line and files. Default values do not count.
        kept: the same section with the values of the checkpoint.
    """
    defaults = {key: p.default for key, p in inspect.signature(TQModule).parameters.items()}
    return [
        f"model.{key}={kept[key]}, not {value}"
        for key, value in given.items()
        if key in kept
        and not _same(value, defaults.get(key), key)
        and not _same(value, kept[key], key)
    ]


def check_factories(given: dict[str, Any], kept: dict[str, Any], path: Any) -> None:
    """Check that every factory in a checkpoint was also passed by the user.

    A factory is imported code, so a file must not be able to select it.

    Args:
        given: the `model:` section of the user.
        kept: the same section with the values of the checkpoint.
        path: path of the checkpoint, for the message.

    Raises:
        UserError: the checkpoint names a factory that the user did not pass.
    """
    for key in ("name", "teacher_name"):
        if is_factory(kept[key]) and kept[key] != given[key]:
            raise UserError(
                f"ckpt_path: {path} names the factory {kept[key]}, which is not imported "
                f"automatically; pass --model.{key} {kept[key]}"
            )


def _same(one: Any, two: Any, key: str) -> bool:
    if isinstance(one, dict) and isinstance(two, dict):
        return one.items() <= two.items()  # model_args of a checkpoint include the dropout rates
    return [str(v) for v in as_list(one, f"model.{key}")] == [str(v) for v in as_list(two)]
