"""Tiny real fits: a few steps on handwritten digits on the CPU."""

import os

import lightning as L
import pytest

from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.training.module import TQModule

# Some virtual machines report bf16 instructions that crash, so disable them in oneDNN, which
# reads the variable at its first call
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

VIT = {
    "name": "vit_tiny_patch16_224",
    "model_args": {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
}
PLAIN = {
    "opt": "sgd",
    "lr": 0.1,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "sched": "none",
    "calibration_batches": 1,
}


def _train(root, model=None, data=None, callbacks=(), ckpt_path=None, **flags):
    """Fit one epoch of two steps by default. Return (trainer, module)."""
    L.seed_everything(0)
    settings = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "limit_train_batches": 2,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False, "use_distributed_sampler": False,
    }  # fmt: skip
    trainer = L.Trainer(default_root_dir=root, callbacks=list(callbacks), **{**settings, **flags})
    module = TQModule(**{**VIT, **PLAIN, **(model or {})})
    digits = TQDataModule(
        **{"name": "digits", "batch_size": 16, "eval_batch_size": 64, "pad": 0, **(data or {})}
    )
    trainer.fit(module, digits, ckpt_path=ckpt_path, weights_only=True)
    return trainer, module


@pytest.fixture(scope="session")
def train():
    return _train


@pytest.fixture(scope="session")
def resnet():
    return {"name": "resnet8_cifar", "model_args": {}}
