"""The verbs export and classify: files written whole, one-line errors, bad images named and passed over."""

import csv

import pytest
import torch
from fixtures.packed import make, net, packed  # noqa: F401
from PIL import Image

from tq_lightning import bit_width, load_packed, save_packed
from tq_lightning.cli import classify, main
from tq_lightning.cli import export as command
from tq_lightning.errors import UserError


def test_export_of_a_packed_file(packed, tmp_path, capsys):
    out, rest, whole = (
        tmp_path / n for n in ("narrow.safetensors", "rest.safetensors", "whole.safetensors")
    )
    assert (
        command.main([str(packed), "--out", str(out), "--max-bits", "2", "--rest", str(rest)]) == 0
    )
    assert f"wrote {out}" in capsys.readouterr().out
    assert command.main([str(out), "--add", str(rest), "--out", str(whole)]) == 0
    assert whole.read_bytes() == packed.read_bytes()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["missing.ckpt", "--out", "x"], "no file missing.ckpt"),
        (["{packed}"], "--out"),
        (["{packed}", "--out", "x.onnx"], "pass --format onnx, onnx-dynamic or qonnx"),
        (["{packed}", "--outt", "x"], "export: the following arguments are required: --out"),
        (["{packed}", "--out", "x", "--formt", "onnx"], "did you mean --format"),
        (["{packed}", "--out", "x", "--form", "onnx"], "unrecognized arguments: --form"),
        (["{packed}", "--out", "x", "--format", "onnx"], "pass --bits"),
        (["{packed}", "--out", "x", "--bits", "4"], "--max-bits 4"),
        (
            ["{packed}", "--out", "x", "--format", "onnx", "--bits", "4", "--compress"],
            "for packed files",
        ),
        (["{packed}", "--out", "x", "--rest", "y"], "pass both"),
        (["{packed}", "--out", "x", "--rest", "x", "--max-bits", "2"], "pass two"),
        (["{packed}", "--out", "x", "--max-bits", "0"], "from 1 to 8"),
        (["{packed}", "--out", "x", "--opset", "21"], "--opset is for"),
        (["{packed}", "--out", "x", "--fold-norms"], "needs the checkpoint"),
        (["{packed}", "--out", "nowhere/x"], "no folder"),
        (["{packed}", "--out", "x", "--max-bits", "9"], "from 1 to 8"),
        (["{packed}", "--out", "x", "--format", "tflite"], "invalid choice"),
    ],
)
def test_export_errors_are_one_line(argv, said, packed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *(a.format(packed=packed) for a in argv)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "images" / "deep"
    where.mkdir(parents=True)
    for i, size in enumerate(((40, 50), (32, 32), (100, 20))):
        Image.new("RGB", size, (50 * i, 200, 10)).save(where / f"{i}.png")
    Image.new("L", (32, 32), 90).save(where / "grey.jpg")
    (where / "notes.txt").write_text("no image")
    return where.parent


def test_classify(net, packed, folder, tmp_path):
    out = tmp_path / "out.csv"
    assert (
        classify.main([str(packed), str(folder), "--bits", "2", "--top", "3", "--out", str(out)])
        == 0
    )
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 12 and {r["rank"] for r in rows} == {"1", "2", "3"}
    pixels = next(classify._read(load_packed(packed), [folder / "deep" / "0.png"]))[1]
    with torch.no_grad(), bit_width(net[0], 2, "truncate"):
        best = net[0](pixels[None]).softmax(1).max(1)
    assert rows[0]["class"] == str(best.indices.item())
    assert float(rows[0]["probability"]) == pytest.approx(best.values.item(), abs=1e-5)


def test_bad_images_are_named_and_passed_over(packed, folder, capsys):
    (folder / "bad.jpg").write_bytes(b"no picture")
    assert classify.main([str(packed), str(folder), "--bits", "1", "--top", "1"]) == 1
    said = capsys.readouterr()
    assert len(said.out.strip().splitlines()) == 5
    assert (
        "bad.jpg: can't be read as an image" in said.err
        and "4 images classified, 1 skipped" in said.err
    )


def test_classify_errors(packed, folder, tmp_path):
    with pytest.raises(UserError, match="no image or folder"):
        classify.main([str(packed), str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images found under"):
        classify.main([str(packed), str(tmp_path / "empty")])
    with pytest.raises(UserError, match="bits from 1 to 8"):
        classify.main([str(packed), str(folder), "--bits", "9"])
    with pytest.raises(UserError, match="at least 1"):
        classify.main([str(packed), str(folder), "--top", "0"])
    (tmp_path / "empty" / "bad.png").write_bytes(b"x")
    with pytest.raises(UserError, match="none of 1 images"):
        classify.main([str(packed), str(tmp_path / "empty"), "--out", str(tmp_path / "o.csv")])
    assert not (tmp_path / "o.csv").exists()
    for where in (tmp_path / "nowhere" / "o.csv", tmp_path):
        with pytest.raises(UserError, match="cannot write"):
            classify.main([str(packed), str(folder), "--out", str(where)])


def test_a_single_image_that_is_none_is_one_line(packed, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"x")
    assert main(["classify", str(packed), str(tmp_path / "bad.png"), "--bits", "1"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "bad.png can't be read as an image" in said[0]


def test_class_names_of_the_file(net, tmp_path, folder, capsys):
    save_packed(net[0], tmp_path / "m.safetensors", class_names=[f"kind {i}" for i in range(10)])
    classify.main(
        [str(tmp_path / "m.safetensors"), str(folder / "deep" / "1.png"), "--top", "1", "--lean"]
    )
    assert "kind " in capsys.readouterr().out
    with pytest.raises(UserError, match="3 class names"):
        save_packed(net[0], tmp_path / "m.safetensors", class_names=["a", "b", "c"])
