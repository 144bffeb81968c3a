"""16-bit gray PNGs through the command line: trained, scored and classified as their 8-bit form."""

import csv
from pathlib import Path

import numpy as np
import pytest
from fixtures.runs import record
from PIL import Image

from tq_lightning.cli import main


def stripes(kind: str, seed: int) -> np.ndarray:
    """Return stripes of 4 pixels along rows or columns, (32, 32) uint16 from 12000 to 34000.

    Clipped to 8 bits, all of them would be white.
    """
    draw = np.random.default_rng(seed)
    bright = (np.arange(32) // 4 + draw.integers(2)) % 2
    values = np.where(bright[:, None], 30000, 12000) + draw.integers(0, 4000, (32, 32))
    return (values if kind == "rows" else values.T).astype(np.uint16)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def eight_bits(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels / 257).astype(np.uint8)


@pytest.mark.slow
def test_16_bit_and_8_bit_stripes_are_classified_by_every_verb(tmp_path, capsys):
    """Train on 16 bits, test on 8, classify both: every image gets its class."""
    for kind in ("rows", "columns"):
        for n in range(32):
            save(tmp_path / "data" / "train" / kind / f"{n}.png", stripes(kind, n))
        for n in range(8):
            save(tmp_path / "data" / "val" / kind / f"{n}.png", eight_bits(stripes(kind, 99 + n)))
        save(tmp_path / "seen" / f"{kind}16.png", stripes(kind, 999))
        save(tmp_path / "seen" / f"{kind}8.png", eight_bits(stripes(kind, 999)))
    common = [
        *("--data.name", "imagefolder", "--data.root", str(tmp_path / "data")),
        *("--data.image_size", "32", "--data.batch_size", "16", "--data.workers", "0"),
        *("--data.scale", "0.9", "--data.hflip", "0", "--model.name", "resnet8_cifar"),
        *("--model.widths", "8,4", "--model.calibration_batches", "1"),
        *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "6"),
    ]
    run = tmp_path / "run"
    assert main(["fit", *common, "--run_dir", str(run)]) == 0
    best = record(run)["best"]["metrics"]
    assert best["val/acc1_truncate_w8"] == best["val/acc1_truncate_w4"] == 100.0
    last = str(run / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    assert main(["validate", *common, "--ckpt_path", last]) == 0
    assert "100.00" in capsys.readouterr().out
    packed, out = tmp_path / "model.safetensors", tmp_path / "out.csv"
    assert main(["export", last, "--out", str(packed)]) == 0
    assert main(["classify", str(packed), str(tmp_path / "seen"), "--out", str(out)]) == 0
    with out.open(newline="") as file:
        first = {Path(r["image"]).stem: r["name"] for r in csv.DictReader(file) if r["rank"] == "1"}
    assert first == {
        f"{kind}{depth}": kind for kind in ("rows", "columns") for depth in ("8", "16")
    }
    # class indices follow the sorted names, so other folders print a note
    capsys.readouterr()
    for split in ("train", "val"):
        (tmp_path / "data" / split / "rows").rename(tmp_path / "data" / split / "along")
    assert main(["validate", *common, "--ckpt_path", last]) == 0
    printed = capsys.readouterr().err
    assert "trained on other classes: class 0 is 'columns' there and 'along' in the data" in printed
