"""--run_dir and --ckpt_path auto: the folder of a run, and the check that it is the same run."""

import os
from pathlib import Path

import pytest
import yaml

from tq_lightning.errors import UserError
from tq_lightning.records import Change, Points, Record, write_record
from tq_lightning.training.run_folder import (
    auto_folder,
    check_files,
    check_no_other_files,
    check_same_run,
    check_unused,
    is_finished,
    is_same_folder,
)

CONFIG = {
    "seed_everything": 0,
    "trainer": {"max_epochs": 3, "max_steps": -1},
    "model": {"name": "resnet8_cifar", "num_classes": None, "lr": 0.1},
    "data": {"name": "digits", "root": "data"},
}


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for key in [key for key in os.environ if key.startswith("SLURM")]:
        monkeypatch.delenv(key)


@pytest.fixture
def run(tmp_path):
    saved = CONFIG | {
        "model": CONFIG["model"] | {"num_classes": 10, "checkpoint_path": "float.pth"},
        "data": CONFIG["data"] | {"samples": 500},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    return tmp_path


def test_auto_selects_the_given_folder_or_that_of_the_job(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="pass --run_dir FOLDER"):
        auto_folder(None, tmp_path)
    assert auto_folder("x", tmp_path).name == "x"
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert auto_folder(None, tmp_path) == tmp_path / "slurm-12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert auto_folder(None, tmp_path) == tmp_path / "slurm-12_3"
    assert auto_folder("x", tmp_path).name == "x"


def test_same_run_may_have_another_data_path_and_more_epochs(run):
    check_same_run(run, CONFIG)
    check_same_run(run, CONFIG | {"data": {"name": "digits", "root": "/scratch"}})
    check_same_run(run, CONFIG | {"trainer": {"max_epochs": 9}})
    check_same_run(run / "new", CONFIG)
    check_same_run(run, CONFIG | {"model": CONFIG["model"] | {"checkpoint_path": None}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed_everything": 1}, "seed_everything=0, not 1"),
        ({"model": CONFIG["model"] | {"lr": 0.2}}, "model.lr=0.1, not 0.2"),
        ({"data": {"name": "cifar10"}}, "data.name=digits, not cifar10"),
        ({"data": {"name": "digits", "samples": None}}, "data.samples=500, not None"),
    ],
)
def test_folder_of_another_run_is_an_error(run, change, message):
    with pytest.raises(UserError, match=message):
        check_same_run(run, CONFIG | change)


def test_finished_depends_on_the_record_and_the_requested_end(run):
    assert not is_finished(run, CONFIG)
    for status, finished in (("running", False), ("interrupted", False), ("finished", True)):
        write_record(run / "record.json", Record("id", status, CONFIG))
        assert is_finished(run, CONFIG) == finished
    assert not is_finished(run, CONFIG | {"trainer": {"max_epochs": 9, "max_steps": -1}})


def test_folder_with_a_run_needs_ckpt_path_auto(run):
    check_unused(run)
    (run / "checkpoints").mkdir()
    with pytest.raises(UserError, match="pass --ckpt_path auto to resume it"):
        check_unused(run)


def test_files_of_the_user_are_not_replaced(run):
    """`fit --config FOLDER/config.yaml --run_dir FOLDER` would write the resolved one there."""
    with pytest.raises(UserError, match=r"has no run, but a config\.yaml that a fit would replace"):
        check_no_other_files(run)
    write_record(run / "record.json", Record("id", "running", CONFIG))
    check_no_other_files(run)
    (run / "record.json").unlink()
    (run / "config.yaml").rename(run / "fit.yaml")
    check_no_other_files(run)
    (run / "metrics.csv").touch()
    with pytest.raises(UserError, match=r"a metrics\.csv"):
        check_no_other_files(run)


TRAINED = {"train/loss": Points([[0, 1.0]])}


def test_run_without_its_record_is_not_resumed(run):
    with pytest.raises(
        UserError, match=r"record\.json is missing; restore it, or pass --ckpt_path"
    ):
        check_files(run, run / "checkpoints" / "last.ckpt", None)


@pytest.mark.parametrize(
    ("logger", "curves", "changes", "missing"),
    [
        (None, TRAINED, [], True),
        (None, None, [], False),  # killed before the first row
        (None, {"val/loss": Points([[0, 1.0]])}, [], False),  # and after a validation
        (False, TRAINED, [], False),
        (None, TRAINED, [Change("trainer.logger", 1, 9, False, None)], False),
    ],
)
def test_run_without_the_metrics_that_it_wrote_is_not_resumed(
    run, logger, curves, changes, missing
):
    config = CONFIG | {"trainer": CONFIG["trainer"] | {"logger": logger}}
    record = Record("id", "running", config, curves=curves, changes=changes or None)
    write_record(run / "record.json", record)
    last = run / "checkpoints" / "last.ckpt"
    if missing:
        with pytest.raises(UserError, match=r"metrics\.csv is missing; restore it, or create an"):
            check_files(run, last, None)
    else:
        check_files(run, last, None)
    check_files(run, last, False)  # this fit writes none
    (run / "metrics.csv").touch()
    check_files(run, last, None)


@pytest.mark.parametrize("text", ["", "3", "model: [1", "model: 1\nmodel: 2"])
def test_damaged_configuration_is_an_error_of_one_line(run, text):
    (run / "config.yaml").write_text(text)
    write_record(run / "record.json", Record("id", "finished", CONFIG))
    for function in (check_same_run, is_finished):
        with pytest.raises(UserError, match=r"config\.yaml"):
            function(run, CONFIG)
    (run / "config.yaml").write_text(
        "seed_everything: 0\nmodel: null\n"
    )  # without a trainer section
    check_same_run(run, CONFIG)
    assert not is_finished(run, CONFIG)


def test_two_forms_of_a_path_are_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_same_folder(tmp_path / "a", Path("a"))
    assert not is_same_folder(tmp_path / "a", Path("b"))
    assert not is_same_folder(tmp_path / "a", None)
