"""The recipe of the paper, with float pass and shared norms, against NumPy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tq_lightning import bit_width, prepare
from tq_lightning.quant.config import QuantConfig
from tq_lightning.quant.switchable_norm import PerWidthNorm
from tq_lightning.training.joint import joint_loss

RNG = np.random.default_rng(0)
X, W, V, G = (RNG.normal(size=s) for s in ((6, 3), (4, 3), (2, 4), (6, 2)))
KEYS = {"float_pass": "normalized", "shared_norms": ("bn",), "activations": "clamp_round"}


def network(**choices):
    """Build a quantized linear layer, batch norm, ReLU and a float linear layer."""
    net = nn.Sequential()
    net.add_module("first", nn.Linear(3, 4, bias=False))
    net.add_module("bn", nn.BatchNorm1d(4))
    net.add_module("act", nn.ReLU())
    net.add_module("last", nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        net.first.weight.copy_(torch.tensor(W))
        net.last.weight.copy_(torch.tensor(V))
    prepare(net, "round", skip=("last",), widths=(8, 2), verbose=False, **choices)
    return net.train()


def weight(w, bits):
    """Return E tanh(w) / max|tanh w|, rounded to 2^bits levels unless `bits` is None."""
    t, scale = np.tanh(w) / np.abs(np.tanh(W)).max(), np.abs(W).mean()
    if bits is None:
        return scale * t
    top = 2**bits - 1
    return scale * (2 * np.round(top * (t + 1) / 2) / top - 1)


def hidden(w, bits):
    before = X @ weight(w, bits).T
    return before, (before - before.mean(0)) / np.sqrt(before.var(0) + 1e-5)


def loss(w):
    return float((G * (np.maximum(hidden(w, None)[1], 0) @ V.T)).sum())


def numeric_gradient():
    """Return central differences of the float pass; mean|w| and max|tanh w| are held fixed."""
    grad = np.zeros_like(W)
    for i in np.ndindex(W.shape):
        step = np.zeros_like(W)
        step[i] = 1e-6
        grad[i] = (loss(W + step) - loss(W - step)) / 2e-6
    return grad


def test_float_pass_is_the_normalized_weight_and_a_plain_relu():
    net, x = network(**KEYS), torch.tensor(X, dtype=torch.float32)
    normalized = hidden(W, None)[1]
    assert normalized.max() > 1  # the ReLU matters: a clamp would give other logits
    with bit_width(net, None):
        out = net(x)
    np.testing.assert_allclose(out.detach(), np.maximum(normalized, 0) @ V.T, rtol=1e-5, atol=1e-6)
    (out * torch.tensor(G)).sum().backward()
    gradient = net.first.parametrizations.weight.original.grad
    np.testing.assert_allclose(gradient, numeric_gradient(), rtol=1e-4, atol=1e-6)

    plain = network(activations="clamp_round")
    with bit_width(plain, None):
        assert torch.equal(plain.first.weight, torch.tensor(W, dtype=torch.float32))
        assert not torch.allclose(plain(x), out, atol=0.1)


def test_joint_step_has_the_same_gradient_and_updates_one_norm():
    net, x = network(**KEYS), torch.tensor(X, dtype=torch.float32)
    g = torch.tensor(G, dtype=torch.float32)
    total, _ = joint_loss(
        net, x, (None, 8, 2), lambda bits, out, wider: (g * out).sum(), [1.0, 0.0, 0.0]
    )
    total.backward()
    gradient = net.first.parametrizations.weight.original.grad
    np.testing.assert_allclose(gradient, numeric_gradient(), rtol=1e-4, atol=1e-6)
    assert isinstance(net.bn, nn.BatchNorm1d)
    mean = np.zeros(4)
    for bits in (None, 8, 2):
        mean = 0.9 * mean + 0.1 * hidden(W, bits)[0].mean(0)
    np.testing.assert_allclose(net.bn.running_mean, mean, rtol=1e-5, atol=1e-7)


def test_shared_norm_patterns_are_checked():
    assert isinstance(network().bn, PerWidthNorm)
    assert network(**KEYS).tq["shared_norms"] == ["bn"]
    assert "float_pass" not in network().tq  # files of earlier versions lack this key
    untouched = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"shared_norms pattern 'skip' matches no norm.*'1'"):
        prepare(untouched, skip=(), shared_norms=["skip"], verbose=False)
    assert prepare(copy.deepcopy(untouched), skip=(), verbose=False)  # nothing was attached
    with pytest.raises(ValueError, match="shared_norms must be a list"):
        QuantConfig(shared_norms="bn")
    with pytest.raises(ValueError, match="unknown float_pass 'half'; pass one of plain, norm"):
        QuantConfig(float_pass="half")
