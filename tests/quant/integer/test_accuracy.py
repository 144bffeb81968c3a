"""Accuracy of integer mode on networks that are trained on handwritten digits in seconds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fixtures.integer_oracle import simulated
from sklearn.datasets import load_digits
from torch import nn

from tq_lightning import bit_width, calibrate_activations, prepare
from tq_lightning.models import create_model
from tq_lightning.quant.activation_ranges import OBSERVERS, ActivationRange
from tq_lightning.quant.integer import integer_model
from tq_lightning.quant.integer.kernels import missing_kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_kernels() is not None, reason=str(missing_kernels())),
]
WIDTHS = (8, 4, 2, 1)


def build_conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def build_vit():
    args = {
        "num_heads": 2,
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 1,
        "embed_dim": 32,
        "depth": 2,
    }
    return create_model("vit_tiny_patch16_224", num_classes=10, **args)


NETWORKS = {"conv": (build_conv_net, 8), "vit": (build_vit, 40)}  # name -> (make, epochs)


@pytest.fixture(scope="module")
def digits():
    """Return (training images, labels, test images, labels); images are (n, 1, 8, 8) in [-1, 1]."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y, order = (
        torch.tensor(labels),
        torch.randperm(len(x), generator=torch.Generator().manual_seed(0)),
    )
    train, test = order[400:], order[:400]
    return x[train], y[train], x[test], y[test]


def train_network(name, digits, activations=None):
    make, epochs = NETWORKS[name]
    torch.manual_seed(0)
    model, (x, y, *_) = make(), digits
    prepare(model, verbose=False, widths=WIDTHS, activations=activations)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * 11)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: 11 * 127].split(127):
            optimizer.zero_grad()
            for bits in WIDTHS:
                with bit_width(model, bits):
                    F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def predicted_classes(model, images, bits):
    with torch.inference_mode(), bit_width(model, bits, "truncate"):
        return model(images).argmax(1)


@pytest.fixture(scope="module", params=NETWORKS)
def trained(request, digits):
    return request.param, train_network(request.param, digits)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_integer_mode_loses_at_most_one_image(trained, observer, digits):
    """One of 400 images is 0.25 points. Ranges that are much too small lose many."""
    x, _, images, labels = digits
    name, model = trained[0], copy.deepcopy(trained[1])
    calibrate_activations(model, [x[:256]], observer)
    run = integer_model(copy.deepcopy(model))
    model.tq_ranges = {
        n: ActivationRange(r.low / 20, r.high / 20) for n, r in model.tq_ranges.items()
    }
    small = integer_model(copy.deepcopy(model))
    for bits in WIDTHS:
        right = [
            (predicted_classes(m, images, bits) == labels).sum().item() for m in (model, run, small)
        ]
        assert right[0] > (340 if bits > 1 else 280), f"{name} is not trained at {bits} bits"
        assert right[0] - right[1] <= 1, f"{observer}, {bits} bits: {right}"
        assert right[2] < right[0] - 10


def test_trained_activation_codes_predict_the_classes_of_their_simulation(digits):
    """Sums at bin edges may round either way in float32: at most one image of 400."""
    images = digits[2]
    model = train_network("conv", digits, activations="pact_round")
    run = integer_model(copy.deepcopy(model))
    for bits in WIDTHS:
        simulation, got = (
            predicted_classes(model, images, bits),
            predicted_classes(run, images, bits),
        )
        with simulated(run):
            exact = predicted_classes(run, images, bits)
        assert (got != simulation).sum() <= 1 and (got != exact).sum() <= 1
