"""A prepared model in PyTorch: copies, checkpoints, dtypes, compilation."""

import copy
import shutil

import pytest
import torch
import torch._dynamo as dynamo
from torch import nn

from tq_lightning.quant.bit_width import bit_width, width_of
from tq_lightning.quant.norm_calibration import calibrate_norms
from tq_lightning.quant.prepare import prepare
from tq_lightning.quant.quantized_tensors import original, weight_quantizers

PASSES = [(bits, source) for bits in range(8, 0, -1) for source in ("quantize", "truncate")] + [
    (None, "quantize")
]


@pytest.fixture
def model(net, images):
    """Prepare rounded weights and learned, truncated activations, so that all passes differ."""
    prepare(
        net, quantizer="round", activations="pact_round_truncate", skip=("last",), verbose=False
    )
    calibrate_norms(net, [images])
    return net.eval()


@torch.no_grad()
def all_logits(model, images):
    out = {}
    for bits, source in PASSES:
        with bit_width(model, bits, source):
            out[bits, source] = model(images)
    return out


def all_equal(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def test_deep_copies_are_independent(model, images):
    before = all_logits(model, images)
    with bit_width(model, 4):
        model.train()(images).sum().backward()  # a copy may be taken in the middle of training
        model.eval()
    before = all_logits(model, images)
    copied = copy.deepcopy(model)
    assert all_equal(all_logits(copied, images), before) and copied.tq == model.tq
    assert width_of(copied) is not width_of(model)
    assert len({id(m.width) for m in copied.modules() if hasattr(m, "width")}) == 1
    with bit_width(copied, 2, "truncate"):
        assert width_of(model).bits == 8
        with bit_width(model, 8):
            assert (width_of(copied).bits, width_of(copied).source) == (2, "truncate")
    for p in copied.parameters():
        p.data.zero_()
    for b in copied.buffers():
        b.zero_()
    assert all_equal(all_logits(model, images), before)


@pytest.mark.parametrize(
    "make", [lambda: nn.LSTM(4, 3), lambda: nn.GRU(4, 3), lambda: nn.MultiheadAttention(4, 2)]
)
def test_copies_of_layers_with_several_weights_are_independent(make):
    model = nn.Sequential(make())
    prepare(model, skip=(), verbose=False)
    x = torch.randn(5, 2, 4)
    inputs = (x, x, x) if isinstance(model[0], nn.MultiheadAttention) else (x,)
    with bit_width(model, 2):
        before = model[0](*inputs)[0]
        before.sum().backward()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in weight_quantizers(model):
            weight.original.zero_()
    with bit_width(copied, 2):
        assert torch.equal(copied[0](*inputs)[0], before)
    with bit_width(model, 2):
        assert not torch.equal(model[0](*inputs)[0], before)


def test_checkpoint_restores_every_width_with_weights_only(model, net, images, tmp_path):
    with bit_width(model.train(), 2):
        model(images)
    before = all_logits(model.eval(), images)
    torch.save({"state_dict": model.state_dict(), "tq": model.tq}, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.manual_seed(9)
    plain = nn.Sequential()
    for name, layer in (
        ("stem", nn.Conv2d(3, 6, 3, padding=1, bias=False)),
        ("bn1", nn.BatchNorm2d(6)),
        ("act1", nn.ReLU()),
    ):
        plain.add_module(name, layer)
    for name, layer in (
        ("conv", nn.Conv2d(6, 6, 3, padding=1)),
        ("bn2", nn.BatchNorm2d(6)),
        ("act2", nn.ReLU()),
    ):
        plain.add_module(name, layer)
    for name, layer in (
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("fc", nn.Linear(6, 5)),
    ):
        plain.add_module(name, layer)
    prepare(plain, **saved["tq"], verbose=False)
    plain.load_state_dict(saved["state_dict"])  # strict: no missing and no unexpected keys
    assert all_equal(
        all_logits(plain.eval(), images), before
    )  # untrained widths too, with their statistics
    assert all(torch.is_tensor(value) for value in saved["state_dict"].values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_prepared_model_supports_dtypes(net, images, dtype):
    prepare(net, activations="pact_floor_truncate", skip=(), verbose=False)
    calibrate_norms(net, [images])
    net.eval().to(dtype)
    logits = all_logits(net, images.to(dtype))
    assert all(out.dtype == dtype and out.isfinite().all() for out in logits.values())
    for bits in range(1, 9):
        assert torch.equal(logits[bits, "quantize"], logits[bits, "truncate"])
    for bits in (8, 4, 2, 1):
        with bit_width(net.train(), bits):
            net(images.to(dtype)).sum().backward()
    assert all(w.original.grad.isfinite().all() for w in weight_quantizers(net))


def test_state_survives_a_round_trip_between_dtypes(model, images):
    codes = [w.quantizer.codes(w.original.bfloat16())[0] for w in weight_quantizers(model)]
    model.to(torch.bfloat16).to(torch.float32)
    assert all(
        torch.equal(w.quantizer.codes(w.original)[0], c)
        for w, c in zip(weight_quantizers(model), codes, strict=True)
    )


@pytest.fixture
def fresh_dynamo():
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield dynamo
    dynamo.reset()


@pytest.mark.slow
def test_compiled_logits_equal_eager_logits(model, images, fresh_dynamo):
    """Each of 17 variants has one graph, without graph breaks or the recompile limit."""
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    exact = all_logits(model, images)
    graphs = []
    with fresh_dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for _ in range(2):
            for bits, source in PASSES:
                with bit_width(compiled, bits, source):
                    assert torch.equal(compiled(images), exact[bits, source]), (bits, source)
            graphs.append(fresh_dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [len(PASSES)] * 2  # the second round compiled nothing
    assert not fresh_dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)
def test_inductor_code_equals_eager_mode(fresh_dynamo):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    prepare(model, quantizer="round", activations="pact_round", skip=(), verbose=False)
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(4, 6)
    for bits, source in ((4, "quantize"), (2, "truncate")):
        with bit_width(compiled, bits, source), torch.no_grad():
            assert torch.allclose(compiled(x), model(x), atol=1e-5), (bits, source)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_training_step_equals_the_eager_step(net, images, fresh_dynamo):
    prepare(net, activations="pact_floor", skip=(), verbose=False)
    copied = copy.deepcopy(net)
    compiled = torch.compile(copied, backend="aot_eager", fullgraph=True)
    for bits in (8, 4, 2, 1):
        for model in (net, compiled):
            with bit_width(model.train(), bits):
                model(images).square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), copied.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), name


def test_recompile_limit_is_raised_for_all_variants(model, fresh_dynamo):
    with fresh_dynamo.config.patch(recompile_limit=8):
        with bit_width(model, 8):
            pass
        assert fresh_dynamo.config.recompile_limit >= 4 * len(PASSES)


@pytest.mark.parametrize("normalizer", ["tanh", "absmax_channel"])
def test_compiled_weights_handle_huge_values_and_nan(normalizer, fresh_dynamo):
    """A graph cannot branch on values: huge weights match eager mode, NaN reaches the loss."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    prepare(model, skip=(), normalizer=normalizer, verbose=False)
    compiled, x, weight = (
        torch.compile(model, backend="eager", fullgraph=True),
        torch.eye(64),
        original(model[0], "weight"),
    )
    for value, finite in ((3e37, True), (float("nan"), False)):
        with torch.no_grad(), bit_width(model, 2):
            weight.fill_(1e37)[0, 0] = value
            out = compiled(x)
            assert torch.isfinite(out).all() == finite
            assert not finite or torch.equal(out, model(x))
