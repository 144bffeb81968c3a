"""Integer graphs of the trained digits network on other processors, emulated by qemu-user.

Logits on the 360 test images are compared with exact sums in float64. x86 without VNNI adds pairs
of products in 16 bits; `worst_case` shows that full activation codes saturate there and that those
that `export_integer` chooses do not.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.arm64 import arm64_python
from fixtures.exact_onnx import exact_outputs

from tq_lightning import calibrate_activations, load_packed
from tq_lightning.data.datamodule import TQDataModule
from tq_lightning.quant.integer.saturation import activation_top, largest_integer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).parent / "run_graphs.py"
PACKED = ROOT / "results" / "digits_example" / "model.safetensors"
WIDTHS = range(8, 0, -1)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """{runtime: (folder with images.npy and a graph for each width, {width: exact logits})}."""
    from tq_lightning.export.onnx.integer import export_integer

    data = TQDataModule("digits", workers=0)
    data.setup("test")
    test = torch.cat([data.normalize(images) for images, _ in data.test_dataloader()])
    observed = [images for images, _ in data.calibration_batches(4)]
    ranges = calibrate_activations(load_packed(PACKED), observed)
    made = {}
    for runtime in ("onnxruntime", "openvino"):
        folder = tmp_path_factory.mktemp(runtime)
        np.save(folder / "images.npy", test.numpy().astype(np.float32))
        exact = {}
        for bits in WIDTHS:
            path = folder / f"w{bits}.onnx"
            wrote = export_integer(PACKED, path, bits, runtime, ranges=ranges)
            assert wrote.safe and not wrote.in_float
            exact[bits] = exact_outputs(path, test.numpy())[0]
        made[runtime] = folder, exact
    return made


def check_predictions(folder, exact, runtime):
    """Check that predictions equal those of exact integers, and count differences due to ties."""
    ties = 0
    for bits, expected in exact.items():
        logits = np.load(folder / f"w{bits}.{runtime}.npy")
        assert len(logits) >= 300
        top = np.sort(expected, axis=1)
        # a code at a half may round either way, which moves a logit by one step of the last layer
        tie = top[:, -1] - top[:, -2] < 0.02 * np.abs(expected).max()
        differ = logits.argmax(1) != expected.argmax(1)
        assert not (differ & ~tie).any(), f"{bits} bits: {(differ & ~tie).sum()} predictions differ"
        ties += int(differ.sum())
        away = np.abs(logits - expected).max(1)
        assert np.mean(away > 1e-4) < 0.05
    assert ties <= 2
    return ties


def run(command, folder, runtime, *packages, **environment):
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), runtime, *packages],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def haswell():
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("needs qemu-x86_64 (Debian's qemu-user)")
    return ["qemu-x86_64", "-cpu", "Haswell", sys.executable]


NO_AVX512 = {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("emulated", [False, True], ids=["native", "haswell"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_predictions_on_x86_equal_exact_sums(graphs, runtime, emulated):
    pytest.importorskip(runtime)
    command = haswell() if emulated else [sys.executable]
    run(command, graphs[runtime][0], runtime, **NO_AVX512)
    check_predictions(*graphs[runtime], runtime)


@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a76"])
def test_predictions_on_arm_equal_exact_sums(graphs, cpu):
    command, site = arm64_python(cpu)
    run(command, graphs["onnxruntime"][0], "onnxruntime", str(site))
    check_predictions(*graphs["onnxruntime"], "onnxruntime")


def worst_case(folder, bits, top):
    """Write a linear graph whose products have one sign and the largest possible magnitude."""
    helper, kind = onnx.helper, onnx.TensorProto
    weight = np.full((64, 16), largest_integer(bits), np.int8)
    constants = [
        onnx.numpy_helper.from_array(value, name)
        for name, value in (("w", weight), ("z", np.uint8(0)), ("s", np.float32(1)))
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "s", "z"], ["a"]),
        helper.make_node("MatMulInteger", ["a", "w", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["y"], to=kind.FLOAT),
    ]
    ends = [
        helper.make_tensor_value_info(name, kind.FLOAT, ["n", size])
        for name, size in (("images", 64), ("y", 16))
    ]
    opsets = [helper.make_opsetid("", 21)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    folder.mkdir()
    onnx.save(model, folder / f"w{bits}.onnx")
    np.save(folder / "images.npy", np.full((4, 64), top, np.float32))
    return 64 * top * int(weight[0, 0])


def test_exported_activation_codes_do_not_saturate_without_vnni(tmp_path):
    wrong = []
    for bits in WIDTHS:
        for top in (255, activation_top(bits, exact_sums=False)):
            folder = tmp_path / f"{bits}_{top}"
            if folder.exists():
                continue
            expected = worst_case(folder, bits, top)
            run(haswell(), folder, "onnxruntime", **NO_AVX512)
            if (np.load(folder / f"w{bits}.onnxruntime.npy") != expected).any():
                wrong.append((bits, top))
    assert wrong == [(8, 255), (7, 255)]
