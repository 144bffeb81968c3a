"""Activations: exact codes of every kind, gradients of PACT, truncated kinds, float width."""

import pytest
import torch

from tq_lightning.quant.activation import ACTIVATIONS, ActivationQuantizer
from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import QUANTIZERS
from tq_lightning.quant.ste import STES

PACT = [kind for kind, row in ACTIVATIONS.items() if row.learned]
CLAMP = [kind for kind in ACTIVATIONS if kind not in PACT]


def make_layer(
    kind: str,
    bits: int | None = 2,
    source: str = "quantize",
    ste: str = "identity",
    max_bits: int = 8,
):
    return ActivationQuantizer(kind, Width(max_bits, (max_bits,), bits, source), ste)


def make_inputs(clip: float) -> torch.Tensor:
    inside = torch.rand(500, generator=torch.Generator().manual_seed(0)) * clip
    return torch.cat(
        [
            torch.tensor(
                [-3.0, -0.0, 0.0, 1e-45, clip, clip + 1e-3, 1e30, float("inf"), -float("inf")]
            ),
            inside,
        ]
    )


EDGES = {  # name -> (kind, bits, x, y)
    "below zero": ("clamp_round", 4, -0.5, 0.0),
    "zero stays zero": ("clamp_floor", 2, 0.0, 0.0),
    "one stays one": ("clamp_floor", 2, 1.0, 1.0),
    "above one": ("clamp_round", 2, 7.0, 1.0),
    "round at 2 bits": ("clamp_round", 2, 0.3, 1 / 3),
    "floor at 2 bits": ("clamp_floor", 2, 0.3, 1 / 3),
    "floor just under its edge": ("clamp_floor", 2, 0.2499, 0.0),
    "round there": ("clamp_round", 2, 0.2499, 1 / 3),
    "one bit, floor": ("clamp_floor", 1, 0.5, 1.0),
    "one bit, round": ("clamp_round", 1, 0.5, 0.0),
    "pact clips at six": ("pact_round", 2, 9.0, 6.0),
    "pact's grid": ("pact_floor", 2, 1.6, 2.0),
}


@pytest.mark.parametrize("case", EDGES)
def test_named_values_are_exact(case):
    kind, bits, x, y = EDGES[case]
    assert make_layer(kind, bits)(torch.tensor([x])).item() == pytest.approx(y, abs=1e-6)


@pytest.mark.parametrize("source", ["quantize", "truncate"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_values_of_every_kind_equal_the_formula(kind, source):
    """Codes are made at the width in use; `*_truncate` shifts 8-bit codes if the weights do."""
    learned, quantizer, truncated = ACTIVATIONS[kind]
    clip = 6.0 if learned else 1.0
    x = make_inputs(clip)
    u = (x / clip).clamp(0, 1)
    for bits in range(1, 9):
        at_width = QUANTIZERS[quantizer].codes(u, bits)
        shifted = QUANTIZERS[quantizer].codes(u, 8) >> (8 - bits)
        codes = shifted if truncated and source == "truncate" else at_width
        exact = codes.float() / (2**bits - 1) * clip
        layer = make_layer(kind, bits, source)
        with torch.no_grad():
            assert torch.equal(layer(x), exact)
        assert torch.equal(layer(x.clone().requires_grad_()).detach(), exact)
        if quantizer == "floor":
            assert torch.equal(shifted, at_width)
        elif 1 < bits < 8:
            assert not torch.equal(shifted, at_width)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_float_width_clips_without_rounding(kind):
    clip = 6.0 if kind in PACT else 1.0
    x = make_inputs(clip)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(make_layer(kind, None)(x), x.clamp(0, clip))


@pytest.mark.parametrize("bits", [None, 1, 2, 8])
@pytest.mark.parametrize("kind", CLAMP)
def test_input_gradient_is_one_inside_the_clip_and_zero_outside(kind, bits):
    x = torch.tensor([-2.0, -1e-3, 0.2, 0.9, 1.1, 5.0], requires_grad=True)
    make_layer(kind, bits)(x).backward(torch.arange(1.0, 7.0))
    assert x.grad.tolist() == [0, 0, 3, 4, 0, 0]


@pytest.mark.parametrize("bits", [None, 1, 2, 8])
@pytest.mark.parametrize("ste", STES)
@pytest.mark.parametrize("kind", PACT)
def test_pact_clip_gradient_is_one_for_clipped_inputs(kind, ste, bits):
    """dy/dclip is 1 if x >= clip, else 0, for every rule; x gets no gradient beyond the clip."""
    layer = make_layer(kind, bits, ste=ste)
    x = torch.tensor([-2.0, -1e-3, 1.0, 5.9, 6.0, 6.1, 100.0], requires_grad=True)
    layer(x).backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]))
    assert layer.clip.grad.item() == 16 + 32 + 64
    assert x.grad[:2].tolist() == [0, 0] and x.grad[-3:].tolist() == [0, 0, 0]
    assert x.grad.isfinite().all() and x.grad[2:4].abs().sum() > 0
    if ste == "identity" or bits is None:
        assert x.grad[2:4].tolist() == pytest.approx([4, 8])


@pytest.mark.parametrize("bits", [None, 2])
def test_negative_clip_can_recover(bits):
    layer = make_layer("pact_round", bits)
    with torch.no_grad():
        layer.clip.fill_(-0.5)
    out = layer(torch.tensor([1.0, 2.0, -1.0]))
    assert out.isfinite().all() and out.max() > 0
    out.sum().backward()
    assert layer.clip.grad.item() == 2


def test_learned_clip_converges_to_the_best_value():
    """Gradient descent on the clip alone fits y = min(x, 2) from clip 6."""
    layer = make_layer("pact_floor", 8, ste="clipped")
    x = torch.linspace(0, 8, 200)
    for _ in range(60):
        layer.clip.grad = None
        (layer(x) - x.clamp(max=2)).square().mean().backward()
        layer.clip.data -= 0.5 * layer.clip.grad
    assert layer.clip.item() == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("kind", ["clamp_round", "pact_floor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_output_keeps_its_dtype_and_is_computed_in_float32(kind, dtype):
    x = (torch.randn(300) * 3).to(dtype)
    for bits in (None, 1, 8):
        layer = make_layer(kind, bits)
        exact = layer(x.float()).to(dtype)
        assert torch.equal(layer(x), exact) and layer(x).dtype == dtype
        assert torch.equal(layer.to(dtype)(x), exact)


def test_truncation_starts_at_a_stored_width_below_8():
    x = torch.rand(100)
    layer = make_layer("clamp_round_truncate", 2, "truncate", max_bits=4)
    assert torch.equal(layer(x), (QUANTIZERS["round"].codes(x, 4) >> 2).float() / 3)


def test_empty_batch_is_accepted():
    assert make_layer("pact_round", 2)(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_input_may_be_passed_by_keyword_as_to_relu(kind):
    layer, x = make_layer(kind, 4), torch.tensor([-1.0, 0.3, 2.0])
    assert torch.equal(layer(input=x), layer(x)) and not torch.equal(layer(x), x)


def test_unknown_kind_and_ste_are_errors():
    with pytest.raises(
        ValueError, match="unknown activations 'relu'; pass null or one of clamp_round"
    ):
        make_layer("relu")
    with pytest.raises(ValueError, match="unknown ste 'none'"):
        make_layer("clamp_round", ste="none")
