"""The progress bar fits a terminal of 80 columns. Printed losses are those of metrics.csv."""

import csv
import re
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Callback

from tests.fixtures.fits import TWO_STEPS
from tq_lightning.callbacks.progress import FitProgressBar
from tq_lightning.cli import run_fit


def test_the_bar_has_the_loss_but_not_the_name_of_the_run():
    logger = SimpleNamespace(version="20261126-063955-b0ee02")
    trainer = SimpleNamespace(loggers=[logger], progress_bar_metrics={"train/loss": 2.5})
    assert FitProgressBar().get_metrics(trainer, None) == {"train/loss": 2.5}


class BarLosses(Callback):
    """Collect the loss of the progress bar after each optimizer step."""

    losses: list[float] = []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.progress_bar_metrics["train/loss"]))


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_printed_loss_is_the_logged_one(tmp_path, capsys, monkeypatch, accumulate):
    monkeypatch.setattr(BarLosses, "losses", [])
    flags = {
        "limit_train_batches": 4,
        "accumulate_grad_batches": accumulate,
        "log_every_n_steps": 1,
        "callbacks": f"{__name__}.BarLosses",
    }
    args = [text for key, value in flags.items() for text in (f"--trainer.{key}", str(value))]
    run_fit([*TWO_STEPS, *args, "--run_dir", str(tmp_path / "run")])
    printed = [float(text) for text in re.findall(r", loss (\S+),", capsys.readouterr().out)]
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        logged = [float(row["train/loss"]) for row in csv.DictReader(file) if not row["epoch"]]
    assert len(printed) == 4 // accumulate
    assert printed == pytest.approx(logged, rel=1e-3)
    assert BarLosses.losses == pytest.approx(logged, rel=1e-5)
