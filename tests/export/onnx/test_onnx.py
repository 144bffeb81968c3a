"""ONNX Runtime against PyTorch at every width: static graphs, the dynamic graph, QONNX's Trunc.

PyTorch's exporter takes seconds per graph, so a small network is exported once per kind.
Further exports are marked slow.
"""

import json

import numpy as np
import pytest
import torch
from torch import nn

from tq_lightning import bit_width, load_packed, prepare, save_packed
from tq_lightning.errors import UserError
from tq_lightning.export.onnx.static import dense, smallest_type
from tq_lightning.export.onnx.weight_nodes import levels_affine
from tq_lightning.quant.codes import LEVELS, codes_to_levels

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

HOW = {"input_size": [3, 8, 8], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.25]}
NAMES = ["ant", "b\u00e9", "42"]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, bias=False)
        self.bn, self.act, self.fc, self.head = (
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Linear(6, 5),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        return self.head(self.fc(self.act(self.bn(self.conv(self.stem(x)))).mean((2, 3))))


def small(**how):
    torch.manual_seed(0)
    model = Small()
    prepare(
        model,
        **{
            "verbose": False,
            "activations": "clamp_round_truncate",
            "normalizer": "tanh_channel",
            **how,
        },
    )
    for module in model.modules():
        for norm in getattr(module, "sets", {}).values():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
        if hasattr(module, "calibrated"):
            module.calibrated.fill_(True)
    return model.eval()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Return the packed file of a small network, and the loaded model."""
    path = tmp_path_factory.mktemp("onnx") / "m.safetensors"
    save_packed(small(), path, preprocessing=HOW, class_names=NAMES)
    return path, load_packed(path, model=Small())


@pytest.fixture(autouse=True)
def own_network(monkeypatch):
    """Pass the network wherever the exporters load a file, because it has no timm name."""
    from tq_lightning.export.onnx import dynamic, qonnx, static

    def load(path, bits=None, model=None):
        return load_packed(path, bits=bits, model=Small())

    for module in (static, dynamic, qonnx):
        monkeypatch.setattr(module, "load_packed", load)


def session(path, **entries):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def metadata(path):
    """Return the metadata that ONNX Runtime passes to an application."""
    values = session(path).get_modelmeta().custom_metadata_map
    plain = {"model": str, "quantizer": str}
    return {key: plain.get(key, json.loads)(value) for key, value in values.items()}


DESCRIPTION = {"quantizer": "floor", "stored_bits": 8, "class_names": NAMES, **HOW}


def expected(model, images, bits):
    with torch.no_grad(), bit_width(model, bits):
        return model(images).numpy()


@pytest.mark.parametrize("level", LEVELS)
def test_affine_form_gives_the_levels(level):
    for bits in range(1, 9):
        codes = torch.arange(2**bits, dtype=torch.uint8)
        a, b = levels_affine(bits, level)
        np.testing.assert_allclose(
            a * codes.numpy() + b, 2 * codes_to_levels(codes, bits, level).numpy() - 1, atol=2e-7
        )


def test_each_width_uses_the_smallest_type():
    kinds = {bits: onnx.TensorProto.DataType.Name(smallest_type(bits)[0]) for bits in range(1, 9)}
    assert kinds == {
        1: "UINT2",
        2: "UINT2",
        3: "UINT4",
        4: "UINT4",
        **dict.fromkeys(range(5, 9), "UINT8"),
    }
    assert {smallest_type(bits)[2] for bits in range(3, 9)} == {21} and smallest_type(2)[2] == 25
    assert smallest_type(2, 21) == (onnx.TensorProto.UINT4, 2, 21) and smallest_type(8, 25)[2] == 25
    with pytest.raises(UserError, match="pass 21 or 25"):
        smallest_type(4, 22)


@pytest.mark.parametrize("per_byte", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 4, 7, 10])
def test_dense_packing_is_the_layout_of_onnx(per_byte, count):
    codes = (np.arange(count) * 7 % (1 << 8 // per_byte)).astype(np.uint8)
    kind = {1: onnx.TensorProto.UINT8, 2: onnx.TensorProto.UINT4, 4: onnx.TensorProto.UINT2}[
        per_byte
    ]
    tensor = onnx.helper.make_tensor("c", kind, [count], dense(codes, per_byte), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.uint8), codes)


@pytest.mark.parametrize(
    ("bits", "opset", "kind", "lean"),
    [
        (2, None, "UINT2", False),
        (3, None, "UINT4", True),
        pytest.param(1, None, "UINT2", True, marks=pytest.mark.slow),
        pytest.param(2, 21, "UINT4", False, marks=pytest.mark.slow),
        pytest.param(8, None, "UINT8", False, marks=pytest.mark.slow),
    ],
)
def test_static_graph_equals_pytorch(served, bits, opset, kind, lean, tmp_path):
    from tq_lightning.export.onnx.static import export_static

    path, model = served
    export_static(path, tmp_path / "m.onnx", bits, opset, lean)
    graph = onnx.load(tmp_path / "m.onnx").graph
    kinds = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in graph.initializer}
    assert kinds["conv.weight/codes"] == kinds["fc.weight/codes"] == kind
    form = "DequantizeLinear" if lean else "Cast"
    made = [n for n in graph.node if n.op_type == form and n.input[0].endswith("/codes")]
    assert "conv.weight" not in kinds and len(made) == 2
    assert metadata(tmp_path / "m.onnx") == {**DESCRIPTION, "widths": [bits]}
    images = torch.randn(5, 3, 8, 8)
    for options in ({}, {"disable_quant_qdq": "1"}):
        got = session(tmp_path / "m.onnx", **options).run(None, {"images": images.numpy()})[0]
        np.testing.assert_allclose(got, expected(model, images, bits), rtol=0, atol=1e-5)
    assert np.abs(got - expected(model, images, 3 if bits != 3 else 2)).max() > 1e-3


def test_weights_are_folded_at_load_only_with_the_option(tmp_path):
    """ONNX Runtime keeps DequantizeLinear of a constant unless QDQ handling is disabled."""
    helper, kind = onnx.helper, onnx.TensorProto
    codes = helper.make_tensor(
        "c", kind.UINT4, [4, 6], dense(np.arange(24, dtype=np.uint8) % 16, 2), raw=True
    )
    scalars = [
        helper.make_tensor(name, kind.FLOAT, [], [value])
        for name, value in (("s", 0.5), ("b", -1.0))
    ]
    nodes = [
        helper.make_node(*n)
        for n in (("DequantizeLinear", "cs", "w"), ("Add", "wb", "v"), ("MatMul", "xv", "y"))
    ]
    ends = [
        helper.make_tensor_value_info(name, kind.FLOAT, [2, n]) for name, n in (("x", 4), ("y", 6))
    ]
    opsets = [helper.make_opsetid("", 21)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [codes, *scalars])
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets)
    )
    for entry, left in (("0", True), ("1", False)):
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", entry)
        options.optimized_model_filepath = str(tmp_path / f"{entry}.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        kinds = [n.op_type for n in onnx.load(tmp_path / f"{entry}.onnx").graph.node]
        assert ("DequantizeLinear" in kinds) == left


def test_dynamic_graph_equals_pytorch_at_every_width(served, tmp_path):
    from tq_lightning.export.onnx.dynamic import export_dynamic

    path, model = served
    export_dynamic(path, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    kinds = {i.name: i.data_type for i in graph.initializer}
    assert (
        onnx.TensorProto.UINT8 in kinds.values()
        and sum(n.op_type == "BitShift" for n in graph.node) == 3
    )
    assert metadata(tmp_path / "m.onnx") == {**DESCRIPTION, "widths": list(range(1, 9))}
    run, images = session(tmp_path / "m.onnx"), torch.randn(5, 3, 8, 8)
    for bits in (8, 1, 2, 3, 4, 5, 6, 7, 8):
        got = run.run(None, {"images": images.numpy(), "bits": np.array(bits)})[0]
        np.testing.assert_allclose(got, expected(model, images, bits), rtol=0, atol=1e-5)
    for bits in (0, -1, 9, 16):  # a shift of 8 or more, or below 0, is an error
        with pytest.raises(Exception, match="out of data bounds"):
            run.run(None, {"images": images.numpy(), "bits": np.array(bits)})


def test_qonnx_trunc_equals_the_shift(served, tmp_path):
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    from tq_lightning.export.onnx.qonnx import DOMAIN, export_qonnx

    class Trunc(OpRun):
        """Trunc of QONNX, version 1: floor(round(x / scale + zero) / 2^(in - out)), dequantized."""

        op_domain = DOMAIN

        def _run(self, x, scale, zero, bits_in, bits_out, rounding_mode=None):
            assert rounding_mode == "FLOOR"
            y = np.floor(np.round(x / scale + zero) / 2.0 ** (bits_in - bits_out))
            return (((y - zero) * scale).astype(np.float32),)

    path, model = served
    export_qonnx(path, tmp_path / "m.onnx", 3)
    graph = onnx.load(tmp_path / "m.onnx")
    assert sum(n.op_type == "Trunc" and n.domain == DOMAIN for n in graph.graph.node) == 2
    images = torch.randn(2, 3, 8, 8)
    got = ReferenceEvaluator(graph, new_ops=[Trunc]).run(None, {"images": images.numpy()})[0]
    np.testing.assert_allclose(got, expected(model, images, 3), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="got 9"):
        export_qonnx(path, tmp_path / "m.onnx", 9)


def test_invalid_export_is_an_error(served, tmp_path):
    from tq_lightning.export.onnx.static import export_static

    with pytest.raises(UserError, match="bits from 1 to 8"):
        export_static(served[0], tmp_path / "m.onnx", 9)
    save_packed(small(), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="has no input size"):
        export_static(tmp_path / "m.safetensors", tmp_path / "m.onnx", 4)
    assert not (tmp_path / "m.onnx").exists()
