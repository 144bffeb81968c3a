"""Training checkpoints: rebuild the model, find the newest file, and read its progress."""

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from tq_lightning.errors import UserError
from tq_lightning.factories import is_factory, only_allow
from tq_lightning.models import check_local, create_model
from tq_lightning.models.weights import check_fit, load_torch_file, why_not_loaded
from tq_lightning.records import NAME
from tq_lightning.training.checkpoint_io import verify_checkpoint
from tq_lightning.training.lists import as_list
from tq_lightning.training.module import TQModule
from tq_lightning.training.resume_guard import inside_accumulation, saved_batches
from tq_lightning.training.run_folder import CONFIG, LAST
from tq_lightning.training.trainer_validation import Progress


def load_checkpoint_model(
    path: str | Path, model: nn.Module | str | None = None
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Rebuild the prepared model of a training checkpoint, to run or evaluate it without a Trainer.

    Args:
        path: a .ckpt file written by `fit`. It is loaded with `weights_only=True`, so it can't run
            code.
        model: for a network of your own: the float network, or the same factory name as in the
            checkpoint. A factory is never imported from the checkpoint alone.

    Returns:
        (model, hparams, preprocessing). The model is on the CPU, in evaluation mode, with the
        norms of all widths. `hparams` is the `model:` section that it was trained with.
        `preprocessing` has the keys input_size, mean, std, interpolation, crop_pct, classes; or,
        for other inputs than images, `inputs`, see `quant.inputs.describe_inputs`.

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


def newest_checkpoint(root: Path, which: str, run_dir: Path | None = None) -> Path:
    """Return the "last" or "best" checkpoint of the newest run under `root`, or of `run_dir`.

    Raises:
        UserError: the checkpoint does not exist.
    """
    pattern = LAST if which == "last" else "checkpoints/best*.ckpt"
    if run_dir is None:
        pattern = f"*/{pattern}"
    else:
        root = run_dir
    found = sorted(root.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(
            f"ckpt_path={which}: no {pattern} under {root}; pass a checkpoint file, or the "
            "trainer.default_root_dir of the run"
        )
    return found[-1]


def run_folder(path: Path) -> Path | None:
    """Return the run folder of a checkpoint: RUN of RUN/checkpoints/FILE.

    Return None if the file is elsewhere, or if RUN has neither a record nor a configuration.
    """
    folder = path.absolute().parent
    run = path.parent.parent
    if folder.name != "checkpoints":
        return None
    return run if (run / NAME).is_file() or (run / CONFIG).is_file() else None


def read_progress(path: Path) -> Progress:
    """Read the step and the epochs of a training checkpoint.

    Raises:
        UserError: the file is not a training checkpoint, or parts of it are missing.
    """
    verify_checkpoint(path)
    try:
        # mmap avoids reading the weights; formats that do not support it were not written by fit
        checkpoint = load_torch_file(path, mmap=True)
        if not all(isinstance(checkpoint[key], dict) for key in ("state_dict", "hyper_parameters")):
            raise TypeError("no state dict or no hyperparameters")
        epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        return Progress(
            int(checkpoint["global_step"]),
            int(epochs),
            saved_batches(checkpoint),
            inside_accumulation(checkpoint),
        )
    except Exception as error:
        raise UserError(
            f"ckpt_path: {path} is not a training checkpoint ({why_not_loaded(error)}); "
            "pass last, best, or a .ckpt file"
        ) from None


def checkpoint_step(path: Path) -> int:
    """Return the optimizer step of a training checkpoint. Raises as `read_progress`."""
    return read_progress(path).step


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

    A factory is imported code, so a file alone must not select it.

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
