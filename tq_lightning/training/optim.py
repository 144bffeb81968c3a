"""Optimiser and schedule by name, from timm's factories."""

from typing import Any

import lightning as L
import torch
from torch import nn

from tq_lightning.errors import UserError


def build_optimizer(model: nn.Module, h: Any) -> torch.optim.Optimizer:
    """timm's optimiser `h.opt` over the parameters that train; no weight decay on biases and norms.

    Raises:
        UserError: a name or an argument that timm does not know.
    """
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(
            model, opt=h.opt, lr=h.lr, weight_decay=h.weight_decay, momentum=h.momentum, **(h.opt_args or {})
        )
    except (ValueError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"model.opt: got {h.opt!r} ({reason}); pass a name from timm.optim.list_optimizers()") from None


def build_scheduler(optimizer: torch.optim.Optimizer, h: Any, trainer: L.Trainer) -> Any | None:
    """timm's schedule `h.sched`, stepped every optimizer update; None for "none" and "constant" without warm-up.

    Raises:
        UserError: an unknown schedule, one that needs a metric, or a run without an end.
    """
    from timm.scheduler import create_scheduler_v2

    from tq_lightning.training.module import as_list

    known = ("cosine", "tanh", "step", "multistep", "poly", "none")
    if h.sched not in known:
        raise UserError(f"model.sched: got {h.sched!r}, pass one of {', '.join(known)}")
    if h.sched == "none":
        return None
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise UserError("the schedule needs an end: pass trainer.max_epochs or trainer.max_steps, or model.sched=none")
    per_epoch = max(1, -(-trainer.num_training_batches // trainer.accumulate_grad_batches))
    epochs = max(1, -(-int(total) // per_epoch))
    milestones = [float(v) for v in as_list(h.decay_epochs)]
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=h.sched,
        num_epochs=epochs,
        decay_epochs=milestones[0],
        decay_milestones=milestones,
        decay_rate=h.decay_rate,
        min_lr=h.min_lr,
        warmup_lr=h.warmup_lr,
        warmup_epochs=h.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=per_epoch,
    )
    return scheduler
