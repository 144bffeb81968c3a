"""Resuming a run: random states by step, checkpoints inside an epoch, and folders that were moved.

`StepSeeds` makes each step independent of the process it runs in. `StepCheckpoint` writes
checkpoints from which a run resumes inside an epoch. `MovedRun` adapts a checkpoint to the folder
it is in now.
"""

import os
import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tq_lightning.callbacks.optimizer_steps import OptimizerSteps, validation_follows


class StepSeeds(L.Callback):
    """Reseeds Python, NumPy and torch before each training step, from seed, step and rank.

    A resumed run draws the same dropout masks as an uninterrupted one, without random states in the
    checkpoint and whatever an evaluation drew in between.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.fit_loop.epoch_loop.total_batch_idx
        sequence = np.random.SeedSequence([pl_module.run_seed, step, trainer.global_rank])
        python, numpy, torch_seed = (int(v) for v in sequence.generate_state(3))
        random.seed(python)
        np.random.seed(numpy)
        torch.manual_seed(torch_seed)


class MovedRun(L.Callback):
    """Replaces the checkpoint folder that a checkpoint has saved by the one it is in now.

    Lightning drops the best score if the folder has changed: the next epoch would count as the best
    one and be saved beside the true one.
    """

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            if (
                isinstance(callback, ModelCheckpoint)
                and state
                and state["dirpath"]
                and callback.dirpath
            ):
                checkpoint["callbacks"][callback.state_key] = _moved(
                    state, str(state["dirpath"]), str(callback.dirpath)
                )


def _moved(value: Any, before: str, now: str) -> Any:
    """Replace the folder `before` by `now` in all paths of `value`."""
    if isinstance(value, dict):
        return {_moved(key, before, now): _moved(v, before, now) for key, v in value.items()}
    if isinstance(value, str) and (value == before or value.startswith(before + os.sep)):
        return now + value[len(before) :]
    return value


class StepCheckpoint(ModelCheckpoint):
    """Writes `folder`/last.ckpt every `steps` optimizer steps.

    Only batches that took an optimizer step are saved: the gradients of the others are not in a
    checkpoint. Batches that a validation or the end of the epoch follows are left out: see
    `validation_follows`.

    Args:
        folder: the run's checkpoints.
        steps: optimizer steps between two checkpoints.
    """

    def __init__(self, folder: Any, steps: int) -> None:
        super().__init__(
            folder, filename="last", enable_version_counter=False, every_n_train_steps=steps
        )
        self._steps = OptimizerSteps()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._steps.start(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._steps.advanced(trainer) and not validation_follows(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
