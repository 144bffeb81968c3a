"""Norm statistics estimated from batches: weights, short batches, and lagging running averages."""

import copy
import math

import pytest
import torch
from torch import nn

from tq_lightning import bit_width, prepare
from tq_lightning.quant.activation_ranges import calibrate_activations
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.norm_calibration import (
    SETTLED,
    calibrate_norms,
    lagging_widths,
    reestimate_norms,
)
from tq_lightning.quant.switchable_norm import per_width_norms, untrained_widths, width_name


def test_statistics_are_the_plain_mean_over_the_batches_at_that_width(model, images):
    batches = [images, images * 3 + 1, images - 2]
    calibrate_norms(model, batches)
    for bits in (7, 3, None):
        with bit_width(model.eval(), None if bits is None else bits):
            seen = [model.stem(batch) for batch in batches]
        own = model.bn1.sets[width_name(bits)]
        mean = torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0)
        variance = torch.stack([s.transpose(0, 1).flatten(1).var(1) for s in seen]).mean(0)
        assert torch.allclose(own.running_mean, mean, atol=1e-5) and torch.allclose(
            own.running_var, variance, rtol=1e-4
        )
        assert own.num_batches_tracked == 3
    again = copy.deepcopy(model.state_dict())
    calibrate_norms(model, iter(batches))
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_batches_are_weighted_by_their_number_of_images(model, images):
    batches = [images[:2] * 3 + 1, images]
    calibrate_norms(model, batches, widths=[3])
    with bit_width(model.eval(), 3):
        seen = [model.stem(batch) for batch in batches]
    own = model.bn1.sets["3"]
    mean = (2 * seen[0].mean((0, 2, 3)) + 4 * seen[1].mean((0, 2, 3))) / 6
    assert torch.allclose(own.running_mean, mean, atol=1e-5)
    plain = (seen[0].mean((0, 2, 3)) + seen[1].mean((0, 2, 3))) / 2
    assert not torch.allclose(own.running_mean, plain, atol=1e-2)


def test_single_image_batch_is_skipped_unless_it_is_the_only_one():
    """PyTorch rejects a batch of one image with one pixel in training mode."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    prepare(model, skip=(), widths=(4,), verbose=False)
    rows = torch.randn(5, 3)
    calibrate_norms(model, [rows[:4]], widths=[2])
    expected = model[1].sets["2"].running_mean.clone()
    calibrate_norms(model, [rows[:4], rows[4:]], widths=[2])
    assert torch.equal(model[1].sets["2"].running_mean, expected)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        calibrate_norms(model, [rows[4:]], widths=[2])

    images = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    prepare(images, skip=(), widths=(4,), verbose=False)
    calibrate_norms(images, [torch.randn(1, 3, 5, 5)], widths=[2])
    assert images[1].sets["2"].running_mean.abs().sum() > 0


def test_short_last_batch_is_skipped_unless_it_is_the_only_one(model, images):
    def mean(*batches):
        calibrate_norms(model, batches, widths=[3])
        return model.bn1.sets["3"].running_mean.clone()

    full, other = mean(images), images * 3 + 1
    assert torch.equal(mean(images, other[:3]), full)
    assert not torch.equal(mean(images, other), full)
    assert not torch.equal(mean(other[:3], images), full)  # only the last one is skipped
    assert not torch.equal(mean(other[:3]), full)


def test_only_untrained_widths_can_be_estimated(model, images):
    with pytest.raises(ValueError, match="width 4 was trained"):
        calibrate_norms(model, [images], widths=[4])
    with pytest.raises(ValueError, match="no batches"):
        calibrate_norms(model, [])
    calibrate_norms(model, [], widths=[])
    plain = nn.Sequential(nn.Linear(3, 3))
    prepare(plain, skip=(), verbose=False)
    assert untrained_widths(plain) == []
    calibrate_norms(plain, [])
    with pytest.raises(ValueError, match="width 3 has no norm"):
        calibrate_norms(plain, [images], widths=[3])
    with pytest.raises(ValueError, match="width 9 has no norm"):
        calibrate_norms(model, [images], widths=[9])


BATCHES = {  # case -> (batches made of images, start of the error)
    "tensor": (lambda x: x, "the batches .* must be a list, got a Tensor; pass"),
    "none": (lambda x: None, "the batches .* must be a list, got a NoneType; pass"),
    "empty": (lambda x: [], "no batches to "),
    "with labels": (
        lambda x: [(x, torch.zeros(len(x)))],
        "is a tuple of 2 parts that Sequential.forward does not take .*; pass its inputs without",
    ),
    "mapping": (lambda x: [{"image": x}], "is a dict of 1 parts that Sequential.forward"),
    "arrays": (lambda x: [x.numpy()], "no tensor in the inputs of the network, a ndarray"),
}


@pytest.mark.parametrize("calibrate", [calibrate_norms, calibrate_activations])
@pytest.mark.parametrize("case", BATCHES)
def test_batches_that_the_network_does_not_take_are_errors(model, images, calibrate, case):
    make, message = BATCHES[case]
    with pytest.raises(ValueError, match=message):
        calibrate(model, make(images))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_that_are_not_finite_leave_no_statistics(model, images, value):
    """Their statistics are NaN, so that every output at that width would be."""
    before = copy.deepcopy(model.state_dict())
    images[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="contains NaN or infinity; check the images"):
        calibrate_norms(model, [images])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_error_during_estimation_leaves_the_model_unchanged(model, images):
    calibrate_norms(model, [images])
    model.train()
    with pytest.raises(RuntimeError):
        calibrate_norms(model, [images, images[:, :2]], widths=[3])
    assert all(m.training for m in model.modules())
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert width_of(model).bits == 8 and not model.bn1.calibrating
    with pytest.raises(ValueError, match="width 3 was not trained"), bit_width(model.eval(), 3):
        pass
    with bit_width(model, 1):
        pass


def test_error_during_estimation_restores_trained_statistics(model, images):
    norm = model.bn1.sets["4"]
    norm.num_batches_tracked.fill_(7)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(RuntimeError):
        reestimate_norms(model, [images, images[:, :2]], [4])
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    reestimate_norms(model, [images, images * 2], [4])
    assert not torch.equal(before["running_mean"], norm.running_mean)
    assert norm.num_batches_tracked == 7


def test_running_averages_lag_until_enough_updates(model, images):
    """Trained widths get the statistics of a calibrated width, and nothing else changes."""
    assert lagging_widths(model) == [8, 4, 2]  # a pretrained count is not an update of this run
    with bit_width(model.train(), 4):
        for _ in range(3):
            model(images)
    before = copy.deepcopy(model.state_dict())
    reestimate_norms(model, [images, images * 2], [4])
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {".".join(k.split(".")[1:]) for k in changed} == {
        "sets.4.running_mean",
        "sets.4.running_var",
    }
    assert model.training and model.bn1.sets["4"].num_batches_tracked == 3
    for norm in per_width_norms(model):
        norm.sets["4"].num_batches_tracked.fill_(SETTLED)
    assert lagging_widths(model) == [8, 2]
    calibrate_norms(model, [images, images * 2], [3])  # affine parameters of width 4
    seen = {}
    for bits in (4, 3):
        with bit_width(model.eval(), bits):
            seen[bits] = model.stem(images).mean((0, 2, 3))
    assert not torch.allclose(seen[4], seen[3])  # the widths have different statistics
    assert not torch.equal(model.bn1.sets["4"].running_mean, model.bn1.sets["3"].running_mean)


def test_a_model_without_batch_norms_has_no_lag():
    plain = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    prepare(plain, skip=(), norm="per_width_all", verbose=False)
    assert lagging_widths(plain) == [] and untrained_widths(plain)
