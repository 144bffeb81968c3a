"""Activation ranges: observers on known histograms, and calibration without side effects."""

import copy

import pytest
import torch
from torch import nn

from tq_lightning import bit_width, calibrate_activations, calibrate_norms, prepare
from tq_lightning.quant.activation_ranges import (
    OBSERVERS,
    ActivationRange,
    activation_ranges,
)
from tq_lightning.quant.quantized_tensors import quantized_layers


@pytest.fixture
def model(net, images):
    prepare(net, verbose=False, skip=("first",))
    calibrate_norms(net, [images])
    return net.eval()


STEPS = {  # name -> (range, top, (step, zero point))
    "unsigned": (ActivationRange(0.0, 2.55), 255, (0.01, 0)),
    "unsigned, 7 bits": (ActivationRange(0.0, 1.27), 127, (0.01, 0)),
    "signed": (ActivationRange(-1.0, 1.55), 255, (0.01, 100)),
    "negative": (ActivationRange(-2.55, 0.0), 255, (0.01, 255)),
}


@pytest.mark.parametrize("case", STEPS)
def test_step_and_zero_point_of_named_ranges(case):
    span, top, (step, zero) = STEPS[case]
    got = span.step(top)
    assert got == (pytest.approx(step), zero)
    assert got[0] * (0 - zero) == pytest.approx(span.low, abs=step / 2)
    assert got[0] * (top - zero) == pytest.approx(span.high, abs=step / 2)


def test_empty_range_has_a_positive_step():
    step, zero = ActivationRange(0.0, 0.0).step(255)
    assert step > 0 and zero == 0


def test_percentile_clips_an_outlier_and_mse_has_the_smallest_error():
    torch.manual_seed(0)
    values = torch.randn(200_000).relu()
    values[0] = 20.0
    counts = torch.histc(values, 4096, 0.0, 20.0).double()
    percentile, mse = (OBSERVERS[name](counts, 0.0, 20.0) for name in ("percentile", "mse"))
    assert percentile.low == mse.low == 0 and 3.5 < percentile.high < 4.2 < mse.high < 20
    errors = {}
    for high in (2.0, percentile.high, mse.high, 20.0):
        step, _ = ActivationRange(0.0, high).step(255)
        errors[high] = ((values / step).round().clamp(0, 255) * step - values).square().mean()
    assert min(errors, key=errors.get) == mse.high


@pytest.mark.parametrize("observer", OBSERVERS)
def test_signed_inputs_keep_both_sides(observer):
    counts = torch.histc(torch.linspace(-1.0, 3.0, 10_000), 4096, -1.0, 3.0).double()
    low, high = OBSERVERS[observer](counts, -1.0, 3.0)
    assert low == pytest.approx(-1.0, abs=0.06) and high == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_calibration_sees_the_inputs_of_quantized_layers(model, images, observer):
    ranges = calibrate_activations(model, [images[:2], images[2:]], observer)
    assert list(ranges) == ["conv", "fc"] == list(quantized_layers(model))
    assert activation_ranges(model) == ranges
    for bits in model.tq["widths"]:
        with torch.no_grad(), bit_width(model, bits, "truncate"):
            inside = model[:3](images)
            assert ranges["conv"].low == 0
            assert (inside <= ranges["conv"].high).float().mean() > 0.97
    assert copy.deepcopy(model).tq_ranges == ranges


def test_calibration_leaves_the_model_unchanged(model, images):
    model.train()
    model.conv.eval()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    calibrate_activations(model, [images])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert model.training and not model.conv.training and not model.conv._forward_pre_hooks


def test_trained_clips_are_used_as_ranges(net, images):
    prepare(net, verbose=False, activations="pact_round", skip=("first",))
    net.act1.clip.data.fill_(2.5)
    net.act2.clip.data.fill_(-1.0)
    assert activation_ranges(net) == {
        "act1": ActivationRange(0.0, 2.5),
        "act2": ActivationRange(0.0, pytest.approx(1e-3)),
    }
    ranges = calibrate_activations(net, [images])
    assert set(activation_ranges(net)) == {"act1", "act2", *ranges}


def test_invalid_input_is_an_error(model, images):
    with pytest.raises(ValueError, match="unknown observer 'max'; pass one of percentile, mse"):
        calibrate_activations(model, [images], "max")
    with pytest.raises(ValueError, match="no batches to observe"):
        calibrate_activations(model, [])
    with pytest.raises(ValueError, match="call prepare"):
        calibrate_activations(nn.Linear(2, 2), [images])
    with pytest.raises(ValueError, match="input of conv contains NaN or infinity"):
        calibrate_activations(model, [images * torch.nan])
    assert not hasattr(model, "tq_ranges")


class Named(nn.Module):
    """Layers called by keyword, an attention called by keyword, and an LSTM of packed sequences."""

    def __init__(self, by_name):
        super().__init__()
        self.stem, self.fc, self.by_name = nn.Linear(4, 8), nn.Linear(8, 8), by_name
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = self.fc(input=x) if self.by_name else self.fc(x)
        x, _ = self.attention(query=x, key=x, value=x)
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True)
        return self.head(self.lstm(packed)[1][0][0])


def test_layers_called_by_keyword_are_observed_and_other_kinds_are_not():
    torch.manual_seed(0)
    x, ranges = torch.rand(2, 3, 4), []
    for by_name in (True, False):
        torch.manual_seed(1)
        model = Named(by_name)
        prepare(model, verbose=False)
        assert {"attention", "lstm"} <= quantized_layers(model).keys()
        ranges.append(calibrate_activations(model.eval(), [x]))
    assert ranges[0] == ranges[1] and list(ranges[0]) == ["fc"]
    assert ranges[0]["fc"].low == 0 < ranges[0]["fc"].high
