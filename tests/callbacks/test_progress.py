"""The progress bar fits a terminal of 80 columns."""

from types import SimpleNamespace

from tq_lightning.callbacks.progress import FitProgressBar


def test_the_bar_has_the_loss_but_not_the_name_of_the_run():
    logger = SimpleNamespace(version="20261126-063955-b0ee02")
    trainer = SimpleNamespace(loggers=[logger], progress_bar_metrics={"train/loss": 2.5})
    assert FitProgressBar().get_metrics(trainer, None) == {"train/loss": 2.5}
