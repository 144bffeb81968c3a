"""A trained network from its checkpoint, for those who serve or score it without a Trainer."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tq_lightning.errors import UserError, first_line
from tq_lightning.models import create_model
from tq_lightning.training.module import TQModule
from tq_lightning.training.validation import as_list


def load_checkpoint_model(path: str | Path) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Rebuilds the prepared model of a run's checkpoint, with all its norm sets, on the CPU, in evaluation mode.

    Args:
        path: a .ckpt file of a fit. Loaded with `weights_only=True`: it runs no code.

    Returns:
        (model, the `model.*` configuration it was trained with, its preprocessing: input_size, mean, std, interpolation,
        crop_pct, classes).

    Raises:
        UserError: no such file, no checkpoint of a run, or one whose weights do not fit its configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"checkpoint {path} does not exist; pass a .ckpt file of a run, e.g. RUN/checkpoints/last.ckpt"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        hparams = {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}
        state = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}
        name, classes, args = (hparams[key] for key in ("name", "num_classes", "model_args"))
        module = TQModule(
            **{
                **hparams,
                "pretrained": False,
                "checkpoint_path": None,
                "teacher": "none",
                "compile": False,
            }
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} is no checkpoint of a run ({first_line(error)}); pass a .ckpt file that `fit` wrote"
        ) from None
    model = create_model(name, classes, **(args or {}))
    module.attach(model)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit its own configuration ({first_line(error)})"
        ) from None
    return model.eval(), hparams, checkpoint.get("preprocessing", {})


def newest_checkpoint(root: Path, which: str) -> Path:
    """The `last` or `best` checkpoint of the newest run under `root`.

    Raises:
        UserError: there is none; the message says where it was looked for.
    """
    pattern = "*/checkpoints/last.ckpt" if which == "last" else "*/checkpoints/best*.ckpt"
    found = sorted(root.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"ckpt_path={which}: no {pattern} under {root}; pass the file of a checkpoint, or the trainer.default_root_dir "
            "of the run"
        )
    return found[-1]


def checkpoint_step(path: Path) -> int:
    """The optimizer step a checkpoint was written at. Raises UserError for a file that is no checkpoint of a run."""
    try:
        # mmap reads no weights for one number; the files of old that can't be mapped are no checkpoints of ours
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(checkpoint["global_step"])
    except Exception as error:
        reason = first_line(error)
        reason = (
            "not a file that torch.save wrote, or half of one"
            if "mmap" in reason or "zip" in reason
            else reason
        )
        raise UserError(
            f"ckpt_path: {path} is no checkpoint of a run ({reason}); pass last, best, or a .ckpt file"
        ) from None


def overruled(asked: dict[str, Any], kept: dict[str, Any]) -> list[str]:
    """`key=value, not value` for each argument of the model that a checkpoint keeps, though another one was asked for.

    Args:
        asked: the `model:` section as given; what is at its default was not asked for.
        kept: that section with the checkpoint's arguments in it.
    """
    defaults = {key: p.default for key, p in inspect.signature(TQModule).parameters.items()}
    return [
        f"model.{key}={kept[key]}, not {value}"
        for key, value in asked.items()
        if key in kept and not _same(value, defaults.get(key)) and not _same(value, kept[key])
    ]


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, dict) and isinstance(
        two, dict
    ):  # a checkpoint's may hold more: dropout rates
        return one.items() <= two.items()
    return [str(v) for v in as_list(one)] == [str(v) for v in as_list(two)]
