"""A quantizer added as one row of the registry works in the whole program."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from fixtures.fits import TWO_STEPS

from tq_lightning import bit_width, load_packed
from tq_lightning.callbacks.width_metrics import evaluation_passes
from tq_lightning.cli import main, run_fit
from tq_lightning.errors import UserError
from tq_lightning.export.onnx.width_modules import TensorActivation, WidthTables
from tq_lightning.quant import activation
from tq_lightning.quant.activation import Activation, ActivationQuantizer
from tq_lightning.quant.bit_width import Width
from tq_lightning.quant.codes import QUANTIZERS, Quantizer
from tq_lightning.records import read_record, write_record
from tq_lightning.training.checkpoint import load_checkpoint_model

FIT = [*TWO_STEPS, "--model.quantizer", "ceil", "--trainer.default_root_dir"]


def _unclamped_ceil(u, top):
    """Return codes of bins (k/2^n, (k+1)/2^n]: `floor` with edges in the lower bin."""
    return torch.ceil(u * (top + 1.0)) - 1.0


@pytest.fixture
def ceil(monkeypatch):
    row = Quantizer(_unclamped_ceil, QUANTIZERS["floor"].edges, ste="slope", nested=True)
    monkeypatch.setitem(QUANTIZERS, "ceil", row)
    return row


def test_new_quantizer_needs_one_row(ceil, tmp_path, capsys):
    runs, packed = tmp_path / "runs", tmp_path / "ceil.safetensors"
    metrics = run_fit([*FIT, str(runs)])
    (run,) = runs.iterdir()
    record = read_record(run / "record.json")
    assert (record.ste, record.nested) == ("slope", True)
    assert all(metrics[f"val/qt_gap_w{bits}"] == 0 for bits in range(1, 9))
    assert all(record.widths[bits].disagree == 0 for bits in range(1, 9))

    checkpoint = run / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match="got model os:getcwd"):
        load_checkpoint_model(checkpoint, "os:getcwd")
    model, hparams, _ = load_checkpoint_model(checkpoint)
    assert hparams["quantizer"] == "ceil"
    assert all(source == "truncate" for bits, source in evaluation_passes(model) if bits)

    assert main(["export", str(checkpoint), "--out", str(packed)]) == 0
    served, images = load_packed(packed), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for bits in (8, 3, 1):
            with bit_width(model, bits, "quantize"), bit_width(served, bits):
                assert torch.equal(served(images), model(images))

    # the report lists it as a separate arm
    other = dataclasses.replace(
        record,
        id="0" * 32,
        config=record.config | {"model": record.config["model"] | {"quantizer": "floor"}},
        ste="scaled",
    )
    shutil.copytree(run, runs / "floor")
    write_record(runs / "floor" / "record.json", other)
    assert main(["report", str(runs), "--out", str(tmp_path / "report")]) == 0
    arms = capsys.readouterr().out
    assert (
        "resnet8_cifar\tdigits\tceil\tslope\t" in arms and "resnet8_cifar\tdigits\tfloor\t" in arms
    )


@pytest.mark.parametrize("learned", [False, True])
def test_new_quantizer_works_in_a_compiled_graph(ceil, monkeypatch, learned):
    monkeypatch.setitem(activation.ACTIVATIONS, "ceil", Activation(learned, "ceil", False))
    x, tables = torch.randn(500) * 3, WidthTables(8, 8, [8, 4, 2, 1])
    for bits in range(1, 9):
        layer = ActivationQuantizer("ceil", Width(8, (8,), bits))
        assert layer.ste == "slope"
        tables.select(torch.tensor(bits))
        assert torch.equal(TensorActivation(tables, layer)(x), layer(x).detach())


def test_new_quantizer_works_in_an_onnx_graph(ceil, tmp_path):
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    from tq_lightning import prepare, save_packed
    from tq_lightning.models import create_model

    model = create_model("resnet8_cifar")
    prepare(model, quantizer="ceil", norm="shared", verbose=False)
    packed, graph = tmp_path / "m.safetensors", tmp_path / "m.onnx"
    save_packed(model.eval(), packed)
    args = ["export", str(packed), "--out", str(graph), "--format", "onnx", "--bits", "3"]
    assert main(args) == 0
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad(), bit_width(model, 3, "truncate"):
        expected = model(images).numpy()
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    got = session.run(None, {"images": images.numpy()})[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
