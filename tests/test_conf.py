"""Every file of conf/ trains for two steps: its model at its input size, on synthetic data."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tq_lightning.cli import run_fit
from tq_lightning.data import text as text_data
from tq_lightning.data import timeseries
from tq_lightning.data.timeseries import Series
from tq_lightning.models import text as text_model
from tq_lightning.models.text import TextClassifier

CONF = Path(__file__).parents[1] / "conf"
EXPECTED = {
    "digits",
    "r8_cifar10",
    "r20_cifar10",
    "r20_cifar10_finetune",
    "r56_cifar10_finetune",
    "r18",
    "r50",
    "mobilenetv3",
    "deit_tiny",
    "convnext",
}
NATIVE = {"digits": (8, 10), "cifar10": (32, 10), "imagenet": (224, 1000)}


def files() -> list:
    rows = []
    for path in sorted(CONF.glob("*.yaml")):
        if ":" in yaml.safe_load(path.read_text())["data"]["name"]:
            continue  # a different kind of data set, see below
        heavy = yaml.safe_load(path.read_text())["data"][
            "name"
        ] == "imagenet" or path.stem.startswith("r56")
        rows.append(pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if heavy else []))
    return rows


def test_every_conf_file_is_tested() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} >= EXPECTED


@pytest.mark.parametrize("path", files())
def test_conf_file_trains_two_steps(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = yaml.safe_load(path.read_text())["data"]
    size, classes = NATIVE[data["name"]]
    assert data.get("image_size", size) == size
    metrics = run_fit(
        [
            *[
                "--config",
                str(path),
                "--trainer.default_root_dir",
                str(tmp_path),
                "--trainer.precision",
                "32-true",
            ],
            *[
                "--trainer.max_epochs",
                "1",
                "--trainer.limit_train_batches",
                "2",
                "--trainer.limit_val_batches",
                "1",
            ],
            *["--trainer.check_val_every_n_epoch", "1", "--trainer.enable_model_summary", "false"],
            *["--trainer.accelerator", "cpu"],
            *[
                "--model.pretrained",
                "false",
                "--model.checkpoint_path",
                "null",
                "--model.calibration_batches",
                "1",
                "--model.warmup_epochs",
                "0",
                "--model.decay_epochs",
                "0.5",
            ],
            *[
                "--data.name",
                "synthetic",
                "--data.num_classes",
                str(classes),
                "--data.image_size",
                str(size),
            ],
            *[
                "--data.batch_size",
                "2",
                "--data.eval_batch_size",
                "2",
                "--data.samples",
                str(max(16, 2 * classes)),
            ],
        ]
    )
    assert metrics["train/loss_w1"] > 0 and metrics["train/loss_w8"] > 0
    for bits in range(1, 9):
        assert metrics[f"val/qt_gap_w{bits}"] == 0.0, (
            "every file of conf/ trains the floor arm as it stands"
        )
    assert (Path(metrics["run_dir"]) / "checkpoints" / "last.ckpt").is_file()
    capsys.readouterr()


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_arms_differ_only_in_the_quantizer(path: Path) -> None:
    model = yaml.safe_load(path.read_text())["model"]
    assert model["quantizer"] == "floor"
    assert model.get("ste", "auto") == "auto", "a fixed STE would give both arms that of one"
    assert "--model.quantizer round" in path.read_text(), "the comment on top names the other arm"


def test_timeseries_conf_trains_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random series of the same form replace its data files."""
    draw = np.random.default_rng(0)

    def series(count: int) -> Series:
        arrays = [draw.normal(size=(12, 7 + n % 9)).astype(np.float32) for n in range(count)]
        labels = [n % 9 for n in range(count)]
        names = [str(n) for n in range(9)]
        return Series(arrays, labels, names, 15, np.zeros(12), np.ones(12))

    monkeypatch.setattr(timeseries, "aeon_series", lambda: (series(99), series(18)))
    metrics = run_fit(
        [
            *("--config", str(CONF / "timeseries.yaml"), "--trainer.accelerator", "cpu"),
            *("--trainer.default_root_dir", str(tmp_path), "--trainer.max_epochs", "1"),
            *("--trainer.limit_train_batches", "2", "--trainer.enable_model_summary", "false"),
            *("--trainer.check_val_every_n_epoch", "1", "--model.warmup_epochs", "0"),
        ]
    )
    assert 0 <= metrics["val/acc1_truncate_w1"] <= 100


def test_text_conf_trains_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights and texts are optional: a small encoder and random tokens stand for them."""

    class Tokens:
        classes = ("negative", "positive")

        def __init__(self, count: int) -> None:
            self.labels = [n % 2 for n in range(count)]

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, n: int) -> dict:
            mask = torch.arange(6) < 3 + n % 4
            ids = torch.randint(1, 11, (6,)) * mask
            return {"input_ids": ids, "attention_mask": mask.long(), "labels": self.labels[n]}

    def small(num_classes: int) -> TextClassifier:
        return TextClassifier(num_classes, 11, 8, 16, 2, 2, 6)

    monkeypatch.setattr(text_data, "movie_reviews", lambda: (Tokens(99), Tokens(18)))
    monkeypatch.setattr(text_model, "minilm", small)
    metrics = run_fit(
        [
            *("--config", str(CONF / "text.yaml"), "--trainer.accelerator", "cpu"),
            *("--trainer.default_root_dir", str(tmp_path), "--trainer.max_epochs", "1"),
            *("--trainer.limit_train_batches", "2", "--model.quantize_embeddings", "true"),
        ]
    )
    assert 0 <= metrics["val/acc1_truncate_w1"] <= 100
