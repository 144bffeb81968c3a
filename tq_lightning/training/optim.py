"""Optimiser and schedule by name, from timm's factories."""

from typing import Any

import lightning as L
import torch
from torch import nn

from tq_lightning.errors import UserError, first_line
from tq_lightning.training.validation import as_floats


def build_optimizer(model: nn.Module, h: Any) -> torch.optim.Optimizer:
    """timm's optimiser `h.opt` over the parameters that train.

    No weight decay on biases, norms and what the model itself excepts (position embeddings, for one). "sgd" is Nesterov's,
    as ever in timm, and plain SGD at momentum 0.

    Raises:
        UserError: a name or an argument that timm does not know.
    """
    from timm.optim import create_optimizer_v2

    args = {
        "momentum": h.momentum,
        **({"nesterov": False} if h.opt in ("sgd", "sgdw") and not h.momentum else {}),
    }
    try:
        return create_optimizer_v2(
            model, opt=h.opt, lr=h.lr, weight_decay=h.weight_decay, **{**args, **(h.opt_args or {})}
        )
    except (ValueError, AssertionError, TypeError) as error:
        said = first_line(error)
        raise UserError(
            f"model.opt: got {h.opt!r} ({said}); pass a name from timm.optim.list_optimizers()"
        ) from None


def build_scheduler(optimizer: torch.optim.Optimizer, h: Any, trainer: L.Trainer) -> Any | None:
    """timm's schedule `h.sched`, counted in optimizer updates and ending with the run's last; None for "none".

    Raises:
        UserError: an unknown schedule, one that needs a metric, or a run without an end.
    """
    from timm.scheduler import create_scheduler_v2

    known = ("cosine", "tanh", "step", "multistep", "poly", "none")
    if h.sched not in known:
        raise UserError(f"model.sched: got {h.sched!r}, pass one of {', '.join(known)}")
    if h.sched == "none":
        return None
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise UserError(
            "the schedule needs an end: pass trainer.max_epochs or trainer.max_steps, or model.sched=none"
        )
    per_epoch = max(1, -(-trainer.num_training_batches // trainer.accumulate_grad_batches))
    milestones = [round(v * per_epoch) for v in as_floats(h.decay_epochs, "model.decay_epochs")]
    if not milestones or min(milestones) < 1:
        raise UserError(
            f"model.decay_epochs: got {h.decay_epochs!r}, pass epochs above 0 such as 100,150,180"
        )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=h.sched,
        num_epochs=max(1, int(total)),
        decay_epochs=milestones[0],
        decay_milestones=milestones,
        decay_rate=h.decay_rate,
        min_lr=h.min_lr,
        warmup_lr=h.warmup_lr,
        warmup_epochs=round(h.warmup_epochs * per_epoch),
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler
