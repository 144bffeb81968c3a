"""Float convolutions of integer models fold the norm of the width in use."""

import copy

import torch
from torch import nn

from tq_lightning import bit_width, calibrate_activations, prepare
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.integer import integer_model
from tq_lightning.quant.integer.float_conv import FloatConv
from tq_lightning.quant.switchable_norm import per_width_norms


def build_network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4 * 4, 2),
    )
    prepare(model, verbose=False)
    for norm in per_width_norms(model):
        norm.calibrated.fill_(True)
        for i, one in enumerate(norm.sets.values()):
            one.running_mean.fill_(0.1 * i)
            one.running_var.fill_(1.0 + i)
            one.weight.data.copy_(torch.linspace(-1.0, 1.0, len(one.weight)))
    return model.eval(), torch.randn(2, 3, 8, 8)


@torch.no_grad()
def test_norm_of_the_width_in_use_is_folded():
    model, images = build_network()
    folded = FloatConv(model[0], model[1], width_of(model))
    seen = []
    for bits in (8, 2, 8, 1):
        with bit_width(model, bits):
            expected = model[1](model[0](images))
            torch.testing.assert_close(folded(images), expected, rtol=1e-5, atol=1e-6)
            seen.append(expected)
    assert torch.equal(seen[0], seen[2]) and not torch.allclose(seen[0], seen[1], atol=0.01)


def test_integer_model_folds_the_stem_norm_and_keeps_other_float_layers():
    model, images = build_network()
    calibrate_activations(model, [images])
    run = integer_model(copy.deepcopy(model))
    names = [type(module).__name__ for module in run.network.children()]
    assert names.count("FloatConv") == 1 and "PerWidthNorm" not in names and "Linear" in names
    assert all(m._built is None for m in copy.deepcopy(run).modules() if isinstance(m, FloatConv))


def test_convolution_with_a_second_consumer_is_not_folded():
    class Twice(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.stem, self.norm, self.rest = layers[0], layers[1], layers[2:]

        def forward(self, x):
            x = self.stem(x)
            return self.rest(self.norm(x) + x)

    model, images = build_network()
    twice = Twice(model)
    twice.tq, twice.tq_width = getattr(model, "tq", None), getattr(model, "tq_width", None)
    calibrate_activations(twice, [images])
    run = integer_model(twice)
    assert not any(isinstance(module, FloatConv) for module in run.modules())
