"""Resuming a run: random states by step, checkpoints within an epoch, and moved run folders.

`StepSeeds` makes the random state of a step independent of earlier steps. `StepCheckpoint` writes
checkpoints from which a run resumes within an epoch. `UpdateCheckpointFolder` updates the paths in
a checkpoint of a moved run. `RemoveLaterBest` deletes best checkpoints after the resumed one.
"""

import os
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tq_lightning.callbacks.optimizer_steps import OptimizerSteps, validation_follows


class StepSeeds(L.Callback):
    """Reseed Python, NumPy and torch before each training step, from seed, step and rank.

    A resumed run draws the same dropout masks as an uninterrupted one, without random states in the
    checkpoint and independent of evaluations in between.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let a fit with `max_steps` resume at the end of an epoch like other fits.

        Lightning would end that epoch again, count it twice and thereby change the order of the
        data.
        """
        trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.fit_loop.epoch_loop.total_batch_idx
        seed_all(pl_module.run_seed, step, trainer.global_rank)


def seed_all(*numbers: int) -> None:
    """Seed Python, NumPy and torch from non-negative integers."""
    python, numpy, torch_seed = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(torch_seed)


class UpdateCheckpointFolder(L.Callback):
    """Replace the checkpoint folder stored in a checkpoint by its current folder.

    Lightning drops the best score if the folder has changed. The next epoch would then be saved as
    the best one, in addition to the true one.
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


class RemoveLaterBest(L.Callback):
    """Delete best checkpoints of later epochs than the checkpoint that a run resumes from.

    These epochs are trained again, maybe with other settings, and the record drops their results.
    A remaining file would be taken for the best one of the run. The files are deleted when the
    first epoch has been trained again, so that a resume that fails before loses nothing.

    Args:
        folder: the run's checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first_epoch: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.first_epoch = trainer.current_epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        first, self.first_epoch = self.first_epoch, None
        if first is None or not trainer.is_global_zero:
            return
        kept = {Path(str(trainer.ckpt_path)).resolve()}
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                kept.add(Path(callback.best_model_path).resolve())
        for path in self.folder.glob("best-*.ckpt"):
            epoch = path.stem.removeprefix("best-")
            if epoch.isdecimal() and int(epoch) >= first and path.resolve() not in kept:
                path.unlink()


def _moved(value: Any, before: str, now: str) -> Any:
    """Replace the folder `before` by `now` in all paths of `value`."""
    if isinstance(value, dict):
        return {_moved(key, before, now): _moved(v, before, now) for key, v in value.items()}
    if isinstance(value, str) and (value == before or value.startswith(before + os.sep)):
        return now + value[len(before) :]
    return value


class StepCheckpoint(ModelCheckpoint):
    """Write `folder`/last.ckpt every `steps` optimizer steps.

    Checkpoints are written only after an optimizer step, because they do not store accumulated
    gradients, and not directly before a validation or the end of the epoch, see
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
