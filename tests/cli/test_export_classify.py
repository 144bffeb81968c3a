"""The verbs export and classify: files, one-line errors, and images that can't be read."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.packed import make, net, packed  # noqa: F401
from PIL import Image

from tq_lightning import bit_width, load_packed, save_packed
from tq_lightning.cli import calibration, classify, export_arguments, main
from tq_lightning.cli import export as command
from tq_lightning.errors import UserError


def test_choices_of_the_parsers_are_those_of_the_library():
    from tq_lightning.export.onnx import activation_nodes, qdq
    from tq_lightning.export.packed import weight
    from tq_lightning.quant.activation_ranges import OBSERVERS

    assert classify.MODES == weight.MODES
    assert tuple(OBSERVERS) == export_arguments.OBSERVERS
    assert export_arguments.RUNTIMES == activation_nodes.RUNTIMES
    assert export_arguments.RESIDUALS == qdq.RESIDUALS


def test_packed_file_is_exported_again(packed, tmp_path, capsys):
    out, rest, whole = (
        tmp_path / n for n in ("narrow.safetensors", "rest.safetensors", "whole.safetensors")
    )
    assert (
        command.main([str(packed), "--out", str(out), "--max-bits", "2", "--rest", str(rest)]) == 0
    )
    assert f"wrote {out}" in capsys.readouterr().out
    assert command.main([str(out), "--add", str(rest), "--out", str(whole)]) == 0
    assert whole.read_bytes() == packed.read_bytes()


@pytest.mark.parametrize("count", [1, 256, 257, 400, 511, 5000])
def test_calibration_samples_every_part_of_the_images(count):
    chosen = calibration._evenly(list(range(count)))
    assert len(chosen) == min(256, count) == len(set(chosen))
    assert count - chosen[-1] <= -(-count // 256)  # the last class too


@pytest.mark.parametrize("observer", [None, "mse"])
def test_export_stores_calibrated_activation_ranges(packed, tmp_path, observer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # a shell does not expand the path of --calibrate=~/x
    out, folder = tmp_path / "calibrated.safetensors", tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    how = [] if observer is None else ["--observer", observer]
    argv = [str(packed), "--out", str(out), "--calibrate=~/images", *how]
    assert command.main(argv) == 0
    model = load_packed(out)
    assert len(model.tq_ranges) == 6 and all(high > 0 for _, high in model.tq_ranges.values())
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["missing.ckpt", "--out", "x"], "no file missing.ckpt"),
        (["{packed}"], "--out"),
        (["{packed}", "--out", "x.onnx"], "pass --format onnx, onnx-dynamic or qonnx"),
        (["{packed}", "--out", "x.ONNX"], "pass --format onnx, onnx-dynamic or qonnx"),
        (["{packed}", "--outt", "x"], "export: the following arguments are required: --out"),
        (["{packed}", "--out", "x", "--formt", "onnx"], "did you mean --format"),
        (["{packed}", "--out", "x", "--form", "onnx"], "unrecognized arguments: --form"),
        (["{packed}", "--out", "x", "--format", "onnx-dynamic", "--bits", "4"], "--bits is the"),
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
        (["{packed}", "--out", "x", "--fold-norms", "--format", "onnx"], "needs the checkpoint"),
        (["{packed}", "--out", "."], "--out . is a folder"),
        (["{packed}", "--out", "x", "--rest", ".", "--max-bits", "2"], "--rest . is a folder"),
        (["{packed}", "--out", "nowhere/x"], "no folder"),
        (["{packed}", "--out", "x", "--rest", "nowhere/y", "--max-bits", "2"], "no folder nowhere"),
        (["{packed}", "--out", "nowhere/x", "--rest", "y", "--max-bits", "2"], "no folder nowhere"),
        (["{packed}", "--out", "x", "--max-bits", "9"], "from 1 to 8"),
        (["{packed}", "--out", "x", "--format", "tflite"], "invalid choice"),
        (["{packed}", "--out", "x", "--observer", "mse"], "--observer needs --calibrate"),
        (["{packed}", "--out", "x", "--calibrate", "nodata"], "no such folder or data set"),
        (["{packed}", "--out", "x", "--calibrate", "."], "no images found under ."),
        (["{packed}", "--out", "x", "--calibrate", ""], "--calibrate got an empty value"),
        (
            ["{packed}", "--out", "x", "--format", "qonnx", "--calibrate", "digits"],
            "got --format qonnx, which has no activation ranges",
        ),
        (["{packed}", "--out", "x", "--calibrate", "{packed}"], "is a file and not a folder"),
        (["{packed}", "--out", "x", "--calibrate", "run"], "not in the folder of a run"),
        (["{packed}", "--out", "x", "--calibrate", "digits", "--add", "r"], "cannot be combined"),
    ],
)
def test_export_error_is_one_line(argv, message, packed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *(a.format(packed=packed) for a in argv)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [["--rest", "r", "--max-bits", "8"], ["--calibrate", "images"]])
def test_error_names_the_file_of_the_user(how, packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = Path("run.ckpt")
    source.write_bytes(b"PK a checkpoint")

    def save(checkpoint, out, *_, **__):
        shutil.copyfile(packed, out)

    def fail(path, *_, **__):
        raise UserError(f"{path} is not right")

    monkeypatch.setattr(command, "save_checkpoint", save)
    monkeypatch.setattr(command, "calibrate", fail)
    with pytest.raises(UserError, match=r"^run\.ckpt (stores 8 planes|is not right)"):
        command.main([str(source), "--out", "x", *how])
    assert list(tmp_path.iterdir()) == [tmp_path / source]


def test_narrow_and_rest_file_are_written_together_or_not_at_all(packed, tmp_path, monkeypatch):
    from tq_lightning.export.packed import edit

    def fail(*_):
        raise UserError("cannot write x (No space left on device); nothing was changed")

    monkeypatch.setattr(edit, "repack", fail)
    out, rest = tmp_path / "x", tmp_path / "rest"
    rest.write_text("of another model")
    with pytest.raises(UserError, match="nothing was changed"):
        command.main([str(packed), "--out", str(out), "--max-bits", "2", "--rest", str(rest)])
    assert list(tmp_path.iterdir()) == [rest] and rest.read_text() == "of another model"


def test_calibration_counts_the_images_that_it_skips(packed, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    argv = ["export", str(packed), "--out", str(tmp_path / "x"), "--calibrate", str(folder)]
    assert main(argv) == 0 and capsys.readouterr().err == ""
    (folder / "b.png").write_bytes(b"not an image")
    assert main(argv) == 0
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("skipped 1 of 2 images, e.g. ") and "b.png" in line


def test_calibration_of_a_model_with_nan_is_one_line(packed, tmp_path, monkeypatch, capsys):
    def batches(*_):
        return [torch.full((1, 3, 32, 32), torch.nan)]

    monkeypatch.setattr(calibration, "_batches", batches)
    argv = ["export", str(packed), "--out", str(tmp_path / "x"), "--calibrate", "data"]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --calibrate data: the input of ") and "NaN" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["onnx", "qonnx"])
def test_export_without_bits_uses_the_widest_width(kind, packed, tmp_path, monkeypatch, capsys):
    from tq_lightning.export.onnx import qonnx, static
    from tq_lightning.export.packed.edit import repack

    def write(path, out, bits, *opset):
        out.write_text(str(bits))
        return ["aux.weight"]

    monkeypatch.setattr(static, "export_static", write)
    monkeypatch.setattr(qonnx, "export_qonnx", write)
    repack(packed, tmp_path / "narrow", max_bits=4)
    for source, expected in ((packed, 8), (tmp_path / "narrow", 4)):
        out = tmp_path / "m.onnx"
        assert main(["export", str(source), "--out", str(out), "--format", kind]) == 0
        assert out.read_text() == str(expected)
        printed = capsys.readouterr().out
        assert f": {expected} bits, pass --bits for another width" in printed
        assert "aux.weight is left out: the network does not call its layer" in printed
    main(["export", str(packed), "--out", str(out), "--format", kind, "--bits", "2"])
    assert out.read_text() == "2" and "pass --bits" not in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "images" / "deep"
    where.mkdir(parents=True)
    for i, size in enumerate(((40, 50), (32, 32), (100, 20))):
        Image.new("RGB", size, (50 * i, 200, 10)).save(where / f"{i}.png")
    Image.new("L", (32, 32), 90).save(where / "gray.jpg")
    (where / "notes.txt").write_text("no image")
    return where.parent


def test_classify_writes_the_top_classes(net, packed, folder, tmp_path):
    out = tmp_path / "out.csv"
    assert (
        classify.main([str(packed), str(folder), "--bits", "2", "--top", "3", "--out", str(out)])
        == 0
    )
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 12 and {r["rank"] for r in rows} == {"1", "2", "3"}
    pixels = next(classify.read_preprocessed(load_packed(packed), [folder / "deep" / "0.png"]))[1]
    with torch.no_grad(), bit_width(net[0], 2, "truncate"):
        best = net[0](pixels[None]).softmax(1).max(1)
    assert rows[0]["class"] == str(best.indices.item())
    assert float(rows[0]["probability"]) == pytest.approx(best.values.item(), abs=1e-5)


def test_verbs_never_replace_a_file_that_they_read(packed, folder, tmp_path, capsys):
    model, image = tmp_path / "m.safetensors", folder / "deep" / "0.png"
    model.write_bytes(packed.read_bytes())
    (tmp_path / "link").symlink_to(model)
    record = tmp_path / "record.json"
    record.write_text('{"run": 1}')
    for argv in (
        ("export", model, "--out", model),
        ("export", model, "--out", tmp_path / "link", "--max-bits", 2),
        ("export", model, "--out", tmp_path / "new", "--max-bits", 2, "--rest", model),
        ("classify", model, image, "--out", model),
        ("classify", model, folder, "--out", image),
        ("inspect", "--model.name", "resnet8_cifar", "--out", record),
        ("export", model, "--out", ""),
        ("classify", model, image, "--out", ""),
    ):
        assert main([str(word) for word in argv]) == 2, argv
        err = capsys.readouterr().err
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
    assert model.read_bytes() == packed.read_bytes() and record.read_text() == '{"run": 1}'
    assert Image.open(image).size == (40, 50) and not (tmp_path / "new").exists()


def test_unreadable_images_are_named_and_skipped(packed, folder, capsys):
    (folder / "bad.jpg").write_bytes(b"no picture")
    assert classify.main([str(packed), str(folder), "--bits", "1", "--top", "1"]) == 1
    printed = capsys.readouterr()
    assert len(printed.out.strip().splitlines()) == 5
    assert (
        "bad.jpg: can't be read as an image" in printed.err
        and "4 images classified, 1 skipped" in printed.err
    )


def test_16_bit_images_are_classified_as_8_bit_ones(packed, tmp_path, capsys):
    gray = np.arange(0, 256, dtype=np.uint8).repeat(4).reshape(32, 32)
    Image.fromarray(gray).save(tmp_path / "8.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "16.png")
    classify.main([str(packed), str(tmp_path), "--top", "10"])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == 20
    for one, other in zip(rows[:10], rows[10:], strict=True):
        assert one["image"] != other["image"]
        assert (one["class"], one["probability"]) == (other["class"], other["probability"])


@pytest.mark.slow
@pytest.mark.parametrize("out", [False, True])
def test_names_that_are_not_utf8_keep_their_bytes(packed, folder, tmp_path, out):
    (folder / "deep" / "0.png").rename(folder / "deep" / os.fsdecode(b"caf\xe9.png"))
    (folder / "deep" / os.fsdecode(b"bad\xff.png")).write_bytes(b"x")
    argv = [str(packed), str(folder), "--bits", "1", "--top", "1"]
    argv += ["--out", str(tmp_path / "o.csv")] if out else []
    done = subprocess.run(
        [sys.executable, "-m", "tq_lightning", "classify", *argv], capture_output=True, check=False
    )
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert b"bad\\udcff.png" in done.stderr
    text = (tmp_path / "o.csv").read_bytes() if out else done.stdout
    assert b"caf\xe9.png,1," in text


def test_files_that_are_not_images_are_skipped_and_counted(packed, folder, capsys):
    (folder / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/x.png", "deep/._0.png"):
        (folder / name).write_bytes(b"x")
    os.mkfifo(folder / "fifo.png")
    assert classify.main([str(packed), str(folder), "--bits", "1", "--top", "1"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.strip().splitlines()) == 5
    assert "skipped 4: " in printed.err and "not regular files (fifo.png)" in printed.err


def test_classify_error_is_one_line(packed, folder, tmp_path):
    with pytest.raises(UserError, match="no image or folder"):
        classify.main([str(packed), str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images found under"):
        classify.main([str(packed), str(tmp_path / "empty")])
    with pytest.raises(UserError, match="bits from 1 to 8"):
        classify.main([str(packed), str(folder), "--bits", "9"])
    with pytest.raises(UserError, match="at least 1"):
        classify.main([str(packed), str(folder), "--top", "0"])
    with pytest.raises(
        UserError, match=r"unrecognized arguments: .*; .* pass a folder for several"
    ):
        classify.main([str(packed), *map(str, sorted(folder.rglob("*.png")))])
    (tmp_path / "empty" / "bad.png").write_bytes(b"x")
    with pytest.raises(UserError, match="none of 1 images"):
        classify.main([str(packed), str(tmp_path / "empty"), "--out", str(tmp_path / "o.csv")])
    assert not (tmp_path / "o.csv").exists()
    for where in (tmp_path / "nowhere" / "o.csv", tmp_path):
        with pytest.raises(UserError, match="cannot write"):
            classify.main([str(packed), str(folder), "--out", str(where)])


def test_single_unreadable_image_is_an_error_of_one_line(packed, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"x")
    assert main(["classify", str(packed), str(tmp_path / "bad.png"), "--bits", "1"]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and "bad.png can't be read as an image" in printed[0]


def test_classify_prints_the_class_names_of_the_file(net, tmp_path, folder, capsys):
    save_packed(net[0], tmp_path / "m.safetensors", class_names=[f"kind {i}" for i in range(10)])
    classify.main(
        [str(tmp_path / "m.safetensors"), str(folder / "deep" / "1.png"), "--top", "1", "--lean"]
    )
    assert "kind " in capsys.readouterr().out
    with pytest.raises(UserError, match="3 class names"):
        save_packed(net[0], tmp_path / "m.safetensors", class_names=["a", "b", "c"])


def test_error_about_a_temporary_file_names_the_checkpoint(packed, tmp_path, monkeypatch):
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_bytes(b"PK")
    monkeypatch.setattr(command, "save_checkpoint", lambda source, out, *_: out.touch())
    with pytest.raises(UserError) as raised, command.packed_file(checkpoint) as (path, folder):
        assert path.parent == folder != tmp_path
        raise UserError(f"{path} has no activation ranges")
    assert str(raised.value) == f"{checkpoint} has no activation ranges"
    message = re.escape(f"{packed} is used as it is")
    with pytest.raises(UserError, match=message), command.packed_file(packed) as (path, _):
        raise UserError(f"{path} is used as it is")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: {"maps": y, "logits": y.mean((2, 3))}, None),
        (lambda y: y, "(1, 10, 8, 8)"),
        (lambda y: {"maps": y}, "dict"),
        (lambda y: (y.mean((2, 3)), y), "tuple"),
    ],
)
def test_classify_needs_logits(output, message, packed, tmp_path, capsys, monkeypatch):
    class Network(torch.nn.Module):
        tq_file = load_packed(packed).tq_file

        def forward(self, x):
            return output(torch.ones(len(x), 10, 8, 8))

    from tq_lightning.export.packed import reader

    image = tmp_path / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    monkeypatch.setattr(reader, "load_packed", lambda *args, **named: Network())
    status = main(["classify", str(packed), str(image), "--out", str(tmp_path / "out.csv")])
    lines = capsys.readouterr().err.strip().splitlines()
    if message is None:
        assert status == 0
    else:
        assert status == 2 and len(lines) == 1 and f"returns {message};" in lines[0]
    assert (tmp_path / "out.csv").exists() == (message is None)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
@pytest.mark.parametrize(
    "verb", [["export", "--format", "onnx", "--bits", "4"], ["demo-page"]], ids=["export", "page"]
)
def test_missing_package_of_the_export_is_an_error_that_names_it(verb, package, packed, tmp_path):
    code = f"import sys; sys.modules[{package!r}] = None; from tq_lightning.cli import main; "
    arguments = [verb[0], str(packed), "--out", str(tmp_path / "out"), *verb[1:]]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(main({arguments!r}))"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert package in done.stderr and "pip install 'tq_lightning[onnx]'" in done.stderr
    assert not (tmp_path / "out").exists()
