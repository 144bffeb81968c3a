"""Compiled training and evaluation: one graph for all widths and sources, equal to eager mode."""

import copy
import shutil
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from tq_lightning import bit_width, prepare
from tq_lightning.callbacks.width_metrics import evaluate_batch
from tq_lightning.errors import UserError
from tq_lightning.quant.activation import ActivationQuantizer
from tq_lightning.quant.batches import may_record_graphs
from tq_lightning.quant.bit_width import Width, WidthTensors
from tq_lightning.quant.norm_calibration import calibrate_norms
from tq_lightning.quant.ste import STES
from tq_lightning.quant.switchable_norm import per_width_norms, train_float_norms
from tq_lightning.training.compiling import COMPILE_MODES, GRAPH_MODES, check_compiler
from tq_lightning.training.joint import joint_loss

PASSES = [(b, s) for b in range(8, 0, -1) for s in ("quantize", "truncate")] + [(None, "quantize")]
STEPS = [(None, 8, 4, 2, 1), (8, 4, 1), (None, 8, 2, 1)]  # a sandwich with a float pass


@pytest.fixture
def graphs():
    """Compile without code generation, and count the graphs: forward, backward, inference."""
    counts = Counter()

    def count(kind):
        def compiler(graph, inputs):
            counts[kind] += 1
            return make_boxed_func(graph.forward)

        return compiler

    counts.backend = aot_autograd(
        fw_compiler=count("forward"),
        bw_compiler=count("backward"),
        inference_compiler=count("inference"),
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield counts
    torch._dynamo.reset()


class Net(nn.Module):
    """Convolution, batch norm, token mixer with layer norm, classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn, self.act = nn.BatchNorm2d(4), nn.ReLU()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.act(self.bn(self.stem(x)))
        x = self.norm((x + self.conv(x)).mean((2, 3)))
        return self.head(x)


def prepare_model(**how):
    torch.manual_seed(0)
    model = Net()
    prepare(model, **{"skip": (), "verbose": False, **how})
    train_float_norms(model)
    return model


def make_batch(size=6):
    draw = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, 4, 4, generator=draw), torch.randint(0, 5, (size,), generator=draw)


def joint_step(model, network, images, target, widths):
    """Run a joint step through `network`, which is `model` or its compiled form."""
    model.train()
    loss, losses = joint_loss(
        network, images, widths, lambda bits, out, wider: F.cross_entropy(out, target)
    )
    loss.backward()
    return {bits: value.item() for bits, value in losses.items()}


def evaluate(model, network, images):
    model.eval()
    return evaluate_batch(network, images, PASSES)


FAST = "pact_floor_truncate"
CHOICES = {
    "weights only": {},
    "layer norms, truncated activations with a learned clip": {
        "norm": "per_width_all",
        "activations": FAST,
    },
    "shared norms, an elementwise rule": {
        "norm": "shared",
        "activations": "clamp_round",
        "quantizer": "round",
        "ste": "dsq",
    },
}


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(name, marks=[] if how.get("activations") == FAST else pytest.mark.slow)
        for name, how in CHOICES.items()
    ],
)
def test_one_graph_for_all_widths_and_sources(choice, graphs):
    ours = prepare_model(**CHOICES[choice])
    theirs = copy.deepcopy(ours)
    compiled = torch.compile(ours, backend=graphs.backend, fullgraph=True)
    for widths in STEPS:
        losses = joint_step(ours, compiled, *make_batch(), widths)
        expected = joint_step(theirs, theirs, *make_batch(), widths)
        assert losses == pytest.approx(expected, rel=1e-6)
    assert graphs == {"forward": 1, "backward": 1}
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), name
    for (name, b), c in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(b, c), name
    images = make_batch()[0]
    for model in (ours, theirs):  # the compiled one during its evaluation
        calibrate_norms(model, [images, images[:3]])
    for _ in range(2):
        logits, expected = evaluate(ours, compiled, images), evaluate(theirs, theirs, images)
        assert all(torch.allclose(logits[p], expected[p], atol=1e-5) for p in PASSES)
    assert graphs == {"forward": 1, "backward": 1, "inference": 1}
    assert not torch.equal(logits[8, "quantize"], logits[1, "quantize"])
    joint_step(ours, compiled, *make_batch(), (8, 2))
    assert graphs == {"forward": 1, "backward": 1, "inference": 1}


@pytest.mark.slow
def test_smaller_last_batch_compiles_one_more_graph(graphs):
    model = prepare_model()
    compiled = torch.compile(model, backend=graphs.backend, fullgraph=True)
    for size in (6, 4, 6, 5, 3):
        joint_step(model, compiled, *make_batch(size), (8, 4, 2, 1))
    assert graphs == {"forward": 2, "backward": 2}


@pytest.mark.slow
def test_without_fused_weights_each_width_has_its_own_graph(graphs):
    """Counter-example: parametrizations compute the weights inside the graph."""
    model = prepare_model().eval()
    compiled = torch.compile(model, backend=graphs.backend, fullgraph=True)
    with torch.no_grad():
        for bits in (8, 4, 2):
            with bit_width(model, bits):
                compiled(make_batch()[0])
    assert graphs == {"inference": 3}


@pytest.mark.parametrize("ste", STES)
@pytest.mark.parametrize("activations", ["clamp_floor", "clamp_round_truncate", "pact_round"])
def test_activations_accept_the_width_as_a_tensor(ste, activations, monkeypatch):
    """Run the code of the graph in eager mode: values and gradients of each width and source."""
    x = torch.cat([torch.linspace(-1, 7, 97), torch.rand(64)])
    width = Width(8, (8,), 8)
    layer = ActivationQuantizer(activations, width, ste)
    tensors = WidthTensors.empty(torch.device("cpu"))
    for bits, source in PASSES:
        width.bits, width.source, width.tensors = bits, source, None
        results = []
        for in_graph in (False, True):
            if in_graph:
                tensors.fill(bits, source, 8)
                width.tensors = tensors
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda on=in_graph: on)
            inside = x.clone().requires_grad_()
            out = layer(inside)
            leaves = [inside, layer.clip] if layer.learned else [inside]
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for one, other in zip(*results, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), (bits, source)
        assert torch.equal(results[0][0], results[1][0])


@pytest.mark.slow
def test_fit_compiles_one_training_graph(train, tmp_path, graphs, monkeypatch):
    """With two epochs, a moving average, calibration, evaluation, accumulation and clipping."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs.backend))
    model = {"ema_decay": 0.5, "norm": "per_width_all", "float_pass": True}
    flags = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    _, compiled = train(tmp_path, {**model, "compile": True}, **flags)
    assert graphs == {"forward": 1, "backward": 1, "inference": 1}
    assert len(per_width_norms(compiled)) > 0
    monkeypatch.undo()
    _, eager = train(tmp_path, model, **flags)
    for (name, p), q in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6), name


def test_cpu_without_a_compiler_is_an_error(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler on a CPU, and no-such-compiler"):
        check_compiler(torch.device("cpu"))
    check_compiler(torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("activations", [None, "pact_floor_truncate"])
def test_inductor_code_equals_eager_mode(activations):
    torch._dynamo.reset()
    ours = prepare_model(activations=activations)
    theirs = copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True)
    for widths in STEPS:
        losses = joint_step(ours, compiled, *make_batch(), widths)
        assert losses == pytest.approx(joint_step(theirs, theirs, *make_batch(), widths), rel=1e-5)
    for (name, p), q in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert p.grad is None or torch.allclose(p.grad, q[1].grad, rtol=1e-3, atol=1e-5), name
    for model in (ours, theirs):
        calibrate_norms(model, [make_batch()[0]])
    logits, expected = (
        evaluate(ours, compiled, make_batch()[0]),
        evaluate(theirs, theirs, make_batch()[0]),
    )
    assert all(torch.allclose(logits[p], expected[p], atol=1e-4) for p in PASSES)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", COMPILE_MODES)
def test_only_modes_with_cuda_graphs_overwrite_outputs(mode):
    """Copies of logits and gradients would cost a launch for each parameter."""
    compiled = torch.compile(nn.Linear(2, 2), mode=mode)
    assert may_record_graphs(compiled) == (mode in GRAPH_MODES)


def test_unknown_backends_may_overwrite_outputs():
    model = nn.Linear(2, 2)
    model.compile(backend="eager")
    assert may_record_graphs(model) and may_record_graphs(torch.compile(model, backend="eager"))
