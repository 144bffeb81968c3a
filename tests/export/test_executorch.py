"""ExecuTorch programs in ExecuTorch's own Python runtime (make test-executorch)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tq_lightning import (
    bit_width,
    calibrate_activations,
    calibrate_norms,
    load_packed,
    prepare,
    save_packed,
)
from tq_lightning.cli import main
from tq_lightning.errors import UserError
from tq_lightning.export import executorch, executorch_lowering
from tq_lightning.export.executorch import _to_integers, export_executorch
from tq_lightning.export.executorch_layers import StaticConv
from tq_lightning.export.executorch_static import static_network
from tq_lightning.export.packed.weight import packed_weights
from tq_lightning.quant.integer.arithmetic import integer_weight

DIGITS = Path(__file__).parents[2] / "results" / "digits_example" / "model.safetensors"

try:
    from executorch.runtime import Runtime
except ImportError:
    Runtime = None
needs = pytest.mark.skipif(Runtime is None, reason="ExecuTorch is not installed")


def load(path):
    program = Runtime.get().load_program(str(path))
    method = program.load_method("forward")
    method.program = program  # it reads the memory of its program
    return method


def images_of_digits(count=100):
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.images[-count:] / 16.0).float()[:, None].expand(-1, 3, -1, -1)
    return (pixels - 0.305) / 0.376, data.target[-count:]


@pytest.mark.skipif(Runtime is not None, reason="ExecuTorch is installed")
def test_missing_executorch_error_says_what_to_install(tmp_path, capsys):
    out = tmp_path / "m.pte"
    assert main(["export", str(DIGITS), "--out", str(out), "--format", "executorch"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "needs ExecuTorch for PyTorch" in lines[0]
    assert "pip install 'tq_lightning[executorch]'" in lines[0] and not out.exists()


@pytest.mark.parametrize("level", ["endpoint", "left", "centre"])
@pytest.mark.parametrize("bits", [8, 7, 3, 1])
def test_integer_layers_have_the_weights_of_the_packed_model(level, bits, make, tmp_path):
    """The logits agree without quantized inputs, and differ with the integers of another width."""
    model, images = make(level=level)
    save_packed(model, tmp_path / "m.safetensors")
    packed = load_packed(tmp_path / "m.safetensors", bits=bits)
    with torch.no_grad():
        expected = packed(images)
        program = _to_integers(packed)
        layers = [m for m in packed.modules() if type(m).__name__ == "DynamicLayer"]
        assert len(layers) == len(program.integer) == 6 and not program.left_in_float
        for layer in layers:
            layer.forward = lambda x, layer=layer: run_on_floats(layer, x)
        torch.testing.assert_close(packed(images), expected, rtol=1e-4, atol=1e-4)
        layers[0].codes += 1
        assert not torch.allclose(packed(images), expected, rtol=1e-4, atol=1e-4)


def run_on_floats(layer, x):
    weight = layer.codes.float() * layer.gain.view(-1, *[1] * (layer.codes.dim() - 1))
    y = torch.nn.functional.conv2d(x, weight, layer.bias, *layer.options)
    return y[:, :-1] + layer.offset.view(-1, 1, 1) * y[:, -1:] if layer.sum_channel else y


def test_layers_that_stay_in_float_are_named(make, tmp_path):
    model, _ = make("mobilenetv3_small_050", norm="shared", size=32)
    save_packed(model, tmp_path / "m.safetensors")
    packed = load_packed(tmp_path / "m.safetensors", bits=4)
    program = _to_integers(packed)
    depthwise = [name for name in program.left_in_float if ".conv_dw." in name]
    assert depthwise and all("depthwise" in program.left_in_float[n] for n in depthwise)
    assert any(name.endswith(".conv_pw.weight") for name in program.integer)


def test_layer_with_two_names_is_replaced_under_both(tmp_path):
    def network():
        layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        layers.add_module("first", layers[0])
        return nn.ModuleDict({"named": layers[1], "layers": layers})

    model = network()
    prepare(model, verbose=False, skip=["last"])
    save_packed(model, tmp_path / "m.safetensors")
    packed = load_packed(tmp_path / "m.safetensors", bits=4, model=network())
    assert _to_integers(packed).integer == ["named.weight", "layers.0.weight"]
    layers = packed["layers"]
    assert packed["named"] is layers[1] and layers.first is layers[0]
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["DynamicLayer", "DynamicLayer", "Linear", "DynamicLayer"]


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_convolution_in_float_keeps_its_padding_mode(mode, tmp_path):
    pytest.importorskip("torch.ao.quantization.fx._decomposed")  # registers the operations

    def network():
        torch.manual_seed(0)
        stem = nn.Conv2d(3, 8, 5, padding=2, padding_mode=mode)
        return nn.Sequential(stem, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU())

    model, images = network(), torch.rand(2, 3, 8, 8)
    prepare(model, verbose=False, skip=["first"], norm="shared")
    calibrate_activations(model.eval(), [images])
    save_packed(model, tmp_path / "m.safetensors")
    packed = load_packed(tmp_path / "m.safetensors", bits=4, model=network())
    with torch.no_grad():
        expected = packed(images)
        made = static_network(load_packed(tmp_path / "m.safetensors", bits=4, model=network()))
        assert made.integer == ["3.weight"]
        assert (made.network(images) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8_cifar", "mobilenetv3_small_050"])
def test_files_with_ranges_make_static_convolutions(name, make, tmp_path):
    """They match integer mode, up to the additional quantizers of outputs that are not codes."""
    pytest.importorskip("torch.ao.quantization.fx._decomposed")  # registers the operations
    path = tmp_path / "m.safetensors"
    model, images = make(name)
    model.train()  # without statistics of its norms, the activations of a random network vanish
    batch = torch.randn(32, *images.shape[1:])
    for bits in (8, 4, 2, 1):
        with torch.no_grad(), bit_width(model, bits):
            for _ in range(40):
                model(batch)
    model.eval()
    calibrate_norms(model, [batch])
    calibrate_activations(model, [batch])
    save_packed(model, path)
    for bits in (8, 2):
        packed = load_packed(path, bits=bits)
        count = len(packed_weights(packed))
        made = static_network(load_packed(path, bits=bits))
        assert len(made.integer) + len(made.left_in_float) == count
        depthwise = [weight for weight in made.fixed if ".conv_dw." in weight]
        assert depthwise or "resnet" in name
        with torch.no_grad():
            expected, got = packed(images), made.network(images)
            for layer in made.network.modules():
                if isinstance(layer, StaticConv):
                    layer.codes += 2
            other = made.network(images)
        bound = 0.1 if "resnet" in name else 0.2  # 52 layers of a random network
        assert (got - expected).norm() < bound * expected.norm()
        assert (other - expected).norm() > 2 * (got - expected).norm()


def test_ranges_that_fail_in_the_lowering_are_not_used(make, tmp_path, monkeypatch):
    pytest.importorskip("torch.ao.quantization.fx._decomposed")
    monkeypatch.setattr(executorch_lowering, "_check_that_it_loads", lambda buffer: None)
    monkeypatch.setattr(executorch, "xnnpack_backend", lambda: lambda exported: b"program")
    model, images = make()
    calibrate_activations(model, [images])
    path, out = tmp_path / "m.safetensors", tmp_path / "m.pte"
    save_packed(model, path, preprocessing={"input_size": list(images.shape[1:])})
    program = export_executorch(path, out, 4)
    assert len(program.fixed) == 6 and program.no_fixed_ranges is None

    def only_dynamic(exported):
        if "choose_qparams" not in str(exported.graph):
            raise RuntimeError("no fixed ranges")
        return b"other program"

    monkeypatch.setattr(executorch, "xnnpack_backend", lambda: only_dynamic)
    program = export_executorch(path, out, 4)
    assert out.read_bytes() == b"other program"
    assert not program.fixed and len(program.integer) == 6
    assert "not used: ExecuTorch can't express this network (RuntimeError: no fixed ranges)" in (
        "\n".join(program.lines())
    )
    with pytest.raises(UserError, match="no fixed ranges"):
        export_executorch(path, out, 4, static=True)


@needs
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_static_program_has_the_predictions_of_its_network(tmp_path, capsys):
    out = tmp_path / "m.pte"
    args = ["export", str(DIGITS), "--out", str(out), "--bits", "4", "--calibrate", "digits"]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert "6 layers run as integers" in printed and "6 have fixed activation ranges" in printed
    images, labels = images_of_digits()
    method = load(out)
    logits = torch.cat([method.execute([image[None].contiguous()])[0] for image in images])
    with torch.no_grad():
        expected = load_packed(DIGITS, bits=4)(images)
    right = [(x.argmax(1).numpy() == labels).mean() for x in (logits, expected)]
    assert abs(right[0] - right[1]) <= 0.02
    assert (logits - expected).norm() < 0.1 * expected.norm()


@needs
@pytest.mark.slow
def test_ranges_that_the_runtime_refuses_are_not_used(tmp_path, capfd):
    """XNNPACK has no convolution whose input scale times weight scale is 256 output scales."""
    torch.manual_seed(0)
    model, images = InvertedResidual(), torch.randn(16, 3, 12, 12)
    prepare(model, norm="shared", verbose=False)
    model(images)
    calibrate_activations(model.eval(), [images])
    model.tq_ranges["depthwise.0"] = (0.0, 1e-6)
    path, out = tmp_path / "m.safetensors", tmp_path / "m.pte"
    save_packed(model, path, preprocessing={"input_size": [3, 12, 12]})
    with pytest.raises(UserError, match=r"runtime can't load this program .*unsupported_parameter"):
        export_executorch(path, out, 4, model=InvertedResidual(), static=True)
    assert not out.exists()
    program = export_executorch(path, out, 4, model=InvertedResidual())
    assert not program.fixed and "can't load this program" in program.no_fixed_ranges
    assert "xnn" not in capfd.readouterr().err.lower()
    load(out).execute([images[:1].contiguous()])


class InvertedResidual(nn.Module):
    """A dequantized tensor with two readers, a depthwise convolution, and a residual add."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6())
        self.wide = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU6())
        depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(16), nn.ReLU6())
        self.narrow = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.head(x + self.narrow(self.depthwise(self.wide(x))))
        return self.fc(x.mean((2, 3)))


@needs
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_depthwise_convolutions_run_as_integers_with_fixed_ranges(tmp_path):
    torch.manual_seed(0)
    model, images = InvertedResidual(), torch.randn(16, 3, 12, 12)
    prepare(model, norm="shared", verbose=False)
    model(images)  # statistics of the norms
    calibrate_activations(model.eval(), [images])
    path, out = tmp_path / "m.safetensors", tmp_path / "m.pte"
    save_packed(model, path, preprocessing={"input_size": [3, 12, 12]})
    program = export_executorch(path, out, 4, model=InvertedResidual())
    assert "depthwise.0.weight" in program.fixed and not program.left_in_float
    method = load(out)
    logits = torch.cat([method.execute([image[None].contiguous()])[0] for image in images])
    made = static_network(load_packed(path, bits=4, model=InvertedResidual()))
    with torch.no_grad():
        torch.testing.assert_close(logits, made.network(images), rtol=1e-3, atol=1e-3)
        for layer in made.network.modules():
            if isinstance(layer, StaticConv):
                layer.codes.neg_()
        assert (logits - made.network(images)).abs().max() > 0.01


@needs
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bits", [8, 2])
def test_predictions_equal_those_of_pytorch(bits, tmp_path, capsys):
    out = tmp_path / "m.pte"
    assert main(["export", str(DIGITS), "--out", str(out), "--bits", str(bits)]) == 0
    assert "6 layers run as integers" in capsys.readouterr().out
    images, labels = images_of_digits()
    method = load(out)
    logits = torch.cat([method.execute([image[None].contiguous()])[0] for image in images])
    model = load_packed(DIGITS)
    with torch.no_grad(), bit_width(model, bits):
        expected = model(images)
        narrow = torch.full((), 0.0)
        if bits > 1:
            with bit_width(model, bits - 1):
                narrow = model(images)
    # inputs quantized to 8 bits change logits by a small relative amount
    error = (logits - expected).abs().max() / expected.abs().max()
    assert error < 0.05
    assert (narrow - expected).abs().max() / expected.abs().max() > error
    right = [(x.argmax(1).numpy() == labels).mean() for x in (logits, expected)]
    assert abs(right[0] - right[1]) <= 0.01


@needs
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("level", ["left", "endpoint"])
def test_linear_layers_shrink_with_the_width(level, make, tmp_path):
    """At 8 and 4 bits, the file has float weights, n-bit integers and little else."""
    args = {"img_size": 32, "depth": 1}
    model, images = make(
        "vit_tiny_patch16_224",
        size=32,
        norm="shared",
        level=level,
        normalizer="absmax_channel",
        model_args=args,
    )
    path = tmp_path / "m.safetensors"
    save_packed(model, path, preprocessing={"input_size": [3, 32, 32]}, model_args=args)
    sizes = {}
    for bits in (8, 4):
        out = tmp_path / f"m{bits}.pte"
        program = export_executorch(path, out, bits)
        sizes[bits] = out.stat().st_size
        logits = load(out).execute([images[:1]])[0]
        packed = load_packed(path, bits=bits)
        with torch.no_grad():
            expected = packed(images[:1])
        assert (logits - expected).abs().max() / expected.abs().max() < 0.1
        assert len(program.integer) == len(packed_weights(packed)) == 4
    integers = sum(weight.codes.numel() for weight in packed_weights(packed))
    floats = sum(p.numel() for p in model.parameters()) - integers
    for bits, size in sizes.items():
        assert size < 1.15 * (4 * floats + integers * bits / 8)
    assert sizes[8] - sizes[4] > 0.49 * integers


@needs
@pytest.mark.slow
def test_sums_do_not_saturate(tmp_path):
    """For the largest integers and inputs, pairs of products exceed 16 bits."""
    from tq_lightning.export.executorch_layers import DynamicLayer
    from tq_lightning.export.executorch_lowering import xnnpack_backend

    for bits in (7, 8):
        codes = torch.full((8, 64), 2**bits - 1, dtype=torch.uint8)
        codes[::2] = 0
        weight = integer_weight(codes, bits, torch.tensor(1.0), "endpoint", exact=True)
        layer = DynamicLayer(nn.Linear(64, 8, bias=False), weight)
        x = torch.ones(1, 64)
        x[0, 0] = 0.0
        exported = torch.export.export(layer.eval(), (x,), strict=False)
        (tmp_path / "m.pte").write_bytes(xnnpack_backend()(exported))
        got = load(tmp_path / "m.pte").execute([x])[0]
        np.testing.assert_allclose(got[0], np.tile([-63.0, 63.0], 4), rtol=1e-2)


@needs
def test_invalid_model_is_an_error(make, tmp_path):
    model, _ = make(activations="clamp_floor")
    path = tmp_path / "m.safetensors"
    save_packed(model, path, preprocessing={"input_size": [3, 32, 32]})
    with pytest.raises(UserError, match="trained with quantized activations"):
        export_executorch(path, tmp_path / "m.pte", 4)
    model, _ = make()
    save_packed(model, path, preprocessing={})
    with pytest.raises(UserError, match="has no input size"):
        export_executorch(path, tmp_path / "m.pte", 4)
    assert not (tmp_path / "m.pte").exists()
