"""A vision transformer of timm in ONNX Runtime: top-1 as in PyTorch at every width."""

import numpy as np
import pytest
import torch

from tq_lightning import bit_width, load_packed, save_packed

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ARGS = {"img_size": 32, "depth": 1}
HOW = {"input_size": [3, 32, 32]}


@pytest.fixture(scope="module")
def served(make, tmp_path_factory):
    model, _ = make(name="test_vit", size=32, classes=5, model_args=ARGS, skip=("first",))
    path = tmp_path_factory.mktemp("vit") / "m.safetensors"
    save_packed(model, path, model_args=ARGS, preprocessing=HOW)
    return path, load_packed(path)


def run(path, **feeds):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def check(got, model, images, bits):
    with torch.no_grad(), bit_width(model, bits):
        expected = model(images).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(got.argmax(1), expected.argmax(1))


@pytest.mark.slow
def test_dynamic_graph_equals_pytorch_at_every_width(served, tmp_path):
    from tq_lightning.export.onnx.dynamic import export_dynamic

    path, model = served
    export_dynamic(path, tmp_path / "m.onnx")
    images, seen = torch.randn(3, 3, 32, 32), []
    for bits in range(1, 9):
        seen.append(run(tmp_path / "m.onnx", images=images.numpy(), bits=np.array(bits)))
        check(seen[-1], model, images, bits)
    assert all(np.abs(a - seen[-1]).max() > 1e-4 for a in seen[:4])
    with pytest.raises(Exception, match="out of data bounds"):
        run(tmp_path / "m.onnx", images=images.numpy(), bits=np.array(9))


@pytest.mark.parametrize(
    "bits", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4, 5, 6, 7, 8))]
)
def test_static_graph_equals_pytorch(served, bits, tmp_path):
    from tq_lightning.export.onnx.static import export_static

    path, model = served
    export_static(path, tmp_path / "m.onnx", bits)
    images = torch.randn(3, 3, 32, 32)
    check(run(tmp_path / "m.onnx", images=images.numpy()), model, images, bits)


@pytest.mark.slow
def test_float_graphs_fold_in_onnx_runtime_and_keep_4_bit_codes_in_openvino(served, tmp_path):
    import onnx

    from tq_lightning.export.onnx.static import export_static

    openvino = pytest.importorskip("openvino")
    path, model = served
    images, left = torch.randn(3, 3, 32, 32), {}
    for lean in (False, True):
        graph, optimized = tmp_path / f"{lean}.onnx", tmp_path / "optimized.onnx"
        export_static(path, graph, 4, lean=lean)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(optimized)
        ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        stored = onnx.load(optimized).graph.initializer
        left[lean] = sum(tensor.data_type == onnx.TensorProto.UINT4 for tensor in stored)
    assert left == {False: 0, True: 5}  # folded without an option, and only in the default form
    compiled = openvino.Core().compile_model(str(tmp_path / "False.onnx"), "CPU")
    check(compiled({"images": images.numpy()})[0], model, images, 4)
    linears = [
        op.input(1).get_element_type().get_type_name()
        for op in compiled.get_runtime_model().get_ops()
        if op.get_rt_info()["layerType"].astype(str) == "FullyConnected"
    ]
    assert linears == ["u4"] * 5
