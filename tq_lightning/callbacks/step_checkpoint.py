"""StepCheckpoint: last.ckpt every N optimizer steps inside an epoch."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class StepCheckpoint(ModelCheckpoint):
    """Writes `folder`/last.ckpt every `steps` optimizer steps, but not at the last batch of an epoch.

    There validation follows and then the epoch's own checkpoint. Lightning takes a checkpoint between the two for a
    finished epoch: a run killed in that validation would go on without it, and a last epoch would stay unscored.
    """

    def __init__(self, folder: Any, steps: int) -> None:
        super().__init__(folder, filename="last", enable_version_counter=False, every_n_train_steps=steps)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
