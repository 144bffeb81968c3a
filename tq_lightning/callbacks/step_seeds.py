"""StepSeeds: the random states of each training step are a function of seed, step and rank, and of nothing else."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch


class StepSeeds(L.Callback):
    """Reseeds Python, NumPy and torch before each training step.

    A run that is killed and resumed from any checkpoint then draws the same dropout masks as one that was not, without
    random states in the checkpoint, and whatever an evaluation drew in between.
    """

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.fit_loop.epoch_loop.total_batch_idx
        sequence = np.random.SeedSequence([pl_module.run_seed, step, trainer.global_rank])
        python, numpy, torch_seed = (int(v) for v in sequence.generate_state(3))
        random.seed(python)
        np.random.seed(numpy)
        torch.manual_seed(torch_seed)
