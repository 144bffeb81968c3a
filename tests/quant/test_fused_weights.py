"""Fused weights against the weights that the layers make on their own: values bit for bit."""

import pytest
import torch
from torch import nn

from tq_lightning import bit_width, prepare
from tq_lightning.quant.bit_width import width_of
from tq_lightning.quant.codes import LEVELS, NORMALIZERS, QUANTIZERS
from tq_lightning.quant.fused_weights import FusedWeights, fused_weights
from tq_lightning.quant.ste import STES
from tq_lightning.quant.weight import original, weight_quantizers


def layers(**how):
    """Weights of odd sizes: contiguous, channels last, transposed and grouped, strided, frozen."""
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


def compare(model, bits, source="quantize"):
    """Values and float-weight gradients of each layer, alone and fused; the same upstream."""
    quantized = weight_quantizers(model)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(w.original.shape, generator=generator) for w in quantized]
    with bit_width(model, bits, source):
        alone = [getattr(w.module, w.tensor) for w in quantized]
    trained = [w.original for w in quantized if w.original.requires_grad]
    total = sum((a * g).sum() for a, g in zip(alone, upstream, strict=True))
    alone_grads = torch.autograd.grad(total, trained)
    with fused_weights(model) as fused:
        with bit_width(model, bits, source):
            (group,) = fused.groups
            group.require_grad()
            made = [getattr(w.module, w.tensor) for w in quantized]
        total = sum((a * g).sum() for a, g in zip(made, upstream, strict=True))
        group.add_grads(torch.autograd.grad(total, group.leaves))
        fused_grads = group.weight_grads()
        assert len(group.trained) == len(trained)
        assert all(a is b for a, b in zip(group.trained, trained, strict=True))
    return alone, made, alone_grads, fused_grads


def close(alone, fused):
    """Autograd keeps t = tanh(w), the fused backward recovers it from u: equal up to rounding."""
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(alone, fused, strict=True)
    )


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_values_and_gradients_are_those_of_the_layers(quantizer, normalizer):
    for level in LEVELS:
        model = layers(quantizer=quantizer, normalizer=normalizer, level=level)
        for bits, source in ((8, "quantize"), (3, "quantize"), (3, "truncate"), (1, "quantize")):
            alone, made, alone_grads, fused_grads = compare(model, bits, source)
            assert all(torch.equal(a, b) for a, b in zip(alone, made, strict=True))
            assert all(a.stride() == b.stride() for a, b in zip(alone[:3], made[:3], strict=True))
            assert close(alone_grads, fused_grads)


@pytest.mark.parametrize("ste", STES)
def test_every_ste(ste):
    *_, alone_grads, fused_grads = compare(layers(ste=ste), 2)
    assert close(alone_grads, fused_grads)


def test_gradients_of_widths_add_up_and_differ_from_those_of_one():
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
        total = fused.groups[0].weight_grads()
    for one, other, both in zip(two, four, total, strict=True):
        assert torch.allclose(one + other, both, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(one, both, rtol=1e-3)


def test_a_weight_that_took_no_part_gets_no_gradient():
    model = layers()
    with fused_weights(model) as fused, bit_width(model, 2):
        (group,) = fused.groups
        group.require_grad()
        group.add_grads([torch.ones_like(group.leaves[0]), None, None, None])
        grads = group.weight_grads()
    assert grads[0] is not None and grads[1:] == [None, None, None]


def test_weights_are_normalized_once_and_released(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 4))
    prepare(model, skip=(), verbose=False)
    calls = []
    plain = FusedWeights.normalize
    monkeypatch.setattr(FusedWeights, "normalize", lambda self: (calls.append(self), plain(self)))
    rule = weight_quantizers(model)[0].quantizer
    with pytest.raises(RuntimeError, match="inside"), fused_weights(model):
        for bits in (8, 4, 2):
            with bit_width(model, bits):
                model(torch.ones(1, 6))
        raise RuntimeError("inside")
    assert len(calls) == 1 and rule.made is None and width_of(model).fused is None
    with fused_weights(model) as outer:  # an evaluation of several batches, and each batch
        for _ in range(3):
            with fused_weights(model) as inner, bit_width(model, 4):
                assert inner is outer
                model(torch.ones(1, 6))
    assert len(calls) == 2 and rule.made is None and width_of(model).fused is None
    with bit_width(model, 2):
        before = model[0].weight
        with torch.no_grad():
            original(model[0], "weight").mul_(0.5).add_(0.1)
        assert not torch.equal(model[0].weight, before)


def test_float_width_inside_reads_the_parameters():
    model = layers()
    with fused_weights(model):
        with bit_width(model, 2):
            assert not torch.equal(model[0].weight, original(model[0], "weight"))
        with bit_width(model, None):
            assert model[0].weight is original(model[0], "weight")


HUGE = {"a sum above float32": 3e37, "one of 1e30": 1e30, "zero": 0.0, "smallest": 1e-45}


@pytest.mark.parametrize("case", HUGE)
def test_hard_weights(case):
    for normalizer in NORMALIZERS:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(2, 2))
        prepare(model, skip=(), normalizer=normalizer, verbose=False)
        with torch.no_grad():
            original(model[0], "weight").fill_(HUGE[case])
        alone, made, alone_grads, fused_grads = compare(model, 2)
        assert all(torch.equal(a, b) for a, b in zip(alone, made, strict=True))
        assert close(alone_grads, fused_grads)
        assert all(m.isfinite().all() for m in made)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(net, images, bad):
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


def test_autocast_does_not_keep_the_weights_of_another_width():
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
