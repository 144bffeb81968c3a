"""A resumed run equals an uninterrupted one bit for bit; a checkpoint runs no code."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from fixtures.runs import TRAINED, assert_same, last, record, rows
from lightning.pytorch.callbacks import ModelCheckpoint

from tq_lightning.callbacks.metric_log import SPEED
from tq_lightning.callbacks.resume import StepCheckpoint

# steps an epoch; checkpoints after steps 5, 10, 12 (end of the epoch), 15, 20, 24, ...
STEPS, EPOCHS, EVERY = 12, 3, 5
ARGUMENTS = [
    *("--checkpoint_every_n_steps", str(EVERY), "--trainer.accelerator", "cpu"),
    *("--trainer.max_epochs", str(EPOCHS), "--trainer.limit_train_batches", str(STEPS)),
    *("--trainer.limit_val_batches", "1", "--trainer.gradient_clip_val", "1"),
    *("--model.name", "test_resnet", "--model.drop_rate", "0.3", "--model.drop_path_rate", "0.2"),
    *("--model.ema_decay", "0.9", "--model.width_schedule", "sandwich"),
    *("--model.calibration_batches", "1", "--model.opt", "adamw", "--model.lr", "1e-3"),
    *("--data.name", "digits", "--data.image_size", "32", "--data.batch_size", "16"),
    *("--data.eval_batch_size", "64", "--data.hflip", "0.5", "--data.reprob", "0.5"),
    *("--data.mixup", "0.2", "--data.cutmix", "1.0"),
]  # fmt: skip


def command(root: Path, *more: str) -> list[str]:
    fit = [sys.executable, "-m", "tq_lightning", "fit", *ARGUMENTS]
    return [*fit, "--trainer.default_root_dir", str(root), *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def finish(root: Path, *more: str) -> Path:
    done = subprocess.run(
        command(root, *more), env=environment(), capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = root.iterdir()
    return run


def kill_inside_the_second_epoch(root: Path) -> int:
    """Start the command, kill it after the first checkpoint in epoch 2, and return the step."""
    process = subprocess.Popen(
        command(root),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 1500
        while time.monotonic() < end and process.poll() is None:
            for path in root.glob("*/checkpoints/last.ckpt"):
                step = torch.load(path, weights_only=True, mmap=True)["global_step"]
                if STEPS < step < 2 * STEPS:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    return step
            time.sleep(0.01)
        raise AssertionError(f"no checkpoint from inside the second epoch; {process.poll()=}")
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_run_killed_inside_an_epoch_resumes_bit_identically(tmp_path):
    uninterrupted = finish(tmp_path / "whole")
    step = kill_inside_the_second_epoch(tmp_path / "killed")
    assert step == 15
    (run,) = (tmp_path / "killed").iterdir()
    before = record(run)
    assert before["status"] == "running"
    assert finish(tmp_path / "killed", "--ckpt_path", "last") == run, (
        "the resumed run keeps its directory"
    )

    ours, theirs = last(run), last(uninterrupted)
    for key in (*TRAINED, "lr_schedulers"):
        assert_same(ours[key], theirs[key], key)
    assert ours["global_step"] == STEPS * EPOCHS
    assert not torch.equal(
        *(ours[k]["model.fc.weight"] for k in ("state_dict", "current_model_state"))
    )
    best = [
        torch.load(next((r / "checkpoints").glob("best-*.ckpt")), weights_only=True)
        for r in (run, uninterrupted)
    ]
    assert_same(best[0]["state_dict"], best[1]["state_dict"], "best")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == sorted(
        p.name for p in (uninterrupted / "checkpoints").iterdir()
    )

    assert rows(run) == rows(uninterrupted)
    assert [row["epoch"] for row in rows(run) if row["epoch"]] == ["0", "1", "2"]
    now, other = record(run), record(uninterrupted)
    assert now["status"] == "finished" and now["id"] == before["id"] != other["id"]
    assert now["started"] == before["started"] and now["seconds"] > before["seconds"]
    for key in ("widths", "steps", "epochs", "bytes"):
        assert now[key] == other[key], key
    assert now["best"]["epoch"] == other["best"]["epoch"]
    assert now["curves"].keys() == other["curves"].keys()
    for key, curve in now["curves"].items():
        assert curve == other["curves"][key] or key == SPEED, key


class Stop(L.Callback):
    """Stop in the validation of an epoch, or after a batch of its training."""

    def __init__(self, epoch, batch=None):
        self.epoch, self.batch = epoch, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == self.batch:
            raise KeyboardInterrupt

    def on_validation_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch and self.batch is None:
            raise KeyboardInterrupt


def fit(train, root, model, checkpoint, stop=None, resume=None, data=None):
    """Fit 2 epochs of 4 steps, with a checkpoint every 2 steps and at the end of each epoch."""
    end = ModelCheckpoint(
        root,
        filename="last",
        enable_version_counter=False,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
    )
    callbacks = [end, checkpoint, *([stop] if stop is not None else [])]
    flags = {"max_epochs": 2, "limit_train_batches": 4, "enable_checkpointing": True}
    try:
        return train(root, model, data, callbacks=callbacks, ckpt_path=resume, **flags)
    except SystemExit:  # raised by Lightning for KeyboardInterrupt
        return None, None


def test_run_stopped_inside_an_epoch_resumes_bit_identically(train, tmp_path):
    """With every source of randomness: augmentation, dropout, drop path, sandwich; and momentum."""
    model = {
        "ema_decay": 0.5,
        "drop_rate": 0.3,
        "drop_path_rate": 0.3,
        "width_schedule": "sandwich",
        "opt": "adamw",
        "sched": "cosine",
    }
    data = {"pad": 1, "hflip": 0.5, "reprob": 0.5, "mixup": 0.2, "cutmix": 1.0}
    trainer, uninterrupted = fit(
        train, tmp_path / "a", model, StepCheckpoint(tmp_path / "a", 2), data=data
    )
    means = trainer.callback_metrics
    fit(train, tmp_path / "b", model, StepCheckpoint(tmp_path / "b", 2), Stop(1, 2), data=data)
    assert torch.load(tmp_path / "b" / "last.ckpt", weights_only=True)["global_step"] == 6
    resume = tmp_path / "b" / "last.ckpt"
    trainer, rest = fit(
        train, tmp_path / "b", model, StepCheckpoint(tmp_path / "b", 2), resume=resume, data=data
    )
    for key in (
        "train/loss_w8",
        "train/loss_w1",
    ):  # over the whole epoch, not only after the stop
        assert torch.equal(trainer.callback_metrics[key], means[key]), key
    assert_same(dict(rest.state_dict()), dict(uninterrupted.state_dict()))
    ours, theirs = (torch.load(tmp_path / r / "last.ckpt", weights_only=True) for r in "ba")
    for key in (*TRAINED, "lr_schedulers"):
        assert_same(ours[key], theirs[key], key)
    assert not torch.equal(
        *(ours[k]["model.head.weight"] for k in ("state_dict", "current_model_state"))
    )


def test_run_stopped_in_the_last_validation_repeats_it(train, resnet, tmp_path):
    """The checkpoint is from before the end of the epoch, so the validation is repeated."""
    model = {**resnet, "ema_decay": 0.5}
    _, uninterrupted = fit(train, tmp_path / "a", model, StepCheckpoint(tmp_path / "a", 2))
    fit(train, tmp_path / "b", model, StepCheckpoint(tmp_path / "b", 2), stop=Stop(1))
    assert torch.load(tmp_path / "b" / "last.ckpt", weights_only=True)["global_step"] == 6
    trainer, rest = fit(
        train,
        tmp_path / "b",
        model,
        StepCheckpoint(tmp_path / "b", 2),
        resume=tmp_path / "b" / "last.ckpt",
    )
    assert "val/acc1_truncate_mean" in trainer.callback_metrics
    assert_same(dict(rest.state_dict()), dict(uninterrupted.state_dict()))


@pytest.mark.parametrize("flags", [{"max_steps": 6, "max_epochs": -1}, {"max_steps": 6}])
def test_run_with_max_steps_resumes_at_the_end_of_an_epoch(train, resnet, tmp_path, flags):
    """Lightning would count the epoch twice, and the next one would have other batches."""

    def fit_steps(root, *callbacks, resume=None):
        end = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
        last = ModelCheckpoint(root, "last", enable_version_counter=False, **end)
        given = {"max_epochs": 3, "limit_train_batches": 4, "enable_checkpointing": True, **flags}
        return train(root, resnet, callbacks=[last, *callbacks], ckpt_path=resume, **given)

    expected, uninterrupted = fit_steps(tmp_path / "a")
    with pytest.raises(SystemExit):
        fit_steps(tmp_path / "b", Stop(1, 0))
    checkpoint = tmp_path / "b" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
    trainer, rest = fit_steps(tmp_path / "b", resume=checkpoint)
    assert_same(dict(rest.state_dict()), dict(uninterrupted.state_dict()))
    assert (trainer.current_epoch, trainer.global_step) == (expected.current_epoch, 6)


class Kill(L.Callback):
    """Interrupt at the start of the n-th batch of this process."""

    def __init__(self, batches):
        self.left = batches

    def on_train_batch_start(self, *_):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def killed(train, root, model, accumulate, *batches):
    """Train 2 epochs of 10 batches, killed and resumed after each number of batches."""
    end = {"enable_version_counter": False, "every_n_epochs": 1, "save_on_train_epoch_end": True}
    flags = {"max_epochs": 2, "limit_train_batches": 10, "accumulate_grad_batches": accumulate}
    for count in (*batches, None):
        last = root / "last.ckpt"
        callbacks = [ModelCheckpoint(root, "last", **end), StepCheckpoint(root, 2)]
        callbacks += [Kill(count)] if count is not None else []
        resume = last if last.is_file() else None
        flags |= {"callbacks": callbacks, "ckpt_path": resume, "enable_checkpointing": True}
        try:
            _, module = train(root, model, **flags)
        except SystemExit:
            assert count is not None
    return module


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_two_kills_inside_an_accumulation_resume_bit_identically(
    train, resnet, tmp_path, accumulate
):
    """Each kill is inside an accumulation, and 10 batches also end an epoch inside one."""
    model = {**resnet, "opt": "adamw", "ema_decay": 0.5, "width_schedule": "sandwich"}
    uninterrupted = killed(train, tmp_path / "a", model, accumulate)
    rest = killed(train, tmp_path / "b", model, accumulate, 8, 1, 6)
    assert_same(dict(rest.state_dict()), dict(uninterrupted.state_dict()))
    ours, theirs = (torch.load(tmp_path / r / "last.ckpt", weights_only=True) for r in "ba")
    for key in ("state_dict", "current_model_state", "optimizer_states", "global_step"):
        assert_same(ours[key], theirs[key], key)
    assert ours["global_step"] == 2 * math.ceil(10 / accumulate)


class RecordRates(L.Callback):
    """Keep the learning rate of every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_resume_with_more_epochs_or_another_rate_follows_the_new_schedule(train, tmp_path):
    """The state of the shorter schedule would stay at its final rate 0."""
    rates = RecordRates()
    trainer, _ = train(
        tmp_path, {"sched": "cosine", "opt": "adamw"}, callbacks=[rates], limit_train_batches=4
    )
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert rates.seen[-1] > trainer.optimizers[0].param_groups[0]["lr"] == 0.0
    more = {"max_epochs": 2, "limit_train_batches": 4, "ckpt_path": tmp_path / "last.ckpt"}
    for lr in (0.1, 0.01):
        rates = RecordRates()
        train(tmp_path, {"sched": "cosine", "opt": "adamw", "lr": lr}, callbacks=[rates], **more)
        assert rates.seen == pytest.approx(
            [lr / 2 * (1 + math.cos(math.pi * step / 8)) for step in range(4, 8)]
        )


def test_checkpoint_callback_of_lightning_would_skip_the_validation(train, resnet, tmp_path):
    """Counter-example: Lightning's callback saves at the last batch and skips the validation."""
    plain = {"filename": "last", "enable_version_counter": False, "every_n_train_steps": 2}
    fit(train, tmp_path, resnet, ModelCheckpoint(tmp_path, **plain), stop=Stop(1))
    trainer, _ = fit(
        train, tmp_path, resnet, ModelCheckpoint(tmp_path, **plain), resume=tmp_path / "last.ckpt"
    )
    assert "val/acc1_truncate_mean" not in trainer.callback_metrics


def test_non_finite_loss_keeps_the_last_good_checkpoint(train, tmp_path, monkeypatch):
    from tq_lightning.errors import TrainingError
    from tq_lightning.training import losses

    def fit_until(bad):
        calls = []

        def hard(logits, target):
            calls.append(None)
            return losses.cross_entropy(logits, target) * (
                float("nan") if len(calls) > bad else 1.0
            )

        monkeypatch.setitem(losses.LOSSES, "cross_entropy", hard)
        keep = StepCheckpoint(tmp_path, 1)
        return train(tmp_path, callbacks=[keep], limit_train_batches=4, enable_checkpointing=True)

    with pytest.raises(TrainingError, match="step 2"):
        fit_until(2)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert all(torch.isfinite(v).all() for v in state["state_dict"].values())


def test_checkpoint_that_runs_code_is_rejected(train, tmp_path, capsys):
    from tq_lightning.cli import main

    class CreatesFolder:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    trainer, _ = train(tmp_path)
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    state = torch.load(tmp_path / "good.ckpt", weights_only=True)
    torch.save({**state, "extra": CreatesFolder()}, tmp_path / "bad.ckpt")
    bad = ["--ckpt_path", str(tmp_path / "bad.ckpt"), "--trainer.max_epochs", "1"]
    assert main(["fit", "--data.name", "digits", *bad]) == 2
    assert "is not a training checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "harm").exists()


@pytest.mark.slow
def test_best_checkpoint_inside_an_accumulation_is_not_resumed(tmp_path, capsys):
    """It lacks the gradient of the previous batch, so the last checkpoint is resumed."""
    from tq_lightning.cli import main

    def fit(root, interval, *more):
        arguments = [
            *("--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "4"),
            *("--trainer.limit_val_batches", "1", "--trainer.val_check_interval", str(interval)),
            *("--trainer.accumulate_grad_batches", "2", "--model.calibration_batches", "1"),
            *("--model.widths", "8,2", "--data.name", "digits", "--data.batch_size", "16"),
            *("--model.lr", "0", "--trainer.default_root_dir", str(root)),
        ]  # fmt: skip  # at a rate of 0 the first validation stays the best one
        return main(["fit", *arguments, *more])

    assert fit(tmp_path / "inside", 3, "--trainer.max_epochs", "1") == 0
    (run,) = (tmp_path / "inside").iterdir()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert fit(tmp_path / "inside", 3, "--trainer.max_epochs", "2", "--ckpt_path", "best") == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "best-0.ckpt was written inside an accumulation of gradients" in line
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert fit(tmp_path / "inside", 3, "--trainer.max_epochs", "2", "--ckpt_path", "last") == 0
