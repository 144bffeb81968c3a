"""The width in use: restored on any exit, and never computed from codes of another width."""

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tq_lightning.quant import codes, fake_quantize, fused_weights
from tq_lightning.quant.bit_width import Width, bit_width, width_of
from tq_lightning.quant.norm_calibration import calibrate_norms
from tq_lightning.quant.prepare import prepare


@pytest.fixture
def model(net, images):
    prepare(net, skip=(), verbose=False)
    calibrate_norms(net, [images])
    return net.eval()


def test_a_prepared_model_starts_at_its_widest_trained_width(net, images):
    """A plain loop without `bit_width` trains a quantized model. Float must be requested."""
    net.eval()
    before = net(images)
    prepare(net, widths=(2, 4), verbose=False)
    assert (width_of(net).bits, width_of(net).source) == (4, "quantize")
    assert net.conv.weight.unique().numel() <= 16 and not torch.equal(net(images), before)
    with bit_width(net, 4):
        at_four = net(images)
    assert torch.equal(net(images), at_four)
    with bit_width(net, None):
        assert torch.equal(net(images), before)
    net.train()(images).sum().backward()
    assert net.bn1.sets["4"].weight.grad is not None and net.bn1.sets["2"].weight.grad is None


def test_width_follows_later_changes_of_the_modules(model):
    """Entering `bit_width` does not reuse modules found by an earlier call."""
    with bit_width(model, 4):
        pass
    copied = copy.deepcopy(model)
    with bit_width(copied, 2):
        assert (width_of(copied).bits, width_of(model).bits) == (2, 8)
    parent = nn.Sequential(model)
    assert width_of(parent) is width_of(model)
    parent._modules["0"] = copied  # as `prepare` swaps layers, which bypasses hooks
    assert width_of(parent) is width_of(copied)
    with bit_width(parent, 4):
        assert width_of(model).bits == 8
    parent.append(model)
    with pytest.raises(ValueError, match="parts of 2 prepared models"), bit_width(parent, 4):
        pass
    del parent[0]
    with bit_width(parent, 4):
        assert (width_of(model).bits, width_of(copied).bits) == (4, 8)


def test_shared_and_cyclic_modules_are_visited_once(model):
    both = nn.ModuleList([model, model])
    both[0]._modules["up"] = both  # a cycle, as some wrappers make
    with bit_width(both, 4):
        assert width_of(model).bits == 4
    del model._modules["up"]


def test_width_is_restored_on_exit_in_nested_blocks_and_after_an_error(model):
    width = width_of(model)
    with bit_width(model, 8) as inner:
        assert inner is model and (width.bits, width.source) == (8, "quantize")
        with bit_width(model, 2, "truncate"):
            assert (width.bits, width.source) == (2, "truncate")
            with bit_width(model, None):
                assert width.bits is None
            assert (width.bits, width.source) == (2, "truncate")
        with contextlib.suppress(KeyboardInterrupt), bit_width(model, 1):
            raise KeyboardInterrupt
        assert (width.bits, width.source) == (8, "quantize")
    with pytest.raises(RuntimeError), bit_width(model, 4):
        model(torch.zeros(1, 7, 6, 6))  # a wrong number of channels
    assert (width.bits, width.source) == (8, "quantize")


def test_another_thread_cannot_switch_the_width_inside_a_block(model):
    """Its images would run at a width that nobody asked for. A copy belongs to no thread."""

    def switch(network):
        with bit_width(network, 2):
            return width_of(network).bits

    with ThreadPoolExecutor(1) as other, bit_width(model, 4):
        copied = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match=r"another thread .* its own copy, e\.g\. copy"):
            other.submit(switch, model).result()
        assert width_of(model).bits == 4 and other.submit(switch, copied).result() == 2
    with ThreadPoolExecutor(1) as other:
        assert other.submit(switch, model).result() == 2
    assert (width_of(model).bits, width_of(model).depth) == (8, 0)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, "4", True])
def test_widths_out_of_range_are_errors(model, bits):
    with (
        bit_width(model, 2),
        pytest.raises(
            ValueError, match=r"unknown width .*; pass bits from 1 to 8, or None for float"
        ),
    ):
        bit_width(model, bits).__enter__()
    assert width_of(model).bits == 8


def test_widths_above_the_stored_width_are_errors(net):
    prepare(net, max_bits=4, widths=(4, 2), verbose=False)
    with (
        pytest.raises(ValueError, match="unknown width 8; pass bits from 1 to 4"),
        bit_width(net, 8),
    ):
        pass


def test_unknown_source_is_an_error(model):
    with (
        pytest.raises(ValueError, match="unknown source 'shift'; pass one of quantize, truncate"),
        bit_width(model, 4, "shift"),
    ):
        pass


def test_float_and_quantize_are_errors_on_a_packed_model(model):
    for layer in model.modules():
        if hasattr(layer, "width"):
            layer.width = Width(8, (8, 4), packed=True, default_source="truncate")
            packed = layer.width
    for layer in model.modules():
        if hasattr(layer, "width"):
            layer.width = packed
    assert packed.bits == 8
    with (
        pytest.raises(ValueError, match="no float weights; pass bits from 1 to 8"),
        bit_width(model, None),
    ):
        pass
    with pytest.raises(ValueError, match="pass source='truncate'"), bit_width(model, 4, "quantize"):
        pass
    with bit_width(model, 4):
        assert packed.source == "truncate"


def test_model_must_be_exactly_one_prepared_model(net):
    with (
        pytest.raises(ValueError, match="Sequential has no quantizers; call prepare"),
        bit_width(net, 4),
    ):
        pass
    two = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    for part in two:
        prepare(part, skip=(), verbose=False)
    with pytest.raises(ValueError, match="parts of 2 prepared models"), bit_width(two, 4):
        pass


@pytest.mark.parametrize("other", ["resnet18", nn.Linear, None])
def test_another_object_than_a_module_is_an_error(other):
    for call in (prepare, lambda model: bit_width(model, 4).__enter__(), width_of):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got .*; pass"):
            call(other)


def test_width_applies_to_submodules(model):
    with bit_width(model.conv, 2):
        assert width_of(model).bits == 2 and model.fc.weight.unique().numel() <= 4


def test_parametrization_cache_does_not_mix_widths(model, images):
    """The cache key has no width, so cached weights of one width must not be used at another."""
    alone = {}
    for bits in (8, 1, None):
        with bit_width(model, bits):
            alone[bits] = model(images)
    with parametrize.cached():
        for bits in (8, 1, None):
            with bit_width(model, bits):
                assert torch.equal(model(images), alone[bits])
        assert torch.equal(model(images), alone[8])
    with bit_width(model, 2), parametrize.cached():
        assert model.conv.weight is model.conv.weight


def logits_by_width(net, images):
    """Return {bits: logits of (quantized, truncated) weights}."""
    found = {}
    for bits in range(1, 9):
        logits = []
        for source in ("quantize", "truncate"):
            with bit_width(net, bits, source):
                logits.append(net(images))
        found[bits] = tuple(logits)
    return found


@pytest.mark.parametrize("activations", [None, "clamp_floor", "pact_floor_truncate"])
@pytest.mark.parametrize("normalizer", ["tanh", "absmax_channel"])
def test_floor_quantized_logits_equal_floor_truncated_logits(net, images, activations, normalizer):
    prepare(net, skip=(), activations=activations, normalizer=normalizer, verbose=False)
    calibrate_norms(net, [images])
    net.eval()
    for quantized, truncated in logits_by_width(net, images).values():
        assert torch.equal(quantized, truncated) and quantized.isfinite().all()


def test_round_quantized_logits_differ_from_round_truncated_logits(net, images):
    prepare(net, quantizer="round", skip=(), verbose=False)
    calibrate_norms(net, [images])
    net.eval()
    for bits, (quantized, truncated) in logits_by_width(net, images).items():
        assert torch.equal(quantized, truncated) == (bits in (1, 8))


@pytest.mark.parametrize("quantizer", ["floor", "round"])
def test_quantize_never_passes_through_stored_codes(net, images, monkeypatch, quantizer):
    prepare(
        net, quantizer=quantizer, skip=(), activations=f"clamp_{quantizer}_truncate", verbose=False
    )
    calibrate_norms(net, [images])

    def shift(*args):
        raise AssertionError("truncate_codes was called")

    for user in (fake_quantize, fused_weights):
        monkeypatch.setattr(user, "truncate_codes", shift)
    tops = []
    row = codes.QUANTIZERS[quantizer]
    spy = replace(
        row, unclamped_codes=lambda u, top: (tops.append(top), row.unclamped_codes(u, top))[1]
    )
    monkeypatch.setitem(codes.QUANTIZERS, quantizer, spy)
    for train in (False, True):
        for bits in (8, 4, 2, 1) if train else range(1, 9):
            tops.clear()
            with bit_width(net.train(train), bits, "quantize"):
                net(images).sum().backward()
            assert set(tops) == {2**bits - 1}
    with pytest.raises(AssertionError, match="was called"), bit_width(net.eval(), 4, "truncate"):
        net(images)
