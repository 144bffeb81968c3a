"""The W&B logger: one run for each fit, in one process too, and none but rank 0's."""

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tq_lightning.callbacks.wandb_logger import make_wandb_logger


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_two_fits_of_one_process_are_two_runs(tmp_path):
    ids = []
    for name in ("a", "b"):
        logger = make_wandb_logger(tmp_path / name, {"lr": 0.1})
        ids.append(logger.experiment.id)
        logger.log_metrics({"x": 1.0}, step=0)
        logger.finalize("success")
    assert len(set(ids)) == 2
    assert all(len(list((tmp_path / name).rglob("run-*.wandb"))) == 1 for name in ("a", "b"))


def test_other_ranks_make_no_run_however_they_were_launched(tmp_path, monkeypatch):
    monkeypatch.setattr(
        rank_zero_only, "rank", 1
    )  # as under Slurm, which sets neither RANK nor LOCAL_RANK
    make_wandb_logger(tmp_path / "a", {"lr": 0.1})
    assert not (tmp_path / "a").exists()
