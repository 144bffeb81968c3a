"""A moved run keeps its best checkpoint, and a resumed run draws the same random numbers."""

import random
from types import SimpleNamespace

import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import tensor

from tq_lightning.callbacks.resume import RemoveLaterBest, StepSeeds, UpdateCheckpointFolder


def test_best_checkpoint_path_follows_a_moved_run(tmp_path):
    before, now = tmp_path / "a", tmp_path / "ab"  # one name begins with the other
    old, new = (ModelCheckpoint(folder, monitor="acc", mode="max") for folder in (before, now))
    old.best_model_path = old.kth_best_model_path = f"{before}/best-3.ckpt"
    old.best_k_models, old.best_model_score, old.kth_value = (
        {f"{before}/best-3.ckpt": tensor(90.0)},
        tensor(90.0),
        tensor(90.0),
    )
    old.last_model_path = f"{now}/last.ckpt"  # in another folder: unchanged
    checkpoint = {"callbacks": {old.state_key: old.state_dict()}}
    UpdateCheckpointFolder().on_load_checkpoint(
        SimpleNamespace(checkpoint_callbacks=[new]), None, checkpoint
    )
    new.load_state_dict(checkpoint["callbacks"][new.state_key])
    assert new.best_model_path == new.kth_best_model_path == f"{now}/best-3.ckpt"
    assert new.best_k_models == {f"{now}/best-3.ckpt": tensor(90.0)} and new.kth_value == 90.0
    assert new.last_model_path == f"{now}/last.ckpt"
    assert old.state_dict()["dirpath"] == str(before)


def test_checkpoint_of_other_callbacks_is_unchanged(tmp_path):
    checkpoint = {"callbacks": {"Other": {"dirpath": "x"}}}
    UpdateCheckpointFolder().on_load_checkpoint(
        SimpleNamespace(checkpoint_callbacks=[ModelCheckpoint(tmp_path)]), None, checkpoint
    )
    assert checkpoint == {"callbacks": {"Other": {"dirpath": "x"}}}


def test_best_checkpoints_after_the_resumed_one_are_deleted(tmp_path):
    """Of a run that is resumed after 3 epochs, with other settings; its best epoch was 2."""
    names = ["best-2", "best-3", "best-10", "best-mine", "last", "best-11"]
    for name in names:
        (tmp_path / f"{name}.ckpt").touch()
    best = ModelCheckpoint(tmp_path, monitor="acc", mode="max")
    best.best_model_path = str(tmp_path / "best-2.ckpt")
    trainer = SimpleNamespace(
        checkpoint_callbacks=[best],
        current_epoch=3,
        ckpt_path=tmp_path / "best-10.ckpt",  # moved here by the user
        is_global_zero=False,
    )

    def train_an_epoch():
        callback = RemoveLaterBest(tmp_path)
        callback.on_train_start(trainer, None)
        assert len(list(tmp_path.iterdir())) == len(names)
        callback.on_train_epoch_end(trainer, None)

    train_an_epoch()
    assert len(list(tmp_path.iterdir())) == len(names)
    trainer.is_global_zero = True
    train_an_epoch()
    kept = {path.stem for path in tmp_path.iterdir()}
    assert kept == {"best-2", "best-10", "best-mine", "last"}


def draws(step, seed=0, rank=0):
    loop = type("Loop", (), {"epoch_loop": type("Epoch", (), {"total_batch_idx": step})()})()
    trainer = type("Trainer", (), {"fit_loop": loop, "global_rank": rank})()
    StepSeeds().on_train_batch_start(trainer, type("Module", (), {"run_seed": seed})(), None, 0)
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_states_are_a_function_of_seed_step_and_rank():
    first = draws(3)
    torch.rand(5)  # regardless of the draws in between
    assert draws(3) == first
    others = [draws(4), draws(3, seed=1), draws(3, rank=1)]
    for other in others:
        assert all(a != b for a, b in zip(first, other, strict=True))
