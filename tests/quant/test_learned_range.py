"""The learned range: its initial value, its gradient at every width, and no weight decay."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tq_lightning.quant.bit_width import Width, bit_width
from tq_lightning.quant.config import QuantConfig
from tq_lightning.quant.fused_weights import fused_weights
from tq_lightning.quant.prepare import prepare
from tq_lightning.quant.quantized_tensors import weight_quantizers
from tq_lightning.quant.weight import WeightQuantizer
from tq_lightning.training.optim import build_optimizer

LEARNED = {"level": "centre", "scale": "span"}
SHAPES = {  # name -> (shape, channel_dim, groups, shape of the ranges)
    "linear": ((5, 7), 0, 1, (5, 1)),
    "convolution": ((4, 3, 2, 2), 0, 1, (4, 1, 1, 1)),
    "transposed": ((6, 4, 2), 1, 1, (1, 1, 4, 1)),
    "transposed grouped": ((6, 4, 2, 2), 1, 3, (3, 1, 4, 1, 1)),
}


def weight(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.7


def rule(w, bits, normalizer="learned", channel_dim=0, groups=1, **choices):
    config = QuantConfig(normalizer=normalizer, **{**LEARNED, **choices})
    made = WeightQuantizer("w", Width(8, (8,), bits), config, channel_dim, groups)
    made.start_range(w)
    return made


def channel_of(shape, channel_dim, groups):
    """Compute the output channel of every weight independently."""
    index = torch.arange(shape[channel_dim])
    view = index.view([-1 if d == channel_dim else 1 for d in range(len(shape))]).expand(shape)
    if channel_dim == 0:
        return view
    group = torch.arange(shape[0]) // (shape[0] // groups)
    return view + group.view(-1, *(1,) * (len(shape) - 1)) * shape[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_range_starts_at_a_multiple_of_the_rms_of_each_channel(shape):
    size, channel_dim, groups, expected = SHAPES[shape]
    w = weight(*size)
    whole = rule(w, 2, channel_dim=channel_dim, groups=groups)
    assert whole.range.shape == ()
    torch.testing.assert_close(whole.range.detach(), 2.5 * w.square().mean().sqrt())
    each = rule(w, 2, "learned_channel", channel_dim, groups)
    assert each.range.shape == expected
    channel = channel_of(size, channel_dim, groups)
    by_hand = [2.5 * w[channel == c].square().mean().sqrt() for c in range(int(channel.max()) + 1)]
    torch.testing.assert_close(each.range.detach().flatten(), torch.stack(by_hand))


def test_range_of_a_zero_weight_starts_at_one():
    assert rule(torch.zeros(3, 3), 2).range.item() == 1.0


@pytest.mark.parametrize("level", ["centre", "centroid"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_range_gradient_equals_the_numerical_gradient(bits, level):
    """As in LSQ, the rounding error is held fixed while the range changes."""
    for name, (size, channel_dim, groups, _) in SHAPES.items():
        w, upstream = weight(*size), weight(*size, seed=4).double()
        made = rule(w, bits, "learned_channel", channel_dim, groups, level=level)
        made.range_layout = replace(made.range_layout, gain=1.0)
        made(w).backward(upstream.float())
        with torch.no_grad():
            u, scale = made.normalize(w)
            level_now = (made(w) / scale + 1) / 2
            error = (level_now - u).double()
        start = made.range.detach().double().flatten()
        channel = channel_of(size, channel_dim, groups)

        def loss(c, channel=channel, w=w, error=error, upstream=upstream):
            spread = c[channel]
            u = (w.double() / (2 * spread) + 0.5).clamp(0, 1)
            return (upstream * spread * (2 * (u + error) - 1)).sum()

        numeric = []
        for i in range(len(start)):
            step = torch.zeros_like(start)
            step[i] = 1e-5
            numeric.append((loss(start + step) - loss(start - step)) / 2e-5)
        got = made.range.grad.double().flatten()
        torch.testing.assert_close(got, torch.stack(numeric), rtol=1e-3, atol=1e-4, msg=name)


def test_range_gradient_needs_the_factor_of_center_levels():
    w = weight(50, 50)
    grads = []
    for ste in ("auto", "scaled"):
        made = rule(w, 2, ste=ste)
        made(w).sum().backward()
        grads.append(made.range.grad.item())
    assert QuantConfig(normalizer="learned", **LEARNED).resolved_ste == "identity"
    assert abs(grads[0] - grads[1]) > 1e-3


def test_range_gradient_is_divided_by_the_square_root_of_the_weight_count():
    w = weight(8, 50)
    for normalizer, count in (("learned", 400), ("learned_channel", 50)):
        made = rule(w, 3, normalizer)
        made(w).sum().backward()
        scaled, made.range.grad = made.range.grad.clone(), None
        made.range_layout = replace(made.range_layout, gain=1.0)
        made(w).sum().backward()
        torch.testing.assert_close(scaled * count**0.5, made.range.grad)


@pytest.mark.parametrize("normalizer", ["learned", "learned_channel"])
def test_fused_weights_are_bit_identical(normalizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 8, 3, groups=2))
    prepare(model, skip=(), normalizer=normalizer, verbose=False, **LEARNED)
    quantized = weight_quantizers(model)
    upstream = [torch.randn_like(q.original) for q in quantized]
    for q, g in zip(quantized, upstream, strict=True):
        with bit_width(model, 3):
            getattr(q.module, q.tensor).backward(g)
    with fused_weights(model) as fused, bit_width(model, 3):
        (group,) = fused.groups
        group.require_grad()
        group.add_grads(upstream)
        pairs = {id(p): g for p, g in group.gradients()}
    for q in quantized:
        assert torch.equal(pairs[id(q.quantizer.range)], q.quantizer.range.grad)
        assert torch.equal(pairs[id(q.original)], q.original.grad)


def test_training_finds_a_range_with_a_smaller_error():
    w = weight(40, 50)
    made = rule(w, 2)
    made.range.data.mul_(2)

    def error():
        return (made(w) - w).square().mean()

    before, optimizer = error().item(), torch.optim.Adam([made.range], lr=0.05)
    for _ in range(80):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert made.range.item() > 0 and error().item() < 0.5 * before


@pytest.mark.parametrize("normalizer", ["learned", "learned_channel"])
def test_range_has_no_weight_decay(normalizer):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    prepare(model, skip=(), normalizer=normalizer, verbose=False, **LEARNED)
    options = SimpleNamespace(opt="sgd", lr=0.1, weight_decay=0.5, momentum=0.9, opt_args=None)
    optimizer = build_optimizer(model, options)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for q in weight_quantizers(model):
        assert decay[id(q.quantizer.range)] == 0 and decay[id(q.original)] == 0.5


def test_range_is_shared_by_all_widths_and_stored_in_checkpoints():
    model = nn.Sequential(nn.Linear(4, 5))
    prepare(model, skip=(), normalizer="learned", verbose=False, **LEARNED)
    name = "0.parametrizations.weight.0.range"
    assert [k for k, _ in model.named_parameters() if "range" in k] == [name]
    model.load_state_dict({**model.state_dict(), name: torch.tensor(0.25)})
    for bits in range(1, 9):
        with bit_width(model, bits):
            assert model[0].weight.abs().max() <= 0.25
