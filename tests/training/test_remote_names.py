"""Models from a hub or a folder are resolved when a run starts, never for a checkpoint."""

import json

import pytest
import timm

from tq_lightning.errors import UserError
from tq_lightning.training.factory import build_model
from tq_lightning.training.module import TQModule


def test_checkpoint_stores_the_architecture_instead_of_a_remote_name(tmp_path):
    config = {
        "architecture": "resnet8_cifar",
        "pretrained_cfg": {"num_classes": 10},
        "model_args": {"in_chans": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    module = TQModule(name=f"local-dir:{tmp_path}", num_classes=4)
    module.configure_model()
    assert module.hparams.name == "resnet8_cifar"
    again = build_model(module.hparams, start_weights=False)
    assert again.get_classifier().out_features == 4
    if hasattr(again, "_model_args"):  # where timm stores the arguments of the folder
        assert again.conv1.weight.shape == module.model.conv1.weight.shape == (16, 1, 3, 3)


def test_remote_name_in_a_checkpoint_is_not_downloaded(monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("fetched")

    monkeypatch.setattr(timm, "create_model", fetch)
    module = TQModule(name="hf-hub:someone/model", num_classes=4)
    with pytest.raises(UserError, match="names the model 'hf-hub:someone/model'"):
        build_model(module.hparams, start_weights=False)
