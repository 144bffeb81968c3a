"""Straight-through estimators: exact values, finite gradients, and each row's formula."""

import math

import pytest
import torch
from torch import Tensor

from tq_lightning.quant.codes import LEVELS, QUANTIZERS, codes_to_levels
from tq_lightning.quant.fake_quantize import FakeQuantize
from tq_lightning.quant.ste import STES, range_gradient, resolve_ste

EDGES = torch.tensor([0.0, 1e-45, 0.25, 0.5, 0.75, 1 - 2**-24, 1.0])


def make_values() -> Tensor:
    return torch.cat([EDGES, torch.rand(200, generator=torch.Generator().manual_seed(1))])


def value_and_gradient(
    ste: str,
    u: Tensor,
    bits: int,
    quantizer: str,
    grad: Tensor,
    level: str = "endpoint",
    signed: bool = False,
):
    """Return (value, dL/du) of the node at scale 1, given dL/dvalue."""
    u = u.clone().requires_grad_()
    out = FakeQuantize.apply(
        u, torch.tensor(1.0), signed, bits, quantizer, ste, level, 8, "quantize"
    )
    out.backward(grad)
    return out.detach(), u.grad


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("ste", STES)
def test_every_rule_keeps_the_value_and_gives_finite_gradients(ste, quantizer):
    u = make_values()
    for bits in range(1, 9):
        for level in LEVELS:
            grad = torch.linspace(-3, 3, len(u))
            value, got = value_and_gradient(ste, u, bits, quantizer, grad, level)
            assert torch.equal(
                value, codes_to_levels(QUANTIZERS[quantizer].codes(u, bits), bits, level)
            )
            assert got.shape == u.shape and got.dtype == torch.float32 and got.isfinite().all()
            assert (got * grad >= 0).all()  # a rule scales a gradient and never flips its sign
            assert got.abs().sum() > 0
            assert torch.equal(grad, torch.linspace(-3, 3, len(u)))


@pytest.mark.parametrize("ste", STES)
def test_elementwise_is_true_only_if_a_rule_reads_u_or_level(ste):
    """Other rules must work with None for both."""
    row, grad = STES[ste], torch.ones(3)
    if row.elementwise:
        with pytest.raises((TypeError, AttributeError)):
            row.rule(grad, None, None, 2, "floor")
    else:
        assert row.rule(grad, None, None, 2, "floor").shape == (3,)


def dsq_formula(grad: float, u: float, level: float, bits: int, quantizer: str) -> float:
    top = 2**bits - 1
    edges = (
        [k / 2**bits for k in range(1, 2**bits)]
        if quantizer == "floor"
        else [(k + 0.5) / top for k in range(top)]
    )
    d = min((u - e for e in edges), key=abs)
    width = 2**-bits if quantizer == "floor" else 1 / top
    k = 5 / width
    return grad * (1 / top) / 2 / math.tanh(k * width / 2) * k * (1 - math.tanh(k * d) ** 2)


FORMULAS = {  # independent formulas from the papers: (grad, u, level, bits, quantizer) -> grad
    "identity": lambda g, u, v, n, q: g,
    "scaled": lambda g, u, v, n, q: g * (1 - 2.0**-n),
    "slope": lambda g, u, v, n, q: g / (1 - 2.0**-n),
    "clipped": lambda g, u, v, n, q: g if 0 < u < 1 else 0.0,
    "ewgs": lambda g, u, v, n, q: g * (1 + 1e-3 * math.copysign(1, g) * (u - v)),
    "dsq": dsq_formula,
}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("ste", FORMULAS)
def test_gradient_equals_the_published_formula(ste, quantizer):
    u = make_values()
    for bits in (1, 2, 5, 8):
        grad = torch.linspace(-2, 2, len(u) + 1)[:-1]
        level, got = value_and_gradient(ste, u, bits, quantizer, grad)
        rows = zip(grad.tolist(), u.tolist(), level.tolist(), strict=True)
        expected = torch.tensor([FORMULAS[ste](g, x, v, bits, quantizer) for g, x, v in rows])
        assert torch.allclose(got, expected, rtol=1e-3 if ste == "dsq" else 1e-6, atol=2e-4), bits


# a documented example -> (ste, quantizer, bits, u, level, what a gradient of 1 becomes, as printed)
EXAMPLES = {
    "identity": ("identity", "floor", 2, 0.4, 1 / 3, 1.0, "stays 1"),
    "scaled": ("scaled", "floor", 2, 0.4, 1 / 3, 3 / 4, "3/4"),
    "slope": ("slope", "floor", 2, 0.4, 1 / 3, 4 / 3, "4/3"),
    "clipped inside": ("clipped", "floor", 2, 0.4, 1 / 3, 1.0, "keeps a gradient of 1"),
    "clipped at the end": ("clipped", "floor", 2, 1.0, 1.0, 0.0, "u = 1 (level 1) gets 0"),
    "ewgs": ("ewgs", "floor", 2, 0.4, 1 / 3, 1.0000667, "1.0000667"),
    "dsq on the edge": ("dsq", "floor", 1, 0.5, 1.0, 5.068, "5.068"),
    "dsq far from it": ("dsq", "floor", 1, 0.0, 0.0, 0.00092, "0.00092"),
}


@pytest.mark.parametrize("case", EXAMPLES)
def test_documented_examples_are_correct(case):
    ste, quantizer, bits, u, level, expected, printed = EXAMPLES[case]
    assert printed in STES[ste].rule.__doc__
    value, got = value_and_gradient(ste, torch.tensor([u]), bits, quantizer, torch.ones(1))
    assert value.item() == pytest.approx(level, abs=1e-7)
    assert got.item() == pytest.approx(expected, rel=2e-3 if ste == "dsq" else 1e-7)


@pytest.mark.parametrize("ste", STES)
def test_every_rule_is_documented_with_an_example_and_a_source(ste):
    assert all(word in STES[ste].rule.__doc__ for word in ("Example", "Source", "dL/du"))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_dsq_staircase_rises_by_one_step_per_bin(quantizer):
    """The mean slope over an inner bin, centered at an edge, is step height over bin width."""
    for bits in (1, 2, 4):
        edge, width = QUANTIZERS[quantizer].edges(torch.tensor([0.5]), bits)
        u = edge + width * (torch.arange(1000) + 0.5 - 500) / 1000
        _, slopes = value_and_gradient("dsq", u, bits, quantizer, torch.ones(1000))
        assert slopes.mean().item() == pytest.approx(1 / (2**bits - 1) / width, rel=1e-4)
        assert slopes.argmax().item() in (499, 500)


@pytest.mark.parametrize("source", ["quantize", "truncate"])
def test_gradient_has_the_factor_of_scale_and_sign(source):
    """Weights are scale * (2 level - 1), activations scale * level; gradients have this factor."""
    u, scale = torch.tensor([[0.1, 0.6], [0.3, 0.9]]), torch.tensor([[2.0], [0.5]])
    for signed in (True, False):
        leaf = u.clone().requires_grad_()
        out = FakeQuantize.apply(leaf, scale, signed, 2, "floor", "identity", "endpoint", 8, source)
        level = torch.tensor([[0, 2], [1, 3]]) / 3
        assert torch.allclose(out, scale * (2 * level - 1) if signed else scale * level)
        out.sum().backward()
        assert torch.allclose(leaf.grad, (2 * scale if signed else scale).expand(2, 2))


def test_source_selects_the_codes():
    u = torch.tensor([0.2, 0.2001])
    args = (torch.tensor(1.0), False, 2, "round", "identity", "endpoint", 8)
    assert torch.allclose(FakeQuantize.apply(u, *args, "quantize"), torch.tensor([1 / 3, 1 / 3]))
    assert torch.equal(FakeQuantize.apply(u, *args, "truncate"), torch.tensor([0.0, 0.0]))


def test_auto_ste_is_the_pairing_of_the_paper():
    assert resolve_ste("auto", "floor") == "scaled" and resolve_ste("auto", "round") == "identity"
    assert all(resolve_ste(name, q) == name for name in STES for q in QUANTIZERS)
    with pytest.raises(
        ValueError, match="unknown ste 'straight'; pass auto or one of identity, scaled"
    ):
        resolve_ste("straight", "floor")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_range_gradient_follows_the_chain_rule(quantizer, bits):
    """Autograd through w^ = c (2 level - 1), where level has the gradient of identity."""
    w = torch.randn(300, generator=torch.Generator().manual_seed(3))
    c = torch.tensor(0.8, requires_grad=True)
    grad = torch.randn(300, generator=torch.Generator().manual_seed(4))
    u = (w / (2 * c) + 0.5).clamp(0.0, 1.0)
    level = codes_to_levels(QUANTIZERS[quantizer].codes(u.detach(), bits), bits, "centre")
    (c * (2 * (u + (level - u).detach()) - 1)).backward(grad)

    scale = torch.tensor(0.8, requires_grad=True)
    args = (True, bits, quantizer, "identity", "centre", 8, "quantize")
    FakeQuantize.apply(u.detach().requires_grad_(), scale, *args).backward(grad)
    assert scale.grad.item() == pytest.approx(c.grad.item(), rel=1e-4, abs=1e-4)
    inside = (w.abs() < 0.8).float()
    w_hat = 0.8 * (2 * level - 1)
    lsq = (grad * (w_hat - inside * w) / 0.8).sum()
    assert scale.grad.item() == pytest.approx(lsq.item(), rel=1e-4, abs=1e-4)


def test_range_gradient_has_exact_values():
    u, level, one = torch.tensor([0.4, 1.0]), torch.tensor([0.375, 0.875]), torch.ones(2)
    grad = range_gradient(one, 2.0 * one, u, level, torch.tensor(1.0), 2, "floor")
    assert grad.tolist() == pytest.approx([-0.05, 0.75])


def test_fixed_scale_gets_no_gradient():
    u, scale = torch.rand(4).requires_grad_(), torch.tensor(2.0)
    out = FakeQuantize.apply(u, scale, True, 2, "floor", "identity", "endpoint", 8, "quantize")
    out.sum().backward()
    assert scale.grad is None and u.grad is not None
