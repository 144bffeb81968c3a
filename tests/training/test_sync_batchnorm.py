"""Synchronized batch norms: one per width, with the activation that timm fuses into them."""

import copy
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tq_lightning import bit_width, calibrate_norms, prepare
from tq_lightning.errors import UserError
from tq_lightning.training.sync_batchnorm import TimmSyncBatchNorm, use_timm_sync_batchnorm
from tq_lightning.training.trainer_validation import check_trainer

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    shared = BatchNormAct2d(4)
    layers = [nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 1), shared, nn.Conv2d(4, 4, 1)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(4), BatchNormAct2d(4))
    prepare(model, skip=(), activations="clamp_floor", verbose=False)
    for _ in range(20):
        for bits in (8, 4, 2, 1):
            with torch.no_grad(), bit_width(model, bits):
                model(IMAGES)
    calibrate_norms(model, [IMAGES])
    return model.eval()


def logits(model):
    out = {}
    for bits in (*range(1, 9), None):
        with torch.no_grad(), bit_width(model, bits):
            out[bits] = model(IMAGES)
    return out


def norms(model):
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def test_conversion_keeps_the_fused_activation_of_every_width(model):
    before, plain, keys = logits(model), norms(model), list(model.state_dict())
    torchs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert (logits(torchs)[4] < 0).any()  # the converter of PyTorch drops the activation

    sync = TimmSyncBatchNorm()
    assert sync.apply(model) is model
    assert len(norms(model)) == len(plain) == 27
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms(model))
    assert model[1] is model[3] and list(model.state_dict()) == keys
    assert all(torch.equal(value, before[bits]) for bits, value in logits(model).items())

    trained = [norm.weight.requires_grad for norm in norms(model)]
    assert trained == [norm.weight.requires_grad for norm in plain]
    for norm in norms(model):
        norm.running_mean = norm.running_mean - 0.3
    moved = logits(model)
    sync.revert(model)
    assert all(a is b for a, b in zip(norms(model), plain, strict=True))
    assert all(torch.equal(value, moved[bits]) for bits, value in logits(model).items())
    assert not torch.equal(moved[4], before[4])


def test_trainer_flag_converts_the_norms(monkeypatch):
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", sync_batchnorm=True, logger=False
    )
    with pytest.raises(UserError, match=r"sync_batchnorm: .* on GPUs only; pass false"):
        use_timm_sync_batchnorm(trainer)
    kind = type(trainer.strategy)
    monkeypatch.setattr(kind, "root_device", property(lambda self: torch.device("cuda", 0)))
    use_timm_sync_batchnorm(trainer)
    assert isinstance(trainer.strategy._layer_sync, TimmSyncBatchNorm)


def test_without_the_flag_nothing_changes():
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False)
    use_timm_sync_batchnorm(trainer)
    assert getattr(trainer.strategy, "_layer_sync", None) is None


@pytest.mark.parametrize("name", ["TransformerEnginePrecision", "BitsandbytesPrecision"])
def test_precisions_that_replace_layers_are_errors(name):
    plugin = type(name, (), {})()
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(), precision_plugin=plugin, accumulate_grad_batches=1
    )
    with pytest.raises(UserError, match=f"trainer.precision: {name} replaces"):
        check_trainer(trainer)


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "ModelPruning"])
def test_callbacks_that_rebuild_the_model_are_errors(name):
    callback = getattr(L.pytorch.callbacks, name)
    callback = callback(swa_lrs=0.1) if "Weight" in name else callback("l1_unstructured")
    trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[callback], logger=False)
    with pytest.raises(UserError, match=f"trainer.callbacks: {name} .*; "):
        check_trainer(trainer)
