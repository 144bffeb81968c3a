"""Switchable norms: the width selects a norm, and calibration changes only untrained norms."""

import copy

import pytest
import torch
from torch import nn

from tq_lightning.quant.bit_width import bit_width, width_of
from tq_lightning.quant.norm_calibration import calibrate_norms
from tq_lightning.quant.prepare import prepare
from tq_lightning.quant.switchable_norm import (
    FLOAT,
    PerWidthNorm,
    per_width_norms,
    train_float_norms,
    untrained_widths,
    width_name,
)

KEYS = [*map(str, range(1, 9)), FLOAT]


def test_every_width_has_a_norm_that_starts_as_a_copy_of_the_layer(net):
    before = copy.deepcopy(net.bn1)
    prepare(net, verbose=False)
    norm = net.bn1
    assert isinstance(norm, PerWidthNorm) and list(norm.sets) == KEYS
    for layer in norm.sets.values():
        for (name, value), (_, own) in zip(
            before.state_dict().items(), layer.state_dict().items(), strict=True
        ):
            assert torch.equal(value, own), name
    storages = {layer.weight.data_ptr() for layer in norm.sets.values()}
    assert len(storages) == len(KEYS)
    trained = {key for key, layer in norm.sets.items() if layer.weight.requires_grad}
    assert trained == {"8", "4", "2", "1"}


@pytest.mark.parametrize("bits", [8, 4, 2, None])
def test_training_updates_only_the_norm_of_the_width(model, images, bits):
    before = copy.deepcopy(model.state_dict())
    with bit_width(model.train(), bits):
        model(images).sum().backward()
    moved = {
        name.split(".")[2]
        for name, value in model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved == {width_name(bits)}
    for key, layer in model.bn1.sets.items():
        assert (layer.weight.grad is not None) == (key == width_name(bits) and bits is not None)


@pytest.mark.parametrize("bits", [8, 4, 2, None])
def test_evaluation_uses_the_norm_of_the_width(model, bits):
    x = torch.randn(2, 6, 3, 3)
    with bit_width(model, bits):
        got = model.bn1(x)
        assert (
            model.bn1.weight is model.bn1.sets[width_name(bits)].weight
        )  # attributes are those of the set in use
    own = model.bn1.sets[width_name(bits)]
    assert torch.equal(got, own(x))
    assert all(
        not torch.equal(got, other(x)) for other in model.bn1.sets.values() if other is not own
    )


def test_untrained_width_is_an_error_until_calibrated(model, images):
    for bits in (7, 3, 1):
        with (
            pytest.raises(
                ValueError, match=f"width {bits} was not trained .* call calibrate_norms"
            ),
            bit_width(model, bits, "truncate"),
        ):
            pass
    assert width_of(model).bits == 8
    calibrate_norms(model, [images], widths=[3])
    with bit_width(model, 3):
        assert model(images).isfinite().all()
    with pytest.raises(ValueError, match="width 1 was not trained"), bit_width(model, 1):
        pass
    calibrate_norms(model, [images])
    for bits in range(1, 9):
        with bit_width(model, bits, "truncate"):
            assert model(images).isfinite().all()


def test_training_an_untrained_width_is_an_error(model, images):
    calibrate_norms(model, [images])
    with (
        pytest.raises(ValueError, match="width 3 has no trainable norm; train one of 2, 4, 8"),
        bit_width(model.train(), 3),
    ):
        pass


def test_calibration_changes_only_untrained_norms(net, images):
    net.pool = nn.Sequential(net.pool, nn.Dropout(0.5))
    prepare(net, skip=(), widths=(8, 4, 2), verbose=False)
    net.train()
    net.bn2.eval()
    net.conv.eval()
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    momenta = [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    rng = torch.get_rng_state()
    with bit_width(net, 2, "truncate"):
        calibrate_norms(net, [images, images * 2])
        assert (width_of(net).bits, width_of(net).source) == (2, "truncate")
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in net.modules()] == modes
    assert [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    assert all(p.grad is None for p in net.parameters())
    untrained = {f"sets.{width_name(bits)}" for bits in untrained_widths(net)}
    assert untrained == {"sets.7", "sets.6", "sets.5", "sets.3", "sets.1", f"sets.{FLOAT}"}
    for name, value in net.state_dict().items():
        estimated = "running" in name or "num_batches" in name
        if ".".join(name.split(".")[1:3]) in untrained and estimated:
            assert not torch.equal(value, before[name]), name
        elif not name.endswith("calibrated"):
            assert torch.equal(value, before[name]), name
    assert net.bn1.calibrated.tolist() == [bits in (7, 6, 5, 3, 1) for bits in range(9)]


def test_affine_parameters_come_from_the_next_wider_trained_width(model, images):
    calibrate_norms(model, [images])
    for bits, donor in {7: 8, 6: 8, 5: 8, 3: 4, 1: 2, None: 8}.items():
        for norm in per_width_norms(model):
            assert torch.equal(norm.sets[width_name(bits)].weight, norm.sets[str(donor)].weight)
            assert torch.equal(norm.sets[width_name(bits)].bias, norm.sets[str(donor)].bias)


def test_widths_above_all_trained_ones_copy_the_widest(net, images):
    prepare(net, skip=(), widths=(4, 2), verbose=False)
    net.bn1.sets["4"].weight.data.fill_(0.7)
    calibrate_norms(net, [images])
    assert (net.bn1.sets["8"].weight == 0.7).all() and (net.bn1.sets[FLOAT].weight == 0.7).all()


def test_float_norm_can_be_trained(model, images):
    train_float_norms(model)
    assert untrained_widths(model) == [7, 6, 5, 3, 1]
    with bit_width(model.train(), None):
        model(images).sum().backward()
    assert model.bn1.sets[FLOAT].weight.grad is not None
    with pytest.raises(ValueError, match="width none was trained"):
        calibrate_norms(model, [images], widths=[None])


def test_norms_without_statistics_need_only_affine_parameters(images):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)
    )
    prepare(model, skip=(), norm="per_width_all", verbose=False)
    assert len(per_width_norms(model)) == 2
    model[1].sets["4"].weight.data.fill_(2.0)
    calibrate_norms(model, [images])
    assert (model[1].sets["3"].weight == 2).all()
    with bit_width(model.eval(), 3):
        assert model(images).isfinite().all()


def test_shared_norm_is_used_at_every_width(images):
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.Conv2d(3, 3, 1), shared)
    prepare(model, skip=(), verbose=False)
    assert model[1] is model[3] and len(per_width_norms(model)) == 1
    with bit_width(model.train(), 4):
        model(images)
    assert shared.num_batches_tracked == 0 and model[1].sets["4"].num_batches_tracked == 2


def test_missing_attribute_error_names_the_attribute(model):
    with pytest.raises(AttributeError, match="no_such"):
        _ = model.bn1.no_such
    assert model.bn1.eps == 1e-5 and model.bn1.num_features == 6
