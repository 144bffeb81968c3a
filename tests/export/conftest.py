"""Small prepared networks with norm statistics at every width, and the files packed from them."""

import pytest
import torch

from tq_lightning import bit_width, calibrate_norms, prepare, save_packed
from tq_lightning.models import create_model


def _make(name="resnet8_cifar", size=32, classes=10, model_args=None, **how):
    """(prepared model in evaluation mode, images): trained widths 8/4/2/1 have statistics, the others are calibrated."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=classes, **(model_args or {}))
    prepare(model, **{"verbose": False, **how})
    images = torch.randn(3, (model_args or {}).get("in_chans", 3), size, size)
    model.train()
    with torch.no_grad():
        for bits in model.tq["widths"]:
            with bit_width(model, bits):
                model(images)
    model.eval()
    calibrate_norms(model, [images])
    return model, images


@pytest.fixture(scope="session")
def make():
    return _make


@pytest.fixture(scope="session")
def net():
    return _make()


@pytest.fixture(scope="session")
def packed(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    save_packed(net[0], path)
    return path
