"""Build the float model and the teacher of a run from its hyperparameters."""

from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg
from torch import nn

from tq_lightning.errors import UserError
from tq_lightning.factories import is_factory
from tq_lightning.models import check_local, create_model, is_remote


def classes_of_data(name: str, data: Any) -> int | None:
    """Return the number of classes of the data, for a model whose `num_classes` is null.

    Args:
        name: name of a model, or a factory, which may not need the number.
        data: the data module, or None.

    Raises:
        UserError: no data set was given, or it has no number of classes and the model needs one.
    """
    if data is None:
        raise UserError(
            "model.num_classes is null, and no data set was given; pass model.num_classes"
        )
    classes: int | None = getattr(data, "num_classes", None)
    if classes is None and not is_factory(name):
        raise UserError(
            "model.num_classes is null, and the data set has no number of classes; "
            "pass model.num_classes"
        )
    return classes


def build_model(hparams: Any, start_weights: bool = True) -> nn.Module:
    """Create the float model `hparams.name` and load the weights that it starts from.

    Adds the dropout rates to `hparams.model_args`, and replaces a name such as `hf-hub:...` by that
    of the architecture, so that the model can be rebuilt from a checkpoint.

    Args:
        hparams: hyperparameters of a TQModule.
        start_weights: False leaves the weights random, for a checkpoint to replace them.

    Raises:
        UserError: see `create_model`, or `check_local` without `start_weights`.
    """
    # factory names were compared by the parser
    if not start_weights and not is_factory(hparams.name):
        check_local(hparams.name, "the checkpoint")
    rates = {key: hparams[key] for key in ("drop_rate", "drop_path_rate")}
    given_rates = {key: rate for key, rate in rates.items() if rate is not None}
    hparams.model_args = {**(hparams.model_args or {}), **given_rates}
    pretrained = hparams.pretrained if start_weights else False
    path = hparams.checkpoint_path if start_weights else None
    if path is not None and not Path(path).is_file():
        raise UserError(f"model.checkpoint_path: no checkpoint at {path}; pass a file")
    model = create_model(hparams.name, hparams.num_classes, pretrained, path, **hparams.model_args)
    if is_remote(hparams.name):
        # the checkpoint stores the architecture, so that loading it does not need the hub
        fetched = {k: v for k, v in getattr(model, "_model_args", {}).items() if k != "num_classes"}
        architecture = model.pretrained_cfg["architecture"]  # type: ignore[index]
        hparams.name, hparams.model_args = architecture, {**fetched, **hparams.model_args}
    return model


def check_teacher(hparams: Any) -> None:
    """Check the external teacher before any model is built.

    Raises:
        UserError: its file of weights does not exist, or timm's weights have another number of
            classes (a new classifier would be random).
    """
    if hparams.teacher_name is None:
        return
    path = hparams.teacher_checkpoint_path
    if path is not None and not Path(path).is_file():
        raise UserError(f"model.teacher_checkpoint_path: {path} does not exist; pass a file")
    known = get_pretrained_cfg(hparams.teacher_name)
    if path is None and known is not None and known.num_classes != hparams.num_classes:
        raise UserError(
            f"model.teacher_name: the weights of {hparams.teacher_name} have {known.num_classes} "
            f"classes, the data has {hparams.num_classes}; pass model.teacher_checkpoint_path"
        )


def build_teacher(hparams: Any) -> nn.Module | None:
    """Create the frozen teacher model `hparams.teacher_name`, or return None if it is not set.

    Raises:
        UserError: see `create_model`.
    """
    if hparams.teacher_name is None:
        return None
    path = hparams.teacher_checkpoint_path
    try:
        teacher = create_model(hparams.teacher_name, hparams.num_classes, path is None, path)
    except UserError as error:
        raise UserError(
            f"the teacher (model.teacher_name, model.teacher_checkpoint_path): {error}"
        ) from None
    return teacher.eval().requires_grad_(False)
