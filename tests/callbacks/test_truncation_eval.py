"""Every width is evaluated on shifted integers, and only the estimated norms change."""

import csv
import random
from unittest import mock

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from tq_lightning import bit_width
from tq_lightning.callbacks.truncation_eval import TruncationEval
from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.errors import UserError
from tq_lightning.quant import fused_weights
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.quant.switchable_norm import per_width_norms
from tq_lightning.training.checkpoint import load_checkpoint_model
from tq_lightning.training.module import TQModule

ESTIMATED = (7, 6, 5, 3)


def fit(root, model=None, callbacks=(), ckpt=None, **flags):
    L.seed_everything(0)
    settings = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "limit_train_batches": 2,
        "num_sanity_val_steps": 0, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False,
        "use_distributed_sampler": False, "default_root_dir": root,
    }  # fmt: skip
    module = TQModule(**{"lr": 0.01, "calibration_batches": 1, **(model or {})})
    data = TQDataModule(name="digits", batch_size=32, eval_batch_size=100)
    trainer = L.Trainer(callbacks=list(callbacks), **{**settings, **flags})
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer, module, data


class CompareState(L.Callback):
    """Compare all state that a validation could change, before and after it."""

    def __init__(self):
        self.compared = 0

    def snapshot(self, module):
        return {
            "state": {k: v.clone() for k, v in module.state_dict().items()},
            "modes": [m.training for m in module.modules()],
            "width": (width_of(module).bits, width_of(module).source),
            "grads": [p.requires_grad for p in module.parameters()],
            "momenta": [getattr(m, "momentum", None) for m in module.modules()],
            "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        }

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.before = self.snapshot(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        before, after = self.before, self.snapshot(pl_module)
        for key, value in after["state"].items():
            estimated = any(f".sets.{b}." in key for b in (*ESTIMATED, "none")) or key.endswith(
                "calibrated"
            )
            assert estimated or torch.equal(value, before["state"][key]), key
        assert any(
            not torch.equal(v, before["state"][k])
            for k, v in after["state"].items()
            if ".sets.7." in k
        )
        for key in ("modes", "width", "grads", "momenta"):
            assert after[key] == before[key], key
        assert after["random"][0] == before["random"][0]
        assert all(
            np.array_equal(a, b)
            for a, b in zip(after["random"][1], before["random"][1], strict=True)
        )
        assert torch.equal(after["random"][2], before["random"][2])
        self.compared += 1


@mock.patch("tq_lightning.quant.norm_calibration.SETTLED", 0)
def test_validation_changes_no_state(tmp_path):
    watch = CompareState()
    trainer, _, _ = fit(tmp_path, callbacks=[watch], max_epochs=2, limit_val_batches=2)
    assert watch.compared == 2
    keys = {k for k in trainer.callback_metrics if k.startswith("val/")}
    widths = {
        f"val/{key}_w{b}"
        for b in range(1, 9)
        for key in ("acc1_quantize", "acc1_truncate", "qt_gap")
    }
    widths |= {f"val/acc5_truncate_w{b}" for b in range(1, 9)}
    widths |= {f"val/loss_w{b}" for b in (8, 4, 2, 1)} | {"val/loss", "val/images"}
    means = {f"val/acc{k}_{name}" for k in (1, 5) for name in ("truncate_mean", "float")}
    assert keys == widths | means


def test_metrics_equal_a_manual_evaluation(tmp_path):
    trainer, module, data = fit(
        tmp_path, {"quantizer": "round", "lr": 0.05}, limit_train_batches=12
    )
    module.eval()
    hits = {(b, s): 0 for b in range(1, 9) for s in ("quantize", "truncate")}
    top5, loss = dict.fromkeys(range(1, 9), 0), dict.fromkeys(range(1, 9), 0.0)
    total = 0
    with torch.no_grad():
        for pixels, labels in data.val_dataloader():
            total += len(labels)
            for bits, source in hits:
                with bit_width(module, bits, source):
                    logits = module(data.normalize(pixels))
                hits[bits, source] += int((logits.argmax(1) == labels).sum())
                if source == "truncate":
                    order = logits.argsort(1, descending=True)[:, :5]
                    top5[bits] += int((order == labels[:, None]).sum())
                    chance = logits.softmax(1)[torch.arange(len(labels)), labels]
                    loss[bits] -= float(chance.log().sum())
    assert trainer.callback_metrics["val/images"].item() == total == 144
    for (bits, source), count in hits.items():
        assert trainer.callback_metrics[f"val/acc1_{source}_w{bits}"].item() == pytest.approx(
            100 * count / total, abs=1e-3
        )
    metrics = {key: value.item() for key, value in trainer.callback_metrics.items()}
    for bits, count in top5.items():
        assert metrics[f"val/acc5_truncate_w{bits}"] == pytest.approx(100 * count / total, abs=1e-3)
    assert 0 < top5[8] < total and top5[8] > hits[8, "truncate"]
    for bits in (8, 4, 2, 1):
        assert metrics[f"val/loss_w{bits}"] == pytest.approx(loss[bits] / total, rel=1e-4)
    mean = sum(loss[bits] for bits in (8, 4, 2, 1)) / 4 / total
    assert metrics["val/loss"] == pytest.approx(mean, rel=1e-4)
    gap = 100 * (hits[2, "quantize"] - hits[2, "truncate"]) / total
    assert trainer.callback_metrics["val/qt_gap_w2"].item() == pytest.approx(gap, abs=1e-3)


def test_sanity_check_neither_evaluates_nor_calibrates(tmp_path):
    class BeforeTraining(L.Callback):
        seen = None

        def on_train_start(self, trainer, pl_module):
            self.seen = (
                set(trainer.callback_metrics),
                [bool(n.calibrated.any()) for n in per_width_norms(pl_module)],
            )

    before_training = BeforeTraining()
    trainer, _, _ = fit(
        tmp_path,
        callbacks=[before_training],
        num_sanity_val_steps=2,
        limit_train_batches=1,
        limit_val_batches=1,
    )
    keys, calibrated = before_training.seen
    assert keys == set() and calibrated and not any(calibrated)
    assert "val/acc1_float" in trainer.callback_metrics


class RecordValidations(L.Callback):
    def __init__(self):
        self.at = []

    def on_validation_end(self, trainer, pl_module):
        self.at.append(trainer.global_step)


@pytest.mark.parametrize(
    ("flags", "at"),
    [
        ({}, [2]),
        ({"max_epochs": 3}, [6]),
        ({"max_epochs": -1, "max_steps": 3}, [3]),  # inside the second epoch
        ({"max_epochs": -1, "max_steps": 4}, [4]),  # at its end
        (
            {
                "max_epochs": -1,
                "max_steps": 3,
                "limit_train_batches": 9,
                "accumulate_grad_batches": 2,
            },
            [3],
        ),
        ({"max_epochs": 2, "max_steps": 50}, [4]),
        (
            {
                "max_epochs": -1,
                "max_steps": 3,
                "check_val_every_n_epoch": None,
                "val_check_interval": 2,
            },
            [2],
        ),  # as requested
    ],
)
def test_end_of_a_run_is_evaluated_exactly_once(tmp_path, flags, at):
    seen = RecordValidations()
    trainer, _, _ = fit(
        tmp_path,
        callbacks=[seen],
        **{"check_val_every_n_epoch": 5, "limit_val_batches": 1, **flags},
    )
    assert seen.at == at
    assert "val/acc1_truncate_mean" in trainer.callback_metrics


class StopAt(L.Callback):
    """Stop the Trainer at a hook, like a time limit (after a batch) or EarlyStopping (an epoch)."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self.stop)

    def stop(self, trainer, *_):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


class EpochMonitor(StopAt, EarlyStopping):
    """Stop after the end of an epoch, like EarlyStopping on a training metric."""

    def __init__(self, step):
        EarlyStopping.__init__(self, "train/loss_w8", check_on_train_epoch_end=True)
        StopAt.__init__(self, "on_train_epoch_end", step)


@pytest.mark.parametrize(
    ("stop", "at"),
    [
        (StopAt("on_train_batch_end", 3), [3]),  # inside the second epoch
        (StopAt("on_train_batch_end", 4), [4]),  # at its end
        (StopAt("on_train_epoch_end", 4), [4]),
        (EpochMonitor(4), [4]),
    ],
)
def test_stopped_run_is_evaluated_once_at_its_end(tmp_path, stop, at):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from tq_lightning.callbacks.csv_logger import ResumableCSVLogger

    seen = RecordValidations()
    kind = {"enable_version_counter": False}
    last = ModelCheckpoint(tmp_path, "last", every_n_epochs=1, save_on_train_epoch_end=True, **kind)
    best = ModelCheckpoint(tmp_path, "best", monitor="val/acc1_truncate_mean", mode="max", **kind)
    trainer, _, _ = fit(
        tmp_path,
        callbacks=[stop, seen, last, best],
        max_epochs=9,
        check_val_every_n_epoch=50,
        limit_val_batches=1,
        enable_checkpointing=True,
        logger=ResumableCSVLogger(str(tmp_path), "run"),
    )
    assert seen.at == at and trainer.current_epoch == 2
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open(newline="")))
    assert [row["epoch"] for row in rows if row["epoch"]] == ["0", "1"]
    assert [bool(row["val/images"]) for row in rows if row["epoch"]] == [False, True]
    assert rows[-1]["train/loss_w8"]
    for name in ("last", "best"):
        model, _, _ = load_checkpoint_model(tmp_path / f"{name}.ckpt")
        with bit_width(model, 3), torch.no_grad():  # untrained width: its norms were estimated
            assert torch.isfinite(model(torch.randn(2, 3, 8, 8))).all()
    # both resume at the end of the second epoch
    trainer, _, _ = fit(tmp_path, max_epochs=3, logger=False, ckpt=tmp_path / "last.ckpt")
    assert trainer.current_epoch == 3 and trainer.global_step == at[0] + 2


@pytest.mark.parametrize("classes", [3, 5])
def test_fewer_classes_than_five_have_no_top5(tmp_path, classes):
    from tq_lightning.data.datamodule import TQDataModule

    module = TQModule(num_classes=classes, calibration_batches=1)
    data = TQDataModule(name="synthetic", num_classes=classes, samples=32, batch_size=16)
    flags = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        max_steps=1,
        limit_val_batches=1,
        accelerator="cpu",
        use_distributed_sampler=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **flags,
    )
    trainer.fit(module, data)
    assert ("val/acc5_truncate_w8" in trainer.callback_metrics) == (classes == 5)
    assert trainer.callback_metrics.get("val/acc5_truncate_w8", 100.0) == 100.0


def test_estimated_norms_match_the_weights(tmp_path):
    """A checkpoint inside the next epoch marks them as missing, and a test estimates them."""

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    fit(tmp_path, callbacks=[Save()], max_epochs=2, limit_val_batches=1)
    end, _, preprocessing = load_checkpoint_model(tmp_path / "end.ckpt")
    middle, _, _ = load_checkpoint_model(tmp_path / "middle.ckpt")
    assert preprocessing["input_size"] == [3, 8, 8] and len(preprocessing["classes"]) == 10
    with bit_width(end, 3), torch.no_grad():
        assert torch.isfinite(end(torch.randn(2, 3, 8, 8))).all()
    with pytest.raises(ValueError, match="width 3 was not trained"), bit_width(middle, 3):
        pass
    with bit_width(middle, 4):  # trained sets are always there
        pass


def test_test_uses_the_norm_statistics_of_its_checkpoint(tmp_path):
    trainer, module, data = fit(tmp_path, limit_val_batches=1)
    with torch.no_grad():  # a value that an estimate would overwrite
        for norm in per_width_norms(module):
            norm.sets["3"].running_mean.add_(7.0)
    trainer.save_checkpoint(tmp_path / "marked.ckpt")
    marked = {k: v.clone() for k, v in module.state_dict().items()}
    for run in (trainer.test, trainer.validate):
        fresh = TQModule(calibration_batches=1, num_classes=10)
        run(fresh, data, ckpt_path=tmp_path / "marked.ckpt", weights_only=True, verbose=False)
        assert all(torch.equal(v, marked[k]) for k, v in fresh.state_dict().items())
    assert fresh.loaded_epoch == trainer.current_epoch


def test_model_without_norms_needs_no_calibration(tmp_path, monkeypatch):
    monkeypatch.setattr(
        TQDataModule, "calibration_batches", lambda *_: pytest.fail("requested batches")
    )
    args = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    trainer, _, _ = fit(
        tmp_path, {"name": "vit_tiny_patch16_224", "model_args": args}, limit_train_batches=1
    )
    assert "val/acc1_truncate_w3" in trainer.callback_metrics


def test_invalid_number_of_batches_is_an_error():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TruncationEval(0)


def test_weights_are_normalized_once_per_evaluation_even_if_it_fails(tmp_path, monkeypatch):
    calls = []
    plain = fused_weights.FlatWeights.normalize
    monkeypatch.setattr(
        fused_weights.FlatWeights,
        "normalize",
        lambda self: (calls.append(self), plain(self))[1],
    )
    trainer, module, data = fit(tmp_path, limit_train_batches=1)
    quantizers = [w.quantizer for w in weight_quantizers(module)]
    assert len(trainer.val_dataloaders) > 1
    assert len(calls) == 2, "one step, and one validation of several batches and a calibration"
    assert all(q.fused_weight is None for q in quantizers) and width_of(module).fused is None

    class Fail(L.Callback):
        def on_validation_batch_end(self, *_):
            raise RuntimeError("in the middle")

    trainer.callbacks.append(Fail())
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.validate(module, data)
    assert all(q.fused_weight is None for q in quantizers) and width_of(module).fused is None


@pytest.mark.slow
def test_last_batch_of_one_image_is_left_out_of_the_calibration(tmp_path):
    """33 samples in batches of 16: the last layers of a ResNet-18 see one pixel of one image."""
    from tq_lightning.cli import run_fit

    metrics = run_fit(
        "--model.name resnet18 --model.widths 8,2 --data.name synthetic --data.samples 33 "
        "--data.image_size 32 --data.batch_size 16 --trainer.accelerator cpu "
        "--trainer.max_epochs 1 --trainer.enable_model_summary false "
        f"--trainer.default_root_dir {tmp_path}".split()
    )
    assert all(f"val/acc1_truncate_w{bits}" in metrics for bits in range(1, 9))


class OwnModule(L.LightningDataModule):
    """Data module of a user: shuffled by the global random state, scaled before the transfer."""

    num_classes = 2

    def setup(self, stage):
        if stage == "fit":
            self.train = [(torch.full((3, 8, 8), float(n)), n % 2) for n in range(32)]
        self.held = [(torch.zeros(3, 8, 8), 0)] * 8

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.held, batch_size=8)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] / 100, batch[1]]


def test_norm_statistics_with_a_data_module_of_the_user(tmp_path):
    """They come from the same batches in every process, as training sees them."""
    inputs = []
    for seed in (0, 1):
        L.seed_everything(seed)
        module = TQModule(calibration_batches=2)
        trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
        callback = TruncationEval(2)
        with mock.patch.object(TQModule, "configure_callbacks", lambda self, c=callback: [c]):
            trainer.validate(module, OwnModule(), verbose=False)
        inputs.append(callback._batches)
    assert len(inputs[0]) == 2 and inputs[0][0].max() <= 0.31
    assert all(torch.equal(a, b) for a, b in zip(*inputs, strict=True))


def test_reading_calibration_batches_keeps_the_random_state(tmp_path):
    data, module = OwnModule(), mock.Mock(device=torch.device("cpu"))
    data.setup("fit")
    trainer = mock.Mock(datamodule=data)
    trainer.state.fn = "fit"
    before = torch.get_rng_state()
    assert len(TruncationEval(2)._calibration_inputs(trainer, module)) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_loaders_without_a_data_module_are_an_error_of_one_line(tmp_path):
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
    loader = DataLoader([(torch.zeros(3, 8, 8), 0)] * 8, batch_size=8)
    with pytest.raises(UserError, match="got loaders; pass datamodule=, a LightningDataModule"):
        trainer.validate(TQModule(num_classes=2), loader, verbose=False)
