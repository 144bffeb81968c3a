import lightning as L
import pytest
import torch
from torch import nn

from tq_lightning.callbacks.ema import MovingAverage


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


@pytest.fixture
def average():
    """Return a moving average and its module, as they are after `setup`."""
    module, callback = Module(), MovingAverage(0.5)
    callback.setup(L.Trainer(accelerator="cpu", logger=False), module, "fit")
    return callback, module


def test_average_moves_to_the_device_of_the_model(average):
    """The meta device stands in for a GPU, to which Lightning moves the model after `setup`."""
    callback, module = average
    module.to("meta")
    assert callback._average_model.module.layer.weight.device.type == "cpu"
    callback.on_fit_start(None, module)
    assert callback._average_model.module.layer.weight.device.type == "meta"
    assert callback._average_model.n_averaged.device.type == "cpu"


def test_average_follows_the_weights_by_its_decay(average):
    callback, module = average
    callback.on_fit_start(None, module)
    first = module.layer.weight.detach().clone()
    for shift in (0.0, 1.0):  # the first update copies the weights
        with torch.no_grad():
            module.layer.weight.copy_(first + shift)
        callback._average_model.update_parameters(module)
    assert torch.allclose(callback._average_model.module.layer.weight, first + 0.5)
