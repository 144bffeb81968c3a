"""Integer graphs: fusion by ONNX Runtime, exact sums, trained activation codes, folded norms."""

import collections
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.exact_onnx import code_agreement, exact_outputs
from torch import nn

from tq_lightning import bit_width, calibrate_activations, load_packed, prepare, save_packed
from tq_lightning.errors import UserError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tq_lightning.export.onnx import integer  # noqa: E402
from tq_lightning.export.onnx.integer import export_integer  # noqa: E402

HOW = {"input_size": [3, 12, 12], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.25]}


class Residual(nn.Module):
    """A pooling, a residual block, a depthwise convolution and a quantized linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0, self.act0 = (
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.pool = nn.MaxPool2d(2)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act1 = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.act2 = nn.ReLU()
        self.depth, self.bn3 = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.act3 = nn.ReLU()
        self.fc, self.act4, self.head = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x):
        x = self.pool(self.act0(self.bn0(self.stem(x))))
        x = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))) + x)
        x = self.act3(self.bn3(self.depth(x)))
        return self.head(self.act4(self.fc(x.mean((2, 3)))))


class LinearNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Linear(3 * 144, 16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.norm(self.patches(x.flatten(1)).unsqueeze(1))
        return self.head((x + self.down(nn.functional.gelu(self.up(x)))).mean(1))


def make(path, network=Residual, **how):
    """Save a packed file whose norms have statistics, gains of both signs and one gain of 0."""
    torch.manual_seed(0)
    model = network()
    prepare(model, **{"verbose": False, **how})
    images = torch.randn(16, 3, 12, 12)
    for module in model.modules():
        for key, norm in getattr(module, "sets", {}).items():
            if isinstance(norm, nn.BatchNorm2d):
                torch.manual_seed(ord(key[0]))
                norm.weight.data.uniform_(-1.5, 1.5)[0] = 0.0
                norm.bias.data.normal_()
        if hasattr(module, "calibrated"):
            module.calibrated.fill_(True)
    model.train()
    with torch.no_grad():
        for bits in model.tq["widths"]:
            with bit_width(model, bits):
                for _ in range(30):
                    model(images)
    model.eval()
    save_packed(model, path, preprocessing=HOW, class_names=list("abcd"))
    return images.numpy()


@pytest.fixture(autouse=True)
def own_network(monkeypatch):
    def load(path, bits=None, model=None):
        return load_packed(path, bits=bits, model=NETWORKS[path.stem]())

    monkeypatch.setattr(integer, "load_packed", load)


class Tokens(nn.Module):
    """A linear layer, then a batch norm of its 12 tokens, or with `flat` of its 12 outputs."""

    def __init__(self, flat=False):
        super().__init__()
        self.stem, self.fc = nn.Linear(432 if flat else 36, 8), nn.Linear(8, 12)
        self.bn, self.head, self.flat = nn.BatchNorm1d(12), nn.Linear(12, 4), flat

    def forward(self, x):
        x = x.flatten(1) if self.flat else x.permute(0, 2, 1, 3).flatten(2)
        x = torch.relu(self.bn(self.fc(torch.relu(self.stem(x)))))
        return self.head(x if self.flat else x.mean(1))


class Sums(nn.Module):
    """Linear layers without a bias, whose outputs are added to themselves and to five constants."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Linear(36, 8), nn.Linear(8, 8, bias=False)
        self.one, self.head = nn.Linear(8, 1, bias=False), nn.Linear(5, 4)
        self.constants = nn.Parameter(torch.linspace(-2.0, 2.0, 5))

    def forward(self, x):
        x = self.twice(torch.relu(self.stem(x.permute(0, 2, 1, 3).flatten(2))))
        return self.head(torch.relu(self.one(torch.relu(x + x)) + self.constants).mean(1))


NETWORKS = {
    "residual": Residual,
    "sums": Sums,
    "linears": LinearNetwork,
    "tokens": Tokens,
    "flat": lambda: Tokens(flat=True),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Return (packed file, images, ranges) of the residual network."""
    path = tmp_path_factory.mktemp("integer") / "residual.safetensors"
    images = make(path)
    ranges = calibrate_activations(load_packed(path, model=Residual()), [torch.from_numpy(images)])
    return path, images, ranges


def run(path, images):
    """Return (logits, {operator: number of nodes} of the graph optimized by ONNX Runtime)."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return session.run(None, {"images": images})[0], collections.Counter(n.op_type for n in nodes)


def simulated(path, images, bits, network=Residual):
    """Return logits with float activations, or with the activation codes of the model."""
    model = load_packed(path, model=network())
    with torch.no_grad(), bit_width(model, bits):
        return model(torch.from_numpy(images)).numpy()


def test_every_quantized_layer_is_fused_and_exact(served, tmp_path):
    path, images, ranges = served
    out = tmp_path / "m.onnx"
    wrote = export_integer(path, out, 4, ranges=ranges)
    assert wrote.layers == ("conv1", "conv2", "depth", "fc") and wrote.in_float == {}
    assert wrote.top == 255 and wrote.safe and not wrote.dynamic
    logits, nodes = run(out, images)
    assert nodes["QLinearConv"] == 3 and nodes["QLinearAdd"] == 1
    assert nodes["MatMulInteger"] + nodes["MatMulIntegerToFloat"] == 1 and nodes["Gemm"] == 1
    assert nodes["Conv"] + nodes["FusedConv"] == 1  # the stem, which is not quantized
    assert nodes["MaxPool"] + nodes["NhwcMaxPool"] == 1
    np.testing.assert_allclose(logits, exact_outputs(out, images)[0], rtol=0, atol=1e-5)
    expected = simulated(path, images, 4)
    away = np.abs(logits - simulated(path, images, 2)).max()
    assert 1e-6 < np.abs(logits - expected).max() < 0.2 * away
    weights = [t for t in onnx.load(out).graph.initializer if t.name.endswith(".weight/codes")]
    assert {t.data_type for t in weights} == {onnx.TensorProto.INT8} and len(weights) == 4
    stored = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"]).get_modelmeta()
    described = stored.custom_metadata_map
    assert json.loads(described["widths"]) == [4] and described["quantizer"] == "floor"
    assert json.loads(described["class_names"]) == list("abcd")
    assert json.loads(described["mean"]) == HOW["mean"]


@pytest.mark.parametrize(
    ("bits", "level"),
    [(8, "endpoint"), *(pytest.param(n, "left", marks=pytest.mark.slow) for n in (8, 7, 1))],
)
def test_activation_codes_are_limited_to_127_if_products_could_saturate(
    bits, level, served, tmp_path
):
    path, images, ranges = served
    if level != "endpoint":
        path = tmp_path / "residual.safetensors"
        make(path, level=level)
    out = tmp_path / "m.onnx"
    wrote = export_integer(path, out, bits, ranges=ranges)
    assert wrote.top == (127 if bits == 8 else 255) and wrote.safe
    logits, nodes = run(out, images)
    assert nodes["QLinearConv"] == 3
    codes = [n.output[0] for n in onnx.load(out).graph.node if n.op_type == "QuantizeLinear"]
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    top = max(np.abs(w.astype(int)).max() for n, w in weights.items() if n.endswith("t/codes"))
    assert top * wrote.top * 2 <= 32767 and codes
    np.testing.assert_allclose(logits, exact_outputs(out, images)[0], rtol=0, atol=1e-5)
    assert not export_integer(path, out, 8, ranges=ranges, top=255).safe


@pytest.mark.slow
def test_float_residual_is_closer_to_the_float_network(served, tmp_path):
    path, images, ranges = served
    expected, errors = simulated(path, images, 4), {}
    for residual in ("int8", "float"):
        out = tmp_path / f"{residual}.onnx"
        export_integer(path, out, 4, ranges=ranges, residual=residual)
        logits, nodes = run(out, images)
        errors[residual] = np.abs(logits - expected).mean()
        assert nodes["ConvInteger"] == (2 if residual == "float" else 0)
        np.testing.assert_allclose(logits, exact_outputs(out, images)[0], rtol=0, atol=1e-5)
    assert errors["float"] < errors["int8"]


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("clamp_floor", 2),
        *(
            pytest.param(kind, bits, marks=pytest.mark.slow)
            for kind, bits in (
                ("clamp_round", 4),
                ("pact_round", 2),
                ("pact_floor_truncate", 4),
                ("clamp_round_truncate", 2),
                ("clamp_floor", 1),
            )
        ),
    ],
)
def test_trained_activation_codes_equal_their_simulation(kind, bits, tmp_path):
    path, out = tmp_path / "residual.safetensors", tmp_path / "m.onnx"
    images = make(path, activations=kind)
    wrote = export_integer(path, out, bits)  # needs no ranges
    assert wrote.layers == ("conv1", "conv2", "depth") and wrote.safe
    assert wrote.in_float == {"fc": "its input has no activation range"}
    logits, nodes = run(out, images)
    assert nodes["QLinearConv"] + nodes["ConvInteger"] == 3 and nodes["ConvInteger"] >= 1
    expected = simulated(path, images, bits)
    different = np.abs(logits - expected).max(1) > 1e-4
    # a value at a boundary between two codes may round either way
    assert different.mean() <= 1 / 16
    assert np.abs(logits - simulated(path, images, 8)).max() > 1e-2


@pytest.mark.parametrize(
    "kind",
    [
        "clamp_round_truncate",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("clamp_floor_truncate", "pact_round_truncate", "pact_floor_truncate")
        ),
    ],
)
def test_trained_activation_codes_equal_their_simulation_in_openvino(kind, tmp_path):
    """OpenVINO computed another network below 8 bits where a BitShift made the codes."""
    importlib.util.find_spec("openvino") or pytest.skip("needs openvino")
    path = tmp_path / "residual.safetensors"
    images = make(path, activations=kind)
    np.save(tmp_path / "images.npy", images)
    for bits in (4, 2, 1):
        export_integer(path, tmp_path / f"w{bits}.onnx", bits, "openvino")
        ops = {node.op_type for node in onnx.load(tmp_path / f"w{bits}.onnx").graph.node}
        assert "BitShift" not in ops
    # in a process of its own: OpenVINO's objects crashed the tests when they were collected later
    script = Path(__file__).with_name("run_graphs.py")
    subprocess.run([sys.executable, str(script), str(tmp_path), "openvino"], check=True)
    for bits in (4, 2, 1):
        logits = np.load(tmp_path / f"w{bits}.openvino.npy")
        expected = simulated(path, images, bits)
        different = np.abs(logits - expected).max(1) > 1e-4 * np.abs(expected).max()
        assert different.mean() <= 1 / 8, bits  # ties may round either way


@pytest.mark.parametrize(
    "bits", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (7, 4, 2, 1))]
)
def test_every_layer_equals_exact_integer_arithmetic(bits, served, tmp_path):
    """Codes differ by at most 1, and only if the exact value is within 1e-3 of a half."""
    path, images, ranges = served
    out, other = tmp_path / "m.onnx", tmp_path / "other.onnx"
    export_integer(path, out, bits, ranges=ranges)
    found = code_agreement(out, images)
    assert found.codes > 10_000
    assert found.wrong == 0 and found.off_by_one <= 1e-3 * found.codes, found
    export_integer(path, other, 3, ranges=ranges)
    assert code_agreement(out, images, other).wrong > 0.01 * found.codes


@pytest.mark.parametrize(
    ("level", "runtime"),
    [
        ("endpoint", "onnxruntime"),
        *(
            pytest.param(level, runtime, marks=pytest.mark.slow)
            for level, runtime in (
                ("left", "onnxruntime"),
                ("centre", "openvino"),
                ("endpoint", "openvino"),
            )
        ),
    ],
)
def test_trained_8_bit_codes_are_exact_and_do_not_saturate(level, runtime, tmp_path):
    """They equal their simulation up to ties, which change a logit by a fraction of a code."""
    path, out = tmp_path / "residual.safetensors", tmp_path / "m.onnx"
    images = make(path, activations="clamp_round", level=level)
    wrote = export_integer(path, out, 8, runtime)
    assert wrote.safe and wrote.exact
    graph = onnx.load(out).graph.initializer
    weights = {t.name: onnx.numpy_helper.to_array(t).astype(int) for t in graph}
    codes = [np.abs(w).max() for name, w in weights.items() if name.endswith("/codes")]
    codes += [np.abs(w).max() for name, w in weights.items() if name.endswith("/low_codes")]
    assert len(codes) >= 6 and max(codes) * 255 * 2 <= 32767
    expected, exact = simulated(path, images, 8), exact_outputs(out, images)[0]
    if runtime == "onnxruntime":
        logits, _ = run(out, images)
        np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-3 * np.abs(exact).max())
    nearest = tmp_path / "nearest.onnx"
    assert not export_integer(path, nearest, 8, runtime, exact=False).safe
    error = np.abs(exact - expected).mean()
    assert error < 1e-3 * np.abs(expected).max()
    if level != "left":
        assert error < 0.3 * np.abs(exact_outputs(nearest, images)[0] - expected).mean()


@pytest.mark.parametrize("bits", [4, 8])
def test_linear_networks_need_no_ranges(bits, tmp_path):
    path, out = tmp_path / "linears.safetensors", tmp_path / "m.onnx"
    images = make(path, LinearNetwork)
    wrote = export_integer(path, out, bits)
    assert wrote.dynamic and wrote.safe and wrote.layers == ("up", "down")
    assert wrote.top == (127 if bits == 8 else 255) and wrote.exact == (bits < 8)
    assert export_integer(path, tmp_path / "exact.onnx", bits, exact=True).top == 255
    logits, nodes = run(out, images)
    assert (
        sum(count for op, count in nodes.items() if "MatMulInteger" in op or "Dynamic" in op) >= 2
    )
    assert nodes["MatMul"] == 0 and nodes["Gemm"] == 2  # the first and the last layer
    exact = exact_outputs(out, images)[0]
    np.testing.assert_allclose(logits, exact, rtol=0, atol=2e-3 * np.abs(exact).max())
    expected = simulated(path, images, bits, LinearNetwork)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.05 * np.abs(expected).max())
    closer = run(tmp_path / "exact.onnx", images)[0]
    errors = [np.abs(x - expected).mean() for x in (closer, logits)]
    assert errors[0] < errors[1] if bits == 8 else errors[0] == errors[1]


def test_invalid_input_is_an_error(served, tmp_path):
    path, _, ranges = served
    out = tmp_path / "m.onnx"
    for arguments, message in (
        ({}, "no activation ranges; pass --calibrate"),
        ({"runtime": "tflite"}, "pass one of onnxruntime, openvino"),
        ({"residual": "int4"}, "pass one of int8, float"),
        ({"top": 100}, "127 or 255"),
    ):
        with pytest.raises(UserError, match=message):
            export_integer(path, out, 4, **arguments)
    assert not out.exists()
    wrote = export_integer(path, out, 4, ranges={"conv1": ranges["conv1"]})
    assert wrote.layers == ("conv1",) and set(wrote.in_float) == {"conv2", "depth", "fc"}


def test_linear_networks_with_ranges_are_static_only_for_openvino(tmp_path):
    path, out = tmp_path / "linears.safetensors", tmp_path / "m.onnx"
    images = make(path, LinearNetwork)
    ranges = calibrate_activations(
        load_packed(path, model=LinearNetwork()), [torch.from_numpy(images)]
    )
    assert export_integer(path, out, 4, ranges=ranges).dynamic
    assert export_integer(path, out, 4, "openvino").dynamic
    wrote = export_integer(path, out, 4, "openvino", ranges=ranges)
    assert not wrote.dynamic and wrote.layers == ("up", "down") and not wrote.in_float
    logits, _ = run(out, images)
    assert (
        np.abs(logits - simulated(path, images, 4, LinearNetwork)).max()
        < 0.05 * np.abs(logits).max()
    )
    assert (
        np.abs(logits - simulated(path, images, 1, LinearNetwork)).max()
        > 0.05 * np.abs(logits).max()
    )


@pytest.mark.parametrize("name", ["tokens", "flat"])
def test_norm_over_tokens_is_not_folded_into_a_linear_layer(name, tmp_path):
    """The channels of the norm are the outputs of the layer only for a matrix, in a Gemm."""
    path, out = tmp_path / f"{name}.safetensors", tmp_path / "m.onnx"
    images = make(path, NETWORKS[name], norm="shared")
    wrote = export_integer(path, out, 4)
    assert wrote.dynamic and wrote.layers == ("fc",)
    logits, nodes = run(out, images)
    assert nodes["BatchNormalization"] == (name == "tokens")
    expected = simulated(path, images, 4, NETWORKS[name])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_only_a_constant_of_the_size_of_the_output_is_a_bias(tmp_path):
    path, out = tmp_path / "sums.safetensors", tmp_path / "m.onnx"
    images = make(path, Sums, norm="shared")
    assert export_integer(path, out, 4).layers == ("twice", "one")
    logits = exact_outputs(out, images)[0]
    for bits in (4, 1):  # another width has other logits
        expected = simulated(path, images, bits, Sums)
        error = np.abs(logits - expected).max() / np.abs(expected).max()
        assert (error < 0.01) == (bits == 4)


class CallsTwice(nn.Module):
    """A convolution and a linear layer that are called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc, self.out, self.num_classes = nn.Linear(8, 8), nn.Linear(8, 4), 4

    def forward(self, x):
        x = self.conv(self.conv(self.stem(x).relu()).relu()).relu().mean((-2, -1))
        return self.out(self.fc(self.fc(x).relu()))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_layer_that_is_called_twice_is_named_with_the_reason(tmp_path, runtime, monkeypatch):
    model, path = CallsTwice(), tmp_path / "m.safetensors"
    monkeypatch.setitem(NETWORKS, "m", CallsTwice)
    prepare(model, skip=())
    calibrate_activations(model, [torch.rand(4, 3, 8, 8)])
    save_packed(model, path, preprocessing={"input_size": [3, 8, 8]})
    graph = export_integer(path, tmp_path / "m.onnx", 4, runtime)
    assert graph.layers == ("stem", "out") and set(graph.in_float) == {"conv", "fc"}
    why = "stays in float: the network calls it 2 times, with inputs of different ranges"
    assert {f"  {name} {why}" for name in ("conv", "fc")} <= set(graph.lines())
