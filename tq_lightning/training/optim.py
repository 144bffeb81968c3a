"""Optimizers and learning-rate schedules by name, from timm's factories."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tq_lightning.errors import UserError, did_you_mean, first_line
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.training.lists import as_floats

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "none")


def check_optimizer(hparams: Any) -> None:
    """Check `hparams.opt` and `hparams.opt_args` on a single parameter.

    Raises:
        UserError: a name or an argument that timm does not accept; the message names the key.
    """
    from timm.optim import list_optimizers

    known = [str(name) for name in list_optimizers()]
    if hparams.opt.split("_", 1)[-1].lower() not in known and hparams.opt.lower() not in known:
        hint = did_you_mean(hparams.opt, known) or "; timm.optim.list_optimizers() lists the names"
        raise UserError(f"model.opt: got {hparams.opt!r}{hint}")
    with torch.random.fork_rng(devices=[]):  # must not change the initial weights of the run
        _create(nn.Linear(1, 1), hparams)


def optimizer_and_schedule(model: nn.Module, hparams: Any, trainer: L.Trainer) -> dict[str, Any]:
    """Create the optimizer and the schedule of a training, in the form of Lightning.

    Raises:
        UserError: see `build_optimizer` and `build_scheduler`.
    """
    optimizer = build_optimizer(model, hparams)
    scheduler = build_scheduler(optimizer, hparams, trainer)
    if scheduler is None:
        return {"optimizer": optimizer}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def build_optimizer(model: nn.Module, hparams: Any) -> torch.optim.Optimizer:
    """Create timm's optimizer `hparams.opt` over the trainable parameters of `model`.

    Biases, norms, learned ranges and the parameters that the model itself excludes (position
    embeddings, for example) have no weight decay. As in timm, "sgd" uses Nesterov momentum; with a
    momentum of 0 it is plain SGD.

    Raises:
        UserError: a name or an argument that timm does not accept.
    """
    optimizer = _create(model, hparams)
    _exempt_ranges(optimizer, model)
    return optimizer


def _exempt_ranges(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Exclude learned ranges from weight decay; per-channel ones have the dims of a weight."""
    ranges = {id(w.quantizer.range) for w in weight_quantizers(model)} - {id(None)}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in ranges]
        if own and group.get("weight_decay"):
            group["params"] = [p for p in group["params"] if id(p) not in ranges]
            optimizer.add_param_group({**group, "params": own, "weight_decay": 0.0})


def check_restored_state(optimizer: torch.optim.Optimizer) -> None:
    """Check the shapes of a restored optimizer state, which PyTorch does not check.

    Raises:
        UserError: a state has another shape than its parameter.
    """
    for parameter, state in optimizer.state.items():
        for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
            value = state.get(key)
            if isinstance(value, Tensor) and value.shape != parameter.shape:
                raise UserError(
                    f"the checkpoint's optimizer state does not fit: {key} has shape "
                    f"{tuple(value.shape)}, its parameter has {tuple(parameter.shape)}"
                )


def _create(model: nn.Module, hparams: Any) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    args = {"opt": hparams.opt, "lr": hparams.lr, "weight_decay": hparams.weight_decay}
    args["momentum"] = hparams.momentum
    if hparams.opt in ("sgd", "sgdw") and not hparams.momentum:
        args["nesterov"] = False
    further = hparams.opt_args or {}
    try:
        return create_optimizer_v2(model, **(args | further))
    except Exception as error:  # optimizers raise many types for invalid arguments
        if not further:
            raise UserError(f"model.opt: got {hparams.opt!r} ({first_line(error)})") from None
        raise UserError(
            f"model.opt_args: got {further}, which {hparams.opt} does not accept "
            f"({first_line(error)})"
        ) from None


def build_scheduler(
    optimizer: torch.optim.Optimizer, hparams: Any, trainer: L.Trainer
) -> Any | None:
    """Create timm's schedule `hparams.sched`, stepped every update over the length of the training.

    Returns:
        The scheduler; None if `hparams.sched` is "none".

    Raises:
        UserError: a training without an end, a warm-up that is longer than the training, or a
            decay only after it.
    """
    from timm.scheduler import create_scheduler_v2

    if hparams.sched == "none":
        return None
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise UserError(
            "model.sched: the schedule needs an end; pass trainer.max_epochs or trainer.max_steps, "
            "or model.sched=none"
        )
    per_epoch = max(1, -(-trainer.num_training_batches // trainer.accumulate_grad_batches))
    warmup = round(hparams.warmup_epochs * per_epoch)
    if warmup > total and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise UserError(
            f"model.warmup_epochs: got {hparams.warmup_epochs:g}, which is {warmup} steps, but the "
            f"training ends after {int(total)} (trainer.max_steps); pass a shorter warm-up"
        )
    decay_epochs = as_floats(hparams.decay_epochs, "model.decay_epochs")
    milestones = sorted(round(epoch * per_epoch) for epoch in decay_epochs)
    decays = hparams.sched in ("step", "multistep")
    if decays and milestones[0] >= total and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise UserError(
            f"model.decay_epochs: got {decay_epochs}, but the training ends after "
            f"{total / per_epoch:g} epochs (trainer.max_epochs, max_steps); pass fewer, or "
            "model.sched=none"
        )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=hparams.sched,
        num_epochs=max(1, int(total)),
        decay_epochs=max(1, milestones[0]),
        decay_milestones=milestones,
        decay_rate=hparams.decay_rate,
        min_lr=hparams.min_lr,
        warmup_lr=hparams.warmup_lr,
        warmup_epochs=warmup,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler
