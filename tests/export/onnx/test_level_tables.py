"""Levels that are tables in graphs: a Gather of 2^n values, static, dynamic and QONNX."""

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

from tq_lightning import bit_width, load_packed, prepare, save_packed  # noqa: E402
from tq_lightning.errors import UserError  # noqa: E402
from tq_lightning.quant.activation_ranges import ActivationRange  # noqa: E402
from tq_lightning.quant.integer import integer_model  # noqa: E402

LEVELS = {"native": "float_e2", "centroid": "learned_channel"}


class Small(nn.Module):
    """A convolution and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.fc(self.conv(x).relu().mean((2, 3))))


@pytest.fixture(scope="module", params=LEVELS)
def served(request, tmp_path_factory):
    torch.manual_seed(0)
    model = Small()
    how = {"level": request.param, "normalizer": LEVELS[request.param], "scale": "span"}
    prepare(model, skip=("last",), norm="shared", verbose=False, **how)
    path = tmp_path_factory.mktemp("tables") / "m"
    save_packed(model.eval(), path, preprocessing={"input_size": [3, 8, 8]})
    return path, load_packed(path, model=Small())


@pytest.fixture(autouse=True)
def own_network(monkeypatch):
    """Pass the network wherever the exporters load a file, because it has no timm name."""
    from tq_lightning.export.onnx import dynamic, qonnx, static

    for module in (static, dynamic, qonnx):
        monkeypatch.setattr(
            module,
            "load_packed",
            lambda path, bits=None, model=None: load_packed(path, bits, Small()),
        )


def expected(model, images, bits):
    with torch.no_grad(), bit_width(model, bits):
        return model(images).numpy()


def run(path, **inputs):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_static_graph_equals_pytorch(served, bits, tmp_path):
    from tq_lightning.export.onnx.static import export_static

    path, model = served
    export_static(path, tmp_path / "m.onnx", bits)
    graph = onnx.load(tmp_path / "m.onnx").graph
    tables = [i for i in graph.initializer if i.name.endswith("/table")]
    assert [t.dims[0] for t in tables] == [2**bits] * 2
    assert sum(node.op_type == "Gather" for node in graph.node) == 2
    images = torch.randn(4, 3, 8, 8)
    got = run(tmp_path / "m.onnx", images=images.numpy())
    np.testing.assert_allclose(got, expected(model, images, bits), rtol=0, atol=1e-5)


def test_dynamic_graph_equals_pytorch(served, tmp_path):
    from tq_lightning.export.onnx.dynamic import export_dynamic

    path, model = served
    export_dynamic(path, tmp_path / "m.onnx")
    images = torch.randn(4, 3, 8, 8)
    for bits in range(1, 9):
        got = run(tmp_path / "m.onnx", images=images.numpy(), bits=np.array(bits))
        np.testing.assert_allclose(got, expected(model, images, bits), rtol=0, atol=1e-5)


def test_qonnx_gathers_from_truncated_codes(served, tmp_path):
    from tq_lightning.export.onnx.qonnx import export_qonnx

    path, model = served
    export_qonnx(path, tmp_path / "m.onnx", 3)
    graph = onnx.load(tmp_path / "m.onnx").graph
    held = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    index = np.floor(held["fc.weight/codes"] / 2**5).astype(int)
    weight = held["fc.weight/table"][index] * held["fc.weight/scale"]
    with bit_width(model, 3):
        np.testing.assert_array_equal(weight, model.fc.weight.numpy())
    assert [n.op_type for n in graph.node][:4] == ["Trunc", "Cast", "Gather", "Mul"]


def test_integer_mode_needs_evenly_spaced_levels(served):
    path, _ = served
    ranges = {name: ActivationRange(0.0, 1.0) for name in ("conv", "fc")}
    with pytest.raises(UserError, match=r"level '(native|centroid)' has no integer form") as error:
        integer_model(load_with(path, ranges), exact_sums=True)
    assert "\n" not in str(error.value)


def load_with(path, ranges):
    loaded = load_packed(path, model=Small())
    loaded.tq_ranges = ranges
    return loaded


def test_integer_export_needs_evenly_spaced_levels(served):
    from tq_lightning.quant.integer.arithmetic import integer_weight

    weight = next(m for m in served[1].modules() if hasattr(m, "stored"))
    codes = torch.zeros(2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"level '{weight.level}' has no integer form"):
        integer_weight(codes, 4, torch.tensor(1.0), weight.level)
