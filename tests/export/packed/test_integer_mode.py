"""load_packed(mode="integer") and `classify --mode integer`."""

import copy
import csv
import io

import numpy as np
import pytest
import torch
from fixtures.integer_oracle import compare
from PIL import Image

from tq_lightning import bit_width, calibrate_activations, load_packed, save_packed
from tq_lightning.cli.classify import main as classify
from tq_lightning.errors import UserError
from tq_lightning.export.packed import reader
from tq_lightning.export.packed.edit import add_ranges
from tq_lightning.quant.integer import IntegerModel, integer_layers
from tq_lightning.quant.integer.kernels import missing_kernels

pytestmark = pytest.mark.skipif(missing_kernels() is not None, reason=str(missing_kernels()))


@pytest.fixture(scope="module")
def trained(make, tmp_path_factory):
    """Return a packed network with trained activation codes, and images."""
    model, images = make(activations="pact_round", size=16)
    path = tmp_path_factory.mktemp("integer") / "m.safetensors"
    save_packed(model, path, preprocessing={"input_size": [3, 16, 16]})
    return path, images


def logits_at(model, images, bits):
    with torch.inference_mode(), bit_width(model, bits):
        return model(images)


def test_file_runs_on_integers_at_all_widths(trained):
    path, images = trained
    resident, model = load_packed(path), load_packed(path, mode="integer")
    assert isinstance(model, IntegerModel) and len(integer_layers(model)) == 6
    assert model.tq_file == resident.tq_file and model.tq == resident.tq
    for bits in range(1, 9):
        expected, got = logits_at(resident, images, bits), logits_at(model, images, bits)
        assert (got - expected).norm() < 0.05 * expected.norm()
        with bit_width(model, bits):
            assert all(a.wrong == 0 for a in compare(model, images).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_run_on_integers_in_float32(dtype, net, tmp_path, picture, capsys):
    path, images = tmp_path / "m.safetensors", net[1]
    model = copy.deepcopy(net[0])
    calibrate_activations(model, [images])
    expected = logits_at(model, images, 4)
    save_packed(model.to(dtype), path, preprocessing={"input_size": [3, 32, 32]})
    run = load_packed(path, mode="integer")
    logits = logits_at(run, images.to(dtype), 4)
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert load_packed(path).fc.weight.dtype == dtype
    for mode in ("resident", "integer"):
        rows, _ = classify_output(capsys, path, picture, "--bits", "4", "--mode", mode)
        assert len(rows) == 5


def test_file_loaded_at_one_width_runs_on_integers(trained):
    path, images = trained
    model = load_packed(path, bits=2, mode="integer")
    assert torch.equal(
        logits_at(model, images, 2), logits_at(load_packed(path, mode="integer"), images, 2)
    )
    with pytest.raises(UserError, match="loaded for widths 2, not 4"), bit_width(model, 4):
        pass
    with pytest.raises(ValueError, match="has no float weights"), bit_width(model, None):
        pass


def test_file_without_ranges_is_an_error(packed):
    with pytest.raises(UserError, match=r"no activation ranges.*calibrate_act.*--calibrate"):
        load_packed(packed, mode="integer")


def test_without_integer_kernels_the_mode_is_resident(trained, monkeypatch):
    path, images = trained
    monkeypatch.setattr(reader, "missing_kernels", lambda: "PyTorch 2.8 was built without oneDNN")
    with pytest.warns(UserWarning, match="without oneDNN.*mode='resident'"):
        model = load_packed(path, mode="integer")
    assert torch.equal(logits_at(model, images, 4), logits_at(load_packed(path), images, 4))


@pytest.mark.parametrize("compress", [False, True])
def test_ranges_are_saved_and_loaded(net, tmp_path, compress):
    """Ranges added by `save_packed` or later give the same file, which runs on integers."""
    model, images = copy.deepcopy(net[0]), net[1]
    plain, later, once = (tmp_path / f"{name}.safetensors" for name in ("plain", "later", "once"))
    save_packed(model, plain, compress=compress)
    ranges = calibrate_activations(model, [images])
    save_packed(model, once, compress=compress)
    add_ranges(plain, later, ranges)
    assert later.read_bytes() == once.read_bytes() != plain.read_bytes()
    assert load_packed(later).tq_ranges == ranges and load_packed(plain).tq_ranges == {}
    resident, run = load_packed(later), load_packed(later, mode="integer")
    for bits in (8, 1):
        expected = logits_at(resident, images, bits)
        assert (logits_at(run, images, bits) - expected).norm() < 0.1 * expected.norm()
    with pytest.raises(UserError, match="not a quantized layer"):
        add_ranges(plain, plain, {"fc": (0.0, 1.0)})
    assert load_packed(plain).tq_ranges == {}


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def classify_output(capsys, *argv):
    assert classify([str(a) for a in argv]) == 0
    out = capsys.readouterr()
    return list(csv.DictReader(io.StringIO(out.out))), out.err


def test_classify_in_integer_mode(trained, picture, capsys, monkeypatch):
    path, _ = trained
    args = (path, picture, "--bits", "2", "--top", "3")
    expected, _ = classify_output(capsys, *args)
    got, note = classify_output(capsys, *args, "--mode", "integer")
    assert [row["class"] for row in got] == [row["class"] for row in expected]
    assert "6 of 8 layers run on integers; in float: conv1 (not quantized), fc" in note
    lean, _ = classify_output(capsys, *args, "--mode", "lean")
    assert lean == expected
    with pytest.raises(UserError, match="--lean means --mode lean, got --mode integer too"):
        classify([str(a) for a in args] + ["--lean", "--mode", "integer"])
    monkeypatch.setattr(reader, "missing_kernels", lambda: "no oneDNN")
    rows, note = classify_output(capsys, *args, "--mode", "integer")
    assert rows == expected
    assert "warning: mode='integer' is not available (no oneDNN); using mode='resident'" in note
