"""Artifacts of version 0.1.0 open with the current code and give the same results."""

import csv
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from tq_lightning import bit_width, load_packed
from tq_lightning.cli import main, run_fit

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())
CHECKPOINT = "runs/interrupted/run/checkpoints/last.ckpt"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change into a writable copy of the artifacts."""
    shutil.copytree(HERE / "run", tmp_path / "runs/interrupted/run")
    shutil.copytree(HERE / "sweep", tmp_path / "sweep")
    shutil.copy(HERE / "sweep.yaml", tmp_path)
    shutil.copy(HERE.parents[1] / "conf" / "digits.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def acc1(metrics, split, trained):
    """Return the accuracies of the trained widths 8 and 2 and their mean, or of the others."""
    found = {k: v for k, v in metrics.items() if k.startswith(f"{split}/acc1") and "float" not in k}
    return {k: v for k, v in found.items() if k.endswith(("w8", "w2", "mean")) == trained}


def test_packed_file_gives_the_same_classes():
    model = load_packed(HERE / "packed.safetensors")
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for bits, logits in EXPECTED["logits"].items():
        with torch.no_grad(), bit_width(model, int(bits)):
            torch.testing.assert_close(model(x), torch.tensor(logits), atol=1e-4, rtol=1e-4)


# Version 0.1.0 used the running averages of trained widths, which can be compared exactly. It
# estimated the statistics of untrained widths from evaluation images, so those are only close.
running_averages = mock.patch("tq_lightning.quant.norm_calibration.SETTLED", 0)


@running_averages
@pytest.mark.parametrize("verb", ["test", "validate"])
def test_checkpoint_is_evaluated_as_before(folder, verb):
    config = ["--config", "runs/interrupted/run/config.yaml"]
    assert main([verb, *config, "--ckpt_path", CHECKPOINT]) == 0
    if verb == "test":
        record = json.loads(Path("runs/interrupted/run/record.json").read_text())
        found = record["test"]["metrics"]
        for trained, tolerance in ((True, 0.3), (False, 3.0)):
            # one image of 360 may change sides on another processor
            expected = acc1(EXPECTED["test"], "test", trained)
            assert acc1(found, "test", trained) == pytest.approx(expected, abs=tolerance)


@running_averages
def test_interrupted_run_resumes(folder):
    config = ["--config", "runs/interrupted/run/config.yaml"]
    metrics = run_fit([*config, "--ckpt_path", CHECKPOINT])
    assert Path(metrics["run_dir"]).resolve() == folder / "runs/interrupted/run"
    assert metrics["train/loss_w2"] == pytest.approx(EXPECTED["resumed"]["train/loss_w2"], abs=2e-3)
    for trained, tolerance in ((True, 0.7), (False, 3.0)):
        expected = acc1(EXPECTED["resumed"], "val", trained)
        assert acc1(metrics, "val", trained) == pytest.approx(expected, abs=tolerance)
    record = json.loads(Path("runs/interrupted/run/record.json").read_text())
    assert (record["status"], record["steps"], record["epochs"]) == ("finished", 80, 2)


def test_checkpoint_exports_to_the_weights_it_holds(folder):
    assert main(["export", CHECKPOINT, "--out", "model.safetensors"]) == 0
    model = load_packed("model.safetensors", bits=2)
    assert model.tq_file["prepare"]["widths"] == [8, 2]


@pytest.mark.slow
def test_finished_sweep_is_not_repeated(folder):
    before = {p: p.read_bytes() for p in Path("sweep/trials").rglob("record.json")}
    trials = Path("sweep/trials.csv").read_text()
    assert main(["sweep", "sweep.yaml", "--dir", "sweep"]) == 0
    assert {p: p.read_bytes() for p in Path("sweep/trials").rglob("record.json")} == before
    old, new = (
        list(csv.DictReader(text.splitlines()))
        for text in (trials, Path("sweep/trials.csv").read_text())
    )
    assert [{key: row[key] for key in old[0]} for row in new] == old


def test_report_numbers_are_unchanged(folder):
    assert main(["report", "sweep", "--out", "report"]) == 0
    with (HERE / "expected_runs.csv").open() as file:
        expected = list(csv.DictReader(file))
    with Path("report/runs.csv").open() as file:
        found = {
            (r["model_quantizer"], r["seed"], r["source"], r["width"]): r
            for r in csv.DictReader(file)
        }
    assert len(found) == len(expected) == 64
    for row in expected:
        new = found[row["model_quantizer"], row["seed"], row["source"], row["width"]]
        assert {key: new[key] for key in row} == row
    arms = Path("report/tables/arms.md").read_text()
    for cell in ("76.7 ± 57.4", "74.7 ± 39.7", "83.3 ± 26.5", "78.5 ± 26.5"):  # floor, then round
        assert cell in arms
