"""MovedRun: a run whose folder was moved or copied goes on with its own best checkpoint."""

import os
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class MovedRun(L.Callback):
    """Lets what a checkpoint remembers of its folder name the folder it lies in now.

    Lightning forgets the best score where the folder's name has changed: the next epoch would count as the best, however
    poor, and lie beside the true one.
    """

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state and state["dirpath"] and callback.dirpath:
                checkpoint["callbacks"][callback.state_key] = _moved(state, str(state["dirpath"]), str(callback.dirpath))


def _moved(value: Any, before: str, now: str) -> Any:
    """`value` with every path at or below `before` at or below `now`."""
    if isinstance(value, dict):
        return {_moved(key, before, now): _moved(v, before, now) for key, v in value.items()}
    if isinstance(value, str) and (value == before or value.startswith(before + os.sep)):
        return now + value[len(before) :]
    return value
