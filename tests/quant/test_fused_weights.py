"""Fused weights against the weights that the layers compute themselves, bit for bit."""

import copy
from contextlib import nullcontext

import pytest
import torch
from fixtures.pairings import pairings
from torch import nn
from torch.nn.utils import parametrize

from tq_lightning import bit_width, prepare
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.codes import QUANTIZERS
from tq_lightning.quant.fused_weights import FlatWeights, fused_weights
from tq_lightning.quant.normalizers import NORMALIZERS
from tq_lightning.quant.quantized_tensors import original, weight_quantizers
from tq_lightning.quant.ste import STES


def layers(**how):
    """Build layers of odd sizes: contiguous, channels last, transposed, grouped, frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(7, 5),
        nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last),
        nn.ConvTranspose1d(4, 6, 3, groups=2),
        nn.Linear(3, 4),
        nn.Linear(2, 2),
    )
    model[3].weight = nn.Parameter(torch.randn(4, 6)[:, ::2])
    model[4].weight.requires_grad_(False)
    prepare(model, skip=(), verbose=False, **how)
    return model


def set_learned_ranges(model):
    """Set a range for every weight that some of its elements exceed."""
    for w in weight_quantizers(model):
        learned = 0.5 * w.quantizer.reduce(w.original.detach().abs(), "max")
        w.quantizer.range = nn.Parameter(learned.clone())


def parameters(quantized):
    """Return the trainable parameters of the quantized weights."""
    found = []
    for w in quantized:
        found += [p for p in (w.original, w.quantizer.range) if p is not None and p.requires_grad]
    return found


def compare(model, bits, source="quantize"):
    """Compare values and parameter gradients of each layer, alone and fused."""
    quantized = weight_quantizers(model)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(w.original.shape, generator=generator) for w in quantized]
    with bit_width(model, bits, source):
        alone = [getattr(w.module, w.tensor) for w in quantized]
    trained = parameters(quantized)
    total = sum((a * g).sum() for a, g in zip(alone, upstream, strict=True))
    alone_grads = torch.autograd.grad(total, trained)
    with fused_weights(model) as fused:
        with bit_width(model, bits, source):
            (group,) = fused.groups
            group.require_grad()
            leaves = [getattr(w.module, w.tensor) for w in quantized]
        made = [leaf.detach().clone() for leaf in leaves]  # gradients take their memory
        total = sum((a * g).sum() for a, g in zip(leaves, upstream, strict=True))
        group.add_grads(torch.autograd.grad(total, group.leaves))
        owners, fused_grads = zip(*group.gradients(), strict=True)
        assert all(a is b for a, b in zip(owners, trained, strict=True))
    return alone, made, alone_grads, fused_grads


def all_equal(alone, fused):
    return all(torch.equal(a, b) for a, b in zip(alone, fused, strict=True))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_fused_values_and_gradients_equal_those_of_the_layers(quantizer, normalizer):
    for choices in pairings(normalizer, quantizer):
        model = layers(**choices)
        for bits, source in ((8, "quantize"), (3, "quantize"), (3, "truncate"), (1, "quantize")):
            alone, made, alone_grads, fused_grads = compare(model, bits, source)
            assert all_equal(alone, made)
            assert all(a.stride() == b.stride() for a, b in zip(alone[:3], made[:3], strict=True))
            assert all_equal(alone_grads, fused_grads)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_between_widths_nested_codes_replace_normalized_weights(quantizer):
    model = layers(quantizer=quantizer)
    with fused_weights(model) as fused:
        for bits in (8, 2):
            with bit_width(model, bits):
                (group,) = fused.groups
                group.require_grad()
                group.add_grads([torch.ones_like(leaf) for leaf in group.leaves])
        held = {v.data_ptr(): v.nbytes for v in vars(group).values() if isinstance(v, torch.Tensor)}
        buffers = sum(held.values()) / group._buffer.nbytes
    # the weights of a width, the sum of gradients, and either codes of a byte or floats
    assert buffers == pytest.approx(2.25 if QUANTIZERS[quantizer].nested else 3.0, abs=0.02)


@pytest.mark.parametrize("ste", STES)
def test_every_ste_gives_the_same_gradients_when_fused(ste):
    *_, alone_grads, fused_grads = compare(layers(ste=ste), 2)
    assert all_equal(alone_grads, fused_grads)


@pytest.mark.parametrize("ste", STES)
@pytest.mark.parametrize("normalizer", ["absmax", "tanh_channel"])
def test_learned_range_gets_the_same_gradient_when_fused(ste, normalizer):
    model = layers(ste=ste, normalizer=normalizer, level="centre")
    set_learned_ranges(model)
    for bits, source in ((4, "quantize"), (1, "truncate")):
        alone, made, alone_grads, fused_grads = compare(model, bits, source)
        assert all_equal(alone, made) and all_equal(alone_grads, fused_grads)
        assert all(g.abs().sum() > 0 for g in fused_grads)
    for w in weight_quantizers(model):
        w.quantizer.range.requires_grad_(False)
    assert len(compare(model, 4)[3]) == 4  # all weights except the frozen one


def test_learned_range_of_a_frozen_weight_is_trained():
    model = layers(normalizer="absmax")
    set_learned_ranges(model)
    quantized = weight_quantizers(model)
    with fused_weights(model) as fused, bit_width(model, 2):
        fused.groups[0].require_grad()
        fused.groups[0].add_grads([torch.ones_like(v) for v in fused.groups[0].leaves])
        owners = {id(p) for p, _ in fused.groups[0].gradients()}
    assert owners == {id(p) for p in parameters(quantized)}
    assert id(quantized[-1].quantizer.range) in owners
    assert id(quantized[-1].original) not in owners


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_negative_range_recovers(value):
    model = nn.Sequential(nn.Linear(3, 4))
    prepare(model, skip=(), normalizer="absmax", verbose=False)
    rule = weight_quantizers(model)[0].quantizer
    rule.range = nn.Parameter(torch.tensor(value))
    alone, made, alone_grads, fused_grads = compare(model, 2)
    assert all_equal(alone, made) and all_equal(alone_grads, fused_grads)
    assert rule.range_layout.value(rule.range).item() == pytest.approx(1e-6) and alone_grads[1] != 0


def test_non_finite_range_is_named():
    model = nn.Sequential(nn.Linear(3, 4))
    prepare(model, skip=(), normalizer="absmax", verbose=False)
    weight_quantizers(model)[0].quantizer.range = nn.Parameter(torch.tensor(float("nan")))
    for scope in (nullcontext, fused_weights):
        with (
            pytest.raises(ValueError, match=r"0\.weight contains NaN or infinity"),
            scope(model),
            bit_width(model, 4),
        ):
            model(torch.ones(1, 3))


def test_gradients_of_several_widths_are_summed():
    model = layers()
    (*_, two), (*_, four) = compare(model, 2), compare(model, 4)
    with fused_weights(model) as fused:
        for bits in (4, 2):
            with bit_width(model, bits):
                fused.groups[0].require_grad()
            generator = torch.Generator().manual_seed(1)
            upstream = [
                torch.randn(w.original.shape, generator=generator) for w in weight_quantizers(model)
            ]
            fused.groups[0].add_grads(upstream[: len(fused.groups[0].leaves)])
        total = [grad for _, grad in fused.groups[0].gradients()]
    for one, other, both in zip(two, four, total, strict=True):
        assert torch.allclose(one + other, both, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(one, both, rtol=1e-3)


def test_unused_weight_gets_no_gradient():
    model = layers()
    with fused_weights(model) as fused, bit_width(model, 2):
        (group,) = fused.groups
        group.require_grad()
        group.add_grads([torch.ones_like(group.leaves[0]), None, None, None])
        ((owner, grad),) = group.gradients()
    assert owner is original(model[0], "weight") and grad.abs().sum() > 0


def test_weights_are_normalized_once_and_released(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 4))
    prepare(model, skip=(), verbose=False)
    calls = []
    plain = FlatWeights.normalize
    monkeypatch.setattr(FlatWeights, "normalize", lambda self: (calls.append(self), plain(self)))
    rule = weight_quantizers(model)[0].quantizer
    with pytest.raises(RuntimeError, match="inside"), fused_weights(model):
        for bits in (8, 4, 2):
            with bit_width(model, bits):
                model(torch.ones(1, 6))
        raise RuntimeError("inside")
    assert len(calls) == 1 and rule.fused_weight is None and width_of(model).fused is None
    with fused_weights(model) as outer:  # an evaluation of several batches, and each batch alone
        for _ in range(3):
            with fused_weights(model) as inner, bit_width(model, 4):
                assert inner is outer
                model(torch.ones(1, 6))
    assert len(calls) == 2 and rule.fused_weight is None and width_of(model).fused is None
    with bit_width(model, 2):
        before = model[0].weight
        with torch.no_grad():
            original(model[0], "weight").mul_(0.5).add_(0.1)
        assert not torch.equal(model[0].weight, before)


def test_float_width_uses_the_parameters():
    model = layers()
    with fused_weights(model):
        with bit_width(model, 2):
            assert not torch.equal(model[0].weight, original(model[0], "weight"))
        with bit_width(model, None):
            assert torch.equal(model[0].weight, original(model[0], "weight"))


HUGE = {"a sum above float32": 3e37, "one of 1e30": 1e30, "zero": 0.0, "smallest": 1e-45}


@pytest.mark.parametrize("case", HUGE)
def test_extreme_weights_equal_those_of_the_layers(case):
    for normalizer in NORMALIZERS:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(2, 2))
        prepare(model, skip=(), **pairings(normalizer)[0], verbose=False)
        with torch.no_grad():
            original(model[0], "weight").fill_(HUGE[case])
        alone, made, alone_grads, fused_grads = compare(model, 2)
        assert all_equal(alone, made) and all_equal(alone_grads, fused_grads)
        assert all(m.isfinite().all() for m in made)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight_is_named(net, images, bad):
    prepare(net, verbose=False)
    original(net.conv, "weight").data[0, 0, 0, 0] = bad
    with (
        pytest.raises(ValueError, match=r"conv\.weight contains NaN or infinity"),
        fused_weights(net),
        bit_width(net, 4),
    ):
        net(images)
    with fused_weights(net, check=False) as fused, bit_width(net, 4):
        assert not fused.groups[0].finite


def test_autocast_cache_does_not_mix_widths():
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    prepare(model, skip=(), verbose=False)
    x = torch.randn(2, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for bits in (8, 2):
            with bit_width(model, bits):
                alone = model(x)
            with fused_weights(model):
                for other in (8, 4, 2):
                    with bit_width(model, other):
                        if other == bits:
                            assert torch.equal(model(x), alone)
                        else:
                            model(x)


def test_layers_have_their_original_class_while_their_weights_are_fused():
    """Reading a weight then costs as much as in the float network."""
    model = layers()
    convolution, inner = model[1], type(model[1])
    with fused_weights(model) as fused, bit_width(model, 4):
        assert type(convolution) is nn.Conv2d
        tensors = {t.data_ptr() for t in fused.groups[0].tensors}
        assert convolution.weight.data_ptr() in tensors
        with bit_width(model, 2):
            assert type(convolution) is nn.Conv2d
    assert type(convolution) is inner and "weight" not in vars(convolution)
    with pytest.raises(RuntimeError), fused_weights(model), bit_width(model, 4):
        raise RuntimeError
    assert type(convolution) is inner and "weight" not in vars(convolution)


def test_layers_with_another_parametrization_keep_their_class():
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    model = layers()
    linear = model[0]
    parametrize.register_parametrization(linear, "bias", Double())
    inner = type(linear)
    with fused_weights(model) as fused, bit_width(model, 4):
        assert type(linear) is inner
        assert linear.weight.data_ptr() in {t.data_ptr() for t in fused.groups[0].tensors}
        assert torch.equal(linear.bias, 2 * linear.parametrizations.bias.original)


def test_weights_in_another_dtype_are_cast():
    model = layers().to(torch.bfloat16)
    with fused_weights(model), bit_width(model, 4):
        fused = model[1].weight
        assert type(model[1]) is not nn.Conv2d and fused.dtype == torch.bfloat16
    with bit_width(model, 4):
        assert torch.equal(fused, model[1].weight)


def test_layers_whose_class_was_derived_after_prepare_keep_it():
    model = layers()
    linear = model[0]
    inner = type(linear)
    linear.__class__ = type("Tripled", (inner,), {"forward": lambda self, x: 3 * x})
    x = torch.randn(2, 7)
    with fused_weights(model), bit_width(model, 4):
        assert torch.equal(linear(x), 3 * x)
    linear.__class__ = type("Mixed", (type("Mixin", (), {}), inner), {})
    with fused_weights(model), bit_width(model, 4):
        assert type(linear).__name__ == "Mixed"
        linear.weight  # noqa: B018


def test_copy_of_a_model_with_fused_weights_computes_its_own():
    model = layers()
    with fused_weights(model):
        other = copy.deepcopy(model)
    with torch.no_grad():
        original(other[1], "weight").mul_(-1.5)
    fresh = layers()
    fresh.load_state_dict(other.state_dict())
    with bit_width(other, 8), bit_width(fresh, 8):
        assert torch.equal(other[1].weight, fresh[1].weight)
    assert width_of(other).fused is None and width_of(other) is not width_of(model)


def move_weights(self):
    """Do what cuDNN does to the weights of an RNN: move them to one new buffer."""
    weights = self._flat_weights
    buffer = torch.cat([w.detach().reshape(-1) for w in weights])
    for w, part in zip(weights, buffer.split([w.numel() for w in weights]), strict=True):
        with torch.no_grad():
            w.set_(part.view(w.shape))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_weights_stay_in_the_fused_buffer(kind, monkeypatch):
    """Otherwise the first width would run at every width on a GPU."""
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", move_weights)
    torch.manual_seed(0)
    model = nn.Sequential(kind(4, 6))
    prepare(model, skip=(), verbose=False)
    x = torch.randn(5, 2, 4)
    with torch.no_grad(), fused_weights(model):
        for bits in (8, 2):
            with bit_width(model, bits):
                got = model(x)[0]
            alone = copy.deepcopy(model)
            with bit_width(alone, bits):
                assert torch.equal(got, alone(x)[0])
