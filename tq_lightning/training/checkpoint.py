"""A trained network from its checkpoint, for those who serve or score it without a Trainer."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tq_lightning.errors import UserError, first_line
from tq_lightning.models import create_model
from tq_lightning.training.module import TQModule


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
        raise UserError(f"checkpoint {path} does not exist; pass a .ckpt file of a run, e.g. RUN/checkpoints/last.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        hparams = {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}
        state = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}
        name, classes, args = (hparams[key] for key in ("name", "num_classes", "model_args"))
        module = TQModule(**{**hparams, "pretrained": False, "checkpoint_path": None, "teacher": "none", "compile": False})
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is no checkpoint of a run ({first_line(error)}); pass a .ckpt file that `fit` wrote") from None
    model = create_model(name, classes, **(args or {}))
    module.attach(model)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own configuration ({first_line(error)})") from None
    return model.eval(), hparams, checkpoint.get("preprocessing", {})
