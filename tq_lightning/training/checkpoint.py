"""Rebuild the prepared model of a training checkpoint."""

from pathlib import Path
from typing import Any

from torch import nn

from tq_lightning.errors import UserError
from tq_lightning.factories import only_allow
from tq_lightning.models import check_local, create_model
from tq_lightning.models.weights import check_fit, load_torch_file, why_not_loaded
from tq_lightning.training.checkpoint_io import verify_checkpoint
from tq_lightning.training.module import TQModule


def load_checkpoint_model(
    path: str | Path, model: nn.Module | str | None = None
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Rebuild the prepared model of a training checkpoint, to run or evaluate it without a Trainer.

    Args:
        path: a .ckpt file written by `fit`. It is loaded with `weights_only=True`, so it can't run
            code.
        model: for your own network: the float network, or the same factory name as in the
            checkpoint. A factory is never imported just because the checkpoint names it.

    Returns:
        (model, hparams, preprocessing). The model is on the CPU, in evaluation mode, with the
        norms of all widths. `hparams` is the `model:` section that it was trained with.
        `preprocessing` has the keys input_size, mean, std, interpolation, crop_pct, classes; or,
        for other inputs than images, `inputs`, see `quant.input_spec.describe_inputs`, and
        `classes` if they have names.

    Raises:
        UserError: the file does not exist, is not a training checkpoint, names a model on a hub,
            or has weights that do not fit its configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"checkpoint {path} does not exist; pass a .ckpt file of a run, "
            "e.g. RUN/checkpoints/last.ckpt"
        )
    verify_checkpoint(path)
    try:
        checkpoint = load_torch_file(path)
        hparams = {k: v for k, v in checkpoint["hyper_parameters"].items() if not k.startswith("_")}
        state = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}
        name, classes, args = (hparams[key] for key in ("name", "num_classes", "model_args"))
        check_local(name, path)
        unused = {"pretrained": False, "checkpoint_path": None, "teacher": "none", "compile": False}
        module = TQModule(**{**hparams, **unused})
        if isinstance(model, str) and model != name:
            raise UserError(f"{path} is a checkpoint of {name}, got model {model}")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} is not a training checkpoint ({why_not_loaded(error)}); "
            "pass a .ckpt file written by fit"
        ) from None
    if not isinstance(model, nn.Module):
        with only_allow(model, path):
            model = create_model(name, classes, **(args or {}))
    module.attach(model)
    check_fit(state, model, path, "its own configuration")
    model.load_state_dict(state)
    seen = checkpoint.get("preprocessing") or {}
    if "inputs" in checkpoint:
        seen = {**seen, "inputs": checkpoint["inputs"]}
    return model.eval(), hparams, seen
