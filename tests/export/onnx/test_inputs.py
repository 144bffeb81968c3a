"""Graphs of networks that do not take images: names, order and values of their inputs."""

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tq_lightning import bit_width, calibrate_norms, load_packed, prepare, save_packed
from tq_lightning.errors import UserError
from tq_lightning.export.onnx.dynamic import export_dynamic
from tq_lightning.export.onnx.integer import export_integer
from tq_lightning.export.onnx.qonnx import export_qonnx
from tq_lightning.export.onnx.static import export_static
from tq_lightning.models.sequence import cnn, lstm
from tq_lightning.models.text import TextClassifier
from tq_lightning.quant.batches import call_model
from tq_lightning.quant.input_spec import describe_inputs, example_inputs


class OptionalArgument(nn.Module):
    """An optional argument between the inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, offset=None, scale=None):
        h = self.b(self.a(x).relu())
        return self.c(h * scale if offset is None else h + offset)


def text():
    ids = torch.randint(1, 11, (3, 5))
    return TextClassifier(2, 11, 8, 16, 2, 1, 5), {
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]),
        "input_ids": ids,
    }


def series():
    return cnn(3, channels=2, width=8), (torch.randn(3, 2, 6), torch.tensor([6, 4, 3]))


def gap():
    return OptionalArgument(), {"x": torch.randn(3, 4), "scale": torch.randn(3, 4)}


NAMES = {text: ["input_ids", "attention_mask"], series: ["x", "lengths"], gap: ["x", "scale"]}


@pytest.mark.parametrize(
    "make",
    [
        series,
        *(pytest.param(make, marks=pytest.mark.slow, id=make.__name__) for make in (text, gap)),
    ],
)
def test_graph_has_the_inputs_of_the_network(make, tmp_path):
    torch.manual_seed(0)
    model, inputs = make()
    embeddings = {"quantize_embeddings": True, "skip": ["last"]} if make is text else {}
    prepare(model, verbose=False, **embeddings)
    if make is series:
        for _ in range(2):
            call_model(model.train(), inputs)
        calibrate_norms(model, [inputs])
    rows = describe_inputs(model, inputs)
    path, out = tmp_path / "m.safetensors", tmp_path / "m.onnx"
    save_packed(model, path, inputs=rows)
    packed = load_packed(path, model=make()[0])
    assert packed.tq_file["inputs"] == rows
    named = inputs if isinstance(inputs, dict) else dict(zip(NAMES[make], inputs, strict=True))
    feeds = {name: value.numpy() for name, value in named.items()}
    for bits in (8, 2):
        with bit_width(packed, bits):
            expected = call_model(packed, inputs)
        export_static(path, out, bits, model=make()[0])
        session = onnxruntime.InferenceSession(out)
        assert [i.name for i in session.get_inputs()] == NAMES[make]
        got = torch.from_numpy(session.run(None, feeds)[0])
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    export_dynamic(path, out, model=make()[0])
    session = onnxruntime.InferenceSession(out)
    assert [i.name for i in session.get_inputs()] == [*NAMES[make], "bits"]
    got = session.run(None, {**feeds, "bits": torch.tensor(2).numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-3, atol=1e-4)
    if make is text:  # a table is read by number, and its codes are stored
        graph = onnx.load(out).graph
        assert any(node.op_type == "Gather" for node in graph.node)
        codes = [i for i in graph.initializer if "words" in i.name and list(i.dims) == [11, 8]]
        assert [i.data_type for i in codes] == [onnx.TensorProto.UINT8]


def test_invalid_inputs_are_errors(tmp_path):
    model = OptionalArgument()
    assert describe_inputs(model, {"x": torch.zeros(2, 4), "other": 3}) == []
    row = {"name": "y", "shape": [4], "type": "float32"}
    with pytest.raises(UserError, match="no input 'y'; it takes x, offset, scale"):
        example_inputs(model, [row])
    prepare(model, verbose=False)
    for wrong in ({"type": "complex64"}, {"name": "a b"}, {"shape": [-1]}, {"shape": 4}):
        with pytest.raises(UserError, match="expected rows of name, shape"):
            save_packed(model, tmp_path / "m.safetensors", inputs=[{**row, **wrong}])
    with pytest.raises(UserError, match="expected rows of name"):
        save_packed(model, tmp_path / "m.safetensors", inputs=[row, row])
    assert not list(tmp_path.iterdir())
    save_packed(model, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="inputs= if the network does not take images"):
        export_static(tmp_path / "m.safetensors", tmp_path / "m.onnx", 4, model=OptionalArgument())


class NamedOutputs(nn.Module):
    """Return the logits after another output."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.b(self.a(x).relu())
        return {"features": h, "logits": self.c(h)}


def test_output_logits_is_that_of_a_mapping_in_any_order(tmp_path):
    path, out = tmp_path / "m.safetensors", tmp_path / "m.onnx"
    torch.manual_seed(0)
    model, x = NamedOutputs(), torch.randn(5, 4)
    prepare(model, verbose=False)
    save_packed(model, path, inputs=[{"name": "x", "shape": [4], "type": "float32"}])
    export_static(path, out, 3, model=NamedOutputs())
    session = onnxruntime.InferenceSession(out)
    logits, features = session.run(None, {"x": x.numpy()})
    assert session.get_outputs()[0].name == "logits"
    with torch.no_grad(), bit_width(model, 3, "truncate"):
        assert torch.allclose(call_model(model, x), torch.from_numpy(logits), atol=1e-6)
        assert torch.allclose(model(x)["features"], torch.from_numpy(features), atol=1e-6)


class TwoNames(nn.Module):
    """A layer with two names, which is called under the second one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.d = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.c = self.b

    def forward(self, x):
        return self.d(self.c(self.a(x)).relu())


def test_layer_with_two_names_is_exported(tmp_path):
    path, out = tmp_path / "m.safetensors", tmp_path / "m.onnx"
    torch.manual_seed(0)
    model, x = TwoNames(), torch.randn(5, 4)
    prepare(model, verbose=False)
    save_packed(model, path, inputs=[{"name": "x", "shape": [4], "type": "float32"}])
    export_static(path, out, 3, model=TwoNames())
    logits = onnxruntime.InferenceSession(out).run(None, {"x": x.numpy()})[0]
    for bits in (3, 2):  # another width has other logits
        with torch.no_grad(), bit_width(model, bits, "truncate"):
            equal = torch.allclose(model(x), torch.from_numpy(logits), atol=1e-6)
        assert equal == (bits == 3)


def test_recurrent_layers_are_named_instead_of_asking_for_ranges(tmp_path):
    networks = {make: make(channels=3, num_classes=2, width=4) for make in (lstm, cnn)}
    series = {"x": torch.randn(4, 3, 5), "lengths": torch.tensor([5, 4, 3, 2])}
    messages = {
        lstm: r"its quantized layers are LSTM\); omit --integer",
        cnn: "no activation ranges; pass --calibrate run, with",
    }
    for make, model in networks.items():
        prepare(model, verbose=False)
        calibrate_norms(model, [series])
        save_packed(model, tmp_path / "m", inputs=describe_inputs(model, series))
        plain = make(channels=3, num_classes=2, width=4)
        with pytest.raises(UserError, match=messages[make]):
            export_integer(tmp_path / "m", tmp_path / "m.onnx", 4, model=plain)


class Unused(nn.Module):
    """A layer that forward does not call, such as an auxiliary head of the training."""

    def __init__(self):
        super().__init__()
        self.a, self.aux = nn.Linear(4, 4), nn.Linear(4, 2)
        self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()))


def test_layer_that_is_not_called_is_left_out(tmp_path):
    path, out = tmp_path / "m.safetensors", tmp_path / "m.onnx"
    torch.manual_seed(0)
    model, x = Unused(), torch.randn(5, 4)
    prepare(model, verbose=False)
    save_packed(model, path, inputs=[{"name": "x", "shape": [4], "type": "float32"}])
    assert export_static(path, out, 3, model=Unused()) == ["aux.weight"]
    with torch.no_grad(), bit_width(model, 3, "truncate"):
        logits = onnxruntime.InferenceSession(out).run(None, {"x": x.numpy()})[0]
        assert torch.allclose(model(x), torch.from_numpy(logits), atol=1e-6)
    assert not any("aux" in tensor.name for tensor in onnx.load(out).graph.initializer)
    assert export_qonnx(path, out, 3, model=Unused()) == ["aux.weight"]
    assert export_dynamic(path, out, model=Unused()) == ["aux.weight"]
    made = export_integer(path, out, 3, model=Unused())
    assert made.layers == ("b",) and made.in_float == {"aux": "the network does not call it"}


class Refuses(NamedOutputs):
    def forward(self, x):
        raise KeyError("no such head")


@pytest.mark.parametrize(
    ("network", "dtype", "message"),
    [
        (Refuses, torch.float32, r"to ONNX \(KeyError: 'no such head'\)$"),
        (Unused, torch.bfloat16, r"; its parameters are bfloat16, pass model.float\(\) to save"),
    ],
)
def test_network_that_is_not_exported_is_an_error_with_its_cause(network, dtype, message, tmp_path):
    model = network()
    prepare(model, verbose=False)
    rows = [{"name": "x", "shape": [4], "type": "float32"}]
    save_packed(model.to(dtype), tmp_path / "m.safetensors", inputs=rows)
    with pytest.raises(UserError, match=message):
        export_static(tmp_path / "m.safetensors", tmp_path / "m.onnx", 3, model=network())
    assert not (tmp_path / "m.onnx").exists()
