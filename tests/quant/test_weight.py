"""The weight quantizer: normalizers, gradients against float64 autograd, extreme weights."""

from dataclasses import replace

import pytest
import torch
from fixtures.pairings import pairings
from torch import Tensor

from tq_lightning.quant.bit_width import Width, bit_width
from tq_lightning.quant.codes import QUANTIZERS, codes_to_levels
from tq_lightning.quant.config import QuantConfig
from tq_lightning.quant.level_tables import level_table
from tq_lightning.quant.normalizers import NORMALIZERS
from tq_lightning.quant.prepare import prepare
from tq_lightning.quant.quantized_tensors import original, weight_quantizers
from tq_lightning.quant.ste import STES
from tq_lightning.quant.weight import WeightQuantizer

SHAPES = {  # name -> (shape, channel_dim, groups)
    "linear": ((5, 7), 0, 1),
    "convolution": ((4, 3, 2, 2), 0, 1),
    "depthwise": ((6, 1, 3), 0, 6),
    "transposed": ((6, 4, 2), 1, 1),
    "transposed grouped": ((6, 4, 2, 2), 1, 3),
}


def make_rule(
    bits: int | None = 2, source: str = "quantize", channel_dim: int = 0, groups: int = 1, **choices
) -> WeightQuantizer:
    return WeightQuantizer(
        "stem.weight",
        Width(8, (8, 4, 2, 1), bits, source),
        QuantConfig(**choices),
        channel_dim=channel_dim,
        groups=groups,
    )


def initialized_normalizer(w: Tensor, bits: int = 2, **choices) -> WeightQuantizer:
    """Return a normalizer whose learned range, if any, is initialized from `w`."""
    rule = make_rule(bits, **choices)
    if NORMALIZERS[rule.normalizer].reference == "learned":
        rule.start_range(w)
    return rule


def make_weight(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.7


def channel_masks(shape: tuple[int, ...], channel_dim: int, groups: int) -> list[Tensor]:
    """Return the weights that each output channel uses, as one explicit mask per channel."""
    masks = []
    for g in range(groups if channel_dim else 1):
        for channel in range(shape[channel_dim]):
            mask = torch.zeros(shape, dtype=torch.bool)
            if channel_dim:
                inputs = shape[0] // groups
                mask[g * inputs : (g + 1) * inputs, channel] = True
            else:
                mask[channel] = True
            masks.append(mask)
    return masks


def reference_normalize(
    w: Tensor, normalizer: str, channel_dim: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Return (u, scale) in float64, shape of `w`; differentiable in w, its maximum held fixed."""
    w = w.double()
    row = NORMALIZERS[normalizer]
    t = w.tanh() if normalizer.startswith("tanh") else w
    whole = [torch.ones(w.shape, dtype=torch.bool)]
    u, scale = torch.zeros_like(w), torch.zeros_like(w)
    for mask in (
        channel_masks(tuple(w.shape), channel_dim, groups)
        if normalizer.endswith("_channel")
        else whole
    ):
        rms = w[mask].square().mean().sqrt().detach()
        if row.reference == "rms":
            part, top = row.squash(w.detach() / rms) + (w - w.detach()) / (rms * row.span), 1.0
            size = rms * row.span
        elif row.reference == "learned":
            size = top = 2.5 * rms
            part = w.clamp(-top, top)
        else:
            part, top = t, t[mask].abs().max().detach()
            size = w[mask].abs().mean().detach()
        u = torch.where(mask, part / (2 * top) + 0.5, u)
        scale = torch.where(mask, size, scale)
    return u, scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_normalizer_equals_the_reference(normalizer, shape):
    size, channel_dim, groups = SHAPES[shape]
    w = make_weight(*size)
    choices = pairings(normalizer)[0]
    rule = initialized_normalizer(w, **choices, channel_dim=channel_dim, groups=groups)
    u, scale = rule.normalize(w)
    exact_u, exact_scale = reference_normalize(w, normalizer, channel_dim, groups)
    assert u.dtype == scale.dtype == torch.float32 and u.shape == w.shape
    assert torch.allclose(u.double(), exact_u.detach(), atol=1e-6)
    assert torch.allclose(scale.expand(size).double(), exact_scale, rtol=1e-6)
    if NORMALIZERS[normalizer].reference != "max":
        return
    if normalizer.endswith("_channel"):
        for mask in channel_masks(size, channel_dim, groups):
            assert (u[mask] - 0.5).abs().max() == 0.5
    else:
        assert (u - 0.5).abs().max() == 0.5 and scale.dim() == 0


def test_grouped_transposed_convolution_has_other_channels():
    """The output channels of a tensor depend on the number of groups."""
    w = make_weight(6, 4, 2)
    u_grouped = make_rule(normalizer="absmax_channel", channel_dim=1, groups=3).normalize(w).u
    u_plain = make_rule(normalizer="absmax_channel", channel_dim=1, groups=1).normalize(w).u
    assert not torch.allclose(u_grouped, u_plain)


@pytest.mark.parametrize("source", ["quantize", "truncate"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_weight_value_equals_the_formula(normalizer, quantizer, source):
    w = make_weight(4, 3, 2)
    for choices in pairings(normalizer, quantizer):
        level = choices["level"]
        for bits in range(1, 9):
            rule = initialized_normalizer(w, bits, source=source, **choices)
            u, scale = rule.normalize(w)
            codes = (
                QUANTIZERS[quantizer].codes(u, bits)
                if source == "quantize"
                else QUANTIZERS[quantizer].codes(u, 8) >> (8 - bits)
            )
            table = level_table(level, normalizer, bits)
            exact = scale * (2 * codes_to_levels(codes, bits, level, table=table) - 1)
            assert torch.equal(rule(w), exact)
            assert torch.equal(
                rule(w.clone().requires_grad_()), exact
            )  # the training path has the same bits
            per_scale = [rule(w)] if scale.dim() == 0 else list(rule(w))
            assert all(values.unique().numel() <= 2**bits for values in per_scale)


def test_float_width_returns_the_weight_itself():
    w = make_weight(3, 3)
    assert make_rule(None)(w) is w


def test_codes_returns_the_stored_codes():
    w = make_weight(5, 4).requires_grad_()
    rule = make_rule(2)
    codes, scale = rule.codes(w)
    assert (
        torch.equal(codes, QUANTIZERS["floor"].codes(rule.normalize(w).u, 8))
        and not scale.requires_grad
    )
    assert torch.equal(scale, w.detach().abs().mean())
    narrow = WeightQuantizer("a", Width(4, (4,), 4))
    assert narrow.codes(w)[0].max() == 15


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_weight_gradient_equals_the_formula(normalizer, shape):
    """dL/dw = dL/dw^ * 2E * factor * du/dw; neither the maximum nor E carries a gradient."""
    size, channel_dim, groups = SHAPES[shape]
    upstream = torch.randn(size, generator=torch.Generator().manual_seed(4))
    rms = NORMALIZERS[normalizer].reference == "rms"  # by hand, with the slope of the values
    factors = (("identity", 1.0), ("scaled", 3 / 4), ("slope", 4 / 3))
    for ste, factor in (("value", 1.0),) if rms else factors:
        w = make_weight(*size).requires_grad_()
        choices = {**pairings(normalizer)[0], "ste": ste}
        rule = initialized_normalizer(w, **choices, channel_dim=channel_dim, groups=groups)
        rule(w).backward(upstream)
        exact = make_weight(*size).requires_grad_()
        u, scale = reference_normalize(exact, normalizer, channel_dim, groups)
        (upstream.double() * 2 * scale * factor * u).sum().backward()
        assert torch.allclose(w.grad, exact.grad, rtol=1e-4, atol=1e-6)


HARD = {  # name -> weight (4, 3)
    "all zero": torch.zeros(4, 3),
    "minus zero": -torch.zeros(4, 3),
    "constant": torch.full((4, 3), 0.3),
    "constant, negative": torch.full((4, 3), -0.3),
    "one value": torch.zeros(4, 3).index_fill(0, torch.tensor(1), 0.5),
    "denormal": make_weight(4, 3) * 1e-40,
    "smallest": torch.full((4, 3), 1e-45),
    "tiny": make_weight(4, 3) * 1e-30,
    "huge": make_weight(4, 3) * 1e30,
    "a sum above float32": torch.full((4, 3), 3e37),
    "huge and tiny": torch.tensor([[1e30], [1e-30], [-1e30], [0.0]]).expand(4, 3).contiguous(),
}


def assert_finite(weight, normalizer, choices):
    for bits in (1, 2, 8):
        w = weight.clone().requires_grad_()
        rule = initialized_normalizer(w, bits, **choices)
        out = rule(w)
        out.backward(torch.linspace(-1, 1, 12).view(4, 3))
        assert out.isfinite().all(), (choices, bits)
        # dL/dlevel = dL/dw^ * 2 scale overflows where several rms are near the end of float32
        assert w.grad.isfinite().all() or (weight.max() > 1e37 and rule.scale_kind == "span")
        if NORMALIZERS[normalizer].reference == "max":
            assert out.abs().max() <= 1.001 * w.detach().abs().max()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("case", HARD)
def test_extreme_weights_stay_finite(case, normalizer):
    for quantizer in QUANTIZERS:
        for ste in STES:
            if STES[ste].uniform and NORMALIZERS[normalizer].reference == "rms":
                continue
            for choices in pairings(normalizer, quantizer):
                assert_finite(HARD[case], normalizer, {**choices, "ste": ste})


def test_simple_weights_have_exact_values():
    for bits in (1, 2, 8):
        assert torch.equal(make_rule(bits)(torch.zeros(2, 2)), torch.zeros(2, 2))
        for value in (0.5, -0.5):
            assert torch.equal(
                make_rule(bits)(torch.full((2, 2), value)), torch.full((2, 2), value)
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_or_infinity_is_an_error_that_names_the_layer(bad, normalizer, dtype):
    w = make_weight(4, 3).to(dtype)
    w[2, 1] = bad
    rule = initialized_normalizer(torch.ones(4, 3), **pairings(normalizer)[0])
    for call in (rule, rule.normalize, rule.codes):
        with pytest.raises(ValueError, match=r"weight stem\.weight contains NaN or infinity"):
            call(w)


def test_nan_error_in_a_model_names_the_layer(net, images):
    prepare(net, verbose=False)
    original(net.conv, "weight").data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"conv\.weight"), bit_width(net, 4):
        net(images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_computation_is_float32_for_every_weight_dtype(dtype):
    w = make_weight(16, 16).to(dtype)
    for bits in (1, 2, 8):
        rule = make_rule(bits)
        assert torch.equal(rule.codes(w)[0], rule.codes(w.float())[0])
        assert rule(w).dtype == dtype and torch.equal(rule(w), rule(w.float()).to(dtype))


@pytest.mark.parametrize("train", [False, True])
def test_computation_is_float32_under_autocast_and_in_bfloat16_models(
    net, images, monkeypatch, train
):
    seen = []

    row = QUANTIZERS["floor"]

    def unclamped_codes(u: Tensor, top: float) -> Tensor:
        seen.append(u.dtype)
        return row.unclamped_codes(u, top)

    monkeypatch.setitem(QUANTIZERS, "floor", replace(row, unclamped_codes=unclamped_codes))
    prepare(net, skip=(), activations="pact_floor", verbose=False)
    net.train(train)
    weights = {}
    for name, context in (("plain", False), ("autocast", True)):
        with (
            bit_width(net, 2),
            torch.autocast("cpu", torch.bfloat16, enabled=context),
            torch.set_grad_enabled(train),
        ):
            weights[name] = net.conv.weight.detach()
            net(images).float().sum()
    assert torch.equal(weights["plain"], weights["autocast"])
    net.to(torch.bfloat16)
    with bit_width(net, 2), torch.set_grad_enabled(train):
        assert net(images.bfloat16()).dtype == torch.bfloat16
    assert len(seen) >= 15 and set(seen) == {torch.float32}


def test_weight_quantizers_lists_full_names(net):
    prepare(net, skip=("last",), verbose=False)
    found = weight_quantizers(net)
    assert [weight.name for weight in found] == ["stem.weight", "conv.weight"]
    assert found[1].module is net.conv and found[1].quantizer.name == "conv.weight"
    assert found[1].original is original(net.conv, "weight")
    assert weight_quantizers(net.conv)[0].name == "weight"


@pytest.mark.parametrize("key", ["quantizer", "ste", "level", "normalizer"])
def test_unknown_choice_error_lists_the_valid_ones(key):
    with pytest.raises(ValueError, match=f"unknown {key} 'nearest'; pass"):
        make_rule(**{key: "nearest"})
