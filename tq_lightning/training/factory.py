"""What a run trains, from its hyper-parameters: the model, its quantizers, and its teacher."""

from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import nn

from tq_lightning.errors import UserError
from tq_lightning.models import create_model
from tq_lightning.quant.config import QuantConfig
from tq_lightning.quant.prepare import PrepareReport, apply_config
from tq_lightning.quant.switchable_norm import train_float_norms
from tq_lightning.training.validation import as_list


def build_model(h: Any) -> nn.Module:
    """The float model that `h` names, with the weights it starts from. Raises as `create_model`.

    `h.model_args` then holds the dropout rates too: with it the model can be built again from a checkpoint.
    """
    rates = {key: h[key] for key in ("drop_rate", "drop_path_rate") if h[key] is not None}
    h.model_args = {**(h.model_args or {}), **rates}
    return create_model(h.name, h.num_classes, h.pretrained, h.checkpoint_path, **h.model_args)


def build_teacher(h: Any) -> nn.Module | None:
    """The external teacher that `h` names, frozen; None where it names none.

    Raises:
        UserError: timm's weights are for another number of classes, and a fresh head would teach noise; or as `create_model`.
    """
    if h.teacher_name is None:
        return None
    path = h.teacher_checkpoint_path
    known = get_pretrained_cfg(h.teacher_name)
    if path is None and known is not None and known.num_classes != h.num_classes:
        raise UserError(
            f"model.teacher_name: the weights of {h.teacher_name} are for {known.num_classes} classes, the data has "
            f"{h.num_classes}; pass model.teacher_checkpoint_path"
        )
    try:
        return (
            create_model(h.teacher_name, h.num_classes, path is None, path)
            .eval()
            .requires_grad_(False)
        )
    except UserError as error:
        raise UserError(
            f"the teacher (model.teacher_name, model.teacher_checkpoint_path): {error}"
        ) from None


def prepare_model(
    model: nn.Module, h: Any, widths: tuple[int, ...], verbose: bool
) -> PrepareReport:
    """Prepares `model` in place as `h` says.

    Raises:
        UserError: a choice that `prepare` does not know, or a layer that it can't treat.
    """
    try:
        config = QuantConfig.from_mapping({**h, "widths": widths, "skip": as_list(h.skip)})
        report = apply_config(model, config)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    if verbose:
        print(report)
    if h.float_pass:
        train_float_norms(model)
    if h.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return report
