"""The W&B logger: one run per fit, even within one process, and only on rank 0."""

import pytest
import wandb
from fixtures.fits import TWO_STEPS
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from wandb.sdk.wandb_run import Run  # also the name of versions before `wandb.Run`

from tq_lightning.callbacks.metric_log import SPEED
from tq_lightning.callbacks.wandb_logger import PerFitWandbLogger, make_wandb_logger
from tq_lightning.cli import run_fit
from tq_lightning.errors import UserError
from tq_lightning.records import read_record


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_two_fits_in_one_process_create_two_runs(tmp_path):
    ids = []
    for name in ("a", "b"):
        logger = make_wandb_logger(tmp_path / name, {"lr": 0.1})
        ids.append(logger.experiment.id)
        logger.log_metrics({"x": 1.0}, step=0)
        logger.finalize("success")
    assert len(set(ids)) == 2
    assert all(len(list((tmp_path / name).rglob("run-*.wandb"))) == 1 for name in ("a", "b"))


def test_only_rank_zero_creates_a_run_under_every_launcher(tmp_path, monkeypatch):
    monkeypatch.setattr(
        rank_zero_only, "rank", 1
    )  # as under Slurm, which sets neither RANK nor LOCAL_RANK
    make_wandb_logger(tmp_path / "a", {"lr": 0.1})
    assert not (tmp_path / "a").exists()


def test_resumed_fit_continues_its_run_and_repeats_no_step(tmp_path, monkeypatch):
    """Killed after step 1 and half of step 2, resumed from the checkpoint of step 1."""
    logged = []
    monkeypatch.setattr(Run, "log", lambda self, data, **_: logged.append(data))
    logger = make_wandb_logger(tmp_path / "a", {"lr": 0.1})
    for step in (0, 1):
        logger.log_metrics({"x": step, "epoch": 0}, step=step)
        logger.log_metrics({"y": step, "epoch": 0}, step=step)
    logger.log_metrics({"x": 2, "epoch": 0}, step=2)
    first = logger.experiment.id
    logger.finalize("failed")
    logger = make_wandb_logger(tmp_path / "a", {"lr": 0.1})
    assert logger.experiment.id == first
    for step in (1, 2, 3):
        logger.log_metrics({"x": step, "epoch": 0}, step=step)
        logger.log_metrics({"y": step, "epoch": 0}, step=step)
    logger.finalize("success")
    rows = [(row["trainer/global_step"], key) for row in logged for key in row if key in "xy"]
    assert sorted(rows) == [(step, key) for step in range(4) for key in "xy"]
    assert all("epoch" in row for row in logged)


def test_values_of_repeated_steps_that_differ_are_logged_and_reported(
    tmp_path, monkeypatch, capsys
):
    """Resumed from the checkpoint of step 1 with another configuration."""
    logged = []
    monkeypatch.setattr(Run, "log", lambda self, data, **_: logged.append(data))
    logger = make_wandb_logger(tmp_path / "a", {"lr": 0.1})
    for step in range(4):
        logger.log_metrics({"x": step / 3, SPEED: 10.0, "epoch": 0}, step=step)
    logger.finalize("success")
    capsys.readouterr()
    for attempt in range(2):  # the second one repeats the new values
        logged.clear()
        logger = make_wandb_logger(tmp_path / "a", {"lr": 0.2})
        for step in (1, 2, 3):
            new = {"x": step / 3 + (step > 1), SPEED: 12.5, "image": object(), "epoch": 0}
            logger.log_metrics(new, step=step)
        logger.finalize("success")
        if attempt == 0:
            rows = {row["trainer/global_step"]: row for row in logged}
            assert "x" not in rows[1] and (rows[2]["x"], rows[3]["x"]) == (2 / 3 + 1, 2.0)
            assert all(SPEED not in row for row in logged)
            assert capsys.readouterr().out == (
                "from step 2 on, values differ from those that W&B has of the same steps: its "
                "curves show both, metrics.csv only the new ones\n"
            )
    assert logged == [] and capsys.readouterr().out == ""


def test_file_of_an_earlier_version_has_no_values(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "log", lambda self, data, **_: pytest.fail("logged twice"))
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "logged.txt").write_text("3 train/loss\n")
    logger = PerFitWandbLogger(tmp_path)
    logger.log_metrics({"train/loss": 0.5, "epoch": 0}, step=3)


def test_wandb_error_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise wandb.errors.UsageError("api_key not configured (no-tty).\nCall wandb.login().")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError) as caught:
        make_wandb_logger(tmp_path / "run", {})
    assert str(caught.value) == (
        "W&B did not start (api_key not configured (no-tty).); run `wandb login`, or set "
        "WANDB_MODE=offline"
    )


def test_wandb_is_called_without_warnings(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(wandb, "init", lambda **kwargs: given.update(kwargs) or Run)
    monkeypatch.setattr(Run, "define_metric", lambda *_, **__: None)
    _ = PerFitWandbLogger(tmp_path, project="p").experiment
    assert given["project"] == "p" and "anonymous" not in given


def test_disabled_wandb_keeps_nothing(tmp_path, monkeypatch):
    """Also no list of what was logged, by which a resumed fit would skip values."""
    wandb.teardown()  # it reads the mode once per process
    monkeypatch.setenv("WANDB_MODE", "disabled")
    found = run_fit([*TWO_STEPS, "--wandb", "--run_dir", str(tmp_path / "run")])
    wandb.teardown()
    assert read_record(found["record"]).status == "finished"
    assert [path for path in (tmp_path / "run").rglob("*") if "wandb" in path.name] == []
