"""Every run that ends has a result in its record. Commands without training do not change it."""

import csv
import json
import shutil

import pytest

from tq_lightning.cli import main, run_fit

FLAGS = {
    "model.calibration_batches": 1,
    "model.widths": "8,2",
    "data.name": "digits",
    "data.batch_size": 16,
    "trainer.accelerator": "cpu",
    "trainer.limit_train_batches": 4,
    "trainer.limit_val_batches": 1,
    "trainer.max_epochs": 2,
    "trainer.enable_model_summary": "false",
}


def arguments(root, **flags):
    flags = {**FLAGS, **{key.replace("__", "."): value for key, value in flags.items()}}
    return [
        *(f"--{key}={value}" for key, value in flags.items() if value is not None),
        f"--trainer.default_root_dir={root}",
    ]


def only_run(root):
    (run,) = (path for path in root.iterdir())
    return run, json.loads((run / "record.json").read_text())


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_epoch_has_one_row_with_all_metrics(tmp_path):
    run_fit(arguments(tmp_path, trainer__log_every_n_steps=3))
    run, record = only_run(tmp_path)
    epochs = [row for row in rows(run) if row["epoch"]]
    assert [(row["epoch"], row["step"]) for row in epochs] == [("0", "3"), ("1", "7")]
    for row in epochs:
        for key in ("train/loss_w8", "train/lr", "train/images_per_second"):
            assert float(row[key]) > 0, key
        for key in ("val/acc1_truncate_w2", "val/acc5_truncate_w2", "val/loss_w2", "val/loss"):
            assert float(row[key]) >= 0, key
        assert not row["train/loss"]
    steps = [row for row in rows(run) if not row["epoch"]]
    assert [row["step"] for row in steps] == ["2", "5"]
    assert all(float(row["train/loss"]) > 0 and float(row["train/lr"]) > 0 for row in steps)
    assert float(steps[0]["train/lr"]) > float(steps[1]["train/lr"])  # cosine
    for key in ("train/images_per_second", "train/lr", "val/loss", "val/acc5_truncate_w2"):
        assert [epoch for epoch, _ in record["curves"][key]] == [0, 1]
    assert "train/loss" not in record["curves"]


def test_run_with_a_time_limit_is_evaluated_at_its_end(tmp_path):
    """The last step is evaluated, although the next validation was due after 50 epochs."""
    run_fit(
        arguments(
            tmp_path,
            trainer__max_time="00:00:00:02",
            trainer__max_epochs=100,
            trainer__limit_train_batches=None,
            trainer__check_val_every_n_epoch=50,
        )
    )
    run, record = only_run(tmp_path)
    assert record["status"] == "finished" and record["widths"]["2"]["truncate"] > 0
    assert record["best"]["step"] == record["steps"] > 0
    assert list((run / "checkpoints").glob("best-*.ckpt"))


@pytest.mark.parametrize("interval", ["00:00:00:01", "{hours: 1}"])
def test_run_with_validations_by_time_has_a_result(tmp_path, interval):
    run_fit(arguments(tmp_path, trainer__val_check_interval=interval, trainer__max_epochs=1))
    _, record = only_run(tmp_path)
    assert record["status"] == "finished" and record["widths"]["2"]["truncate"] > 0


@pytest.mark.slow
def test_best_values_are_those_of_the_best_checkpoint_within_an_epoch(tmp_path):
    """The best values of the record are those of the best checkpoint, also within an epoch."""
    import torch

    run_fit(arguments(tmp_path, trainer__val_check_interval=1, trainer__limit_val_batches=2))
    run, record = only_run(tmp_path)
    (best,) = (run / "checkpoints").glob("best-*.ckpt")
    state = torch.load(best, weights_only=True)
    (callback,) = (s for key, s in state["callbacks"].items() if "acc1_truncate_mean" in key)
    assert record["best"]["step"] == state["global_step"]
    assert record["best"]["metrics"]["val/acc1_truncate_mean"] == pytest.approx(
        float(callback["best_model_score"]), abs=1e-4
    )
    validated = [row for row in rows(run) if row["val/images"]]
    assert [row["step"] for row in validated] == [str(n) for n in range(8)]
    scores = [float(row["val/acc1_truncate_mean"]) for row in validated]
    assert scores.index(max(scores)) + 1 == record["best"]["step"]


def test_run_without_loggers_writes_a_complete_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_fit(arguments(tmp_path / "runs", trainer__logger="false"))
    run, record = only_run(tmp_path / "runs")
    assert record["status"] == "finished" and set(record["widths"]) == {str(b) for b in range(1, 9)}
    assert [epoch for epoch, _ in record["curves"]["train/loss_w8"]] == [0, 1]
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "layers.txt",
        "record.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_fit_on_a_finished_run_changes_nothing(tmp_path, capsys, checkpoint):
    run_fit(arguments(tmp_path, trainer__max_epochs=3))
    run, _ = only_run(tmp_path)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for more in ({"trainer__max_epochs": 1}, {"trainer__max_epochs": 3}, {"trainer__max_steps": 4}):
        if checkpoint == "best" and more != {"trainer__max_epochs": 1}:
            continue  # more epochs remain
        code = main(["fit", *arguments(tmp_path, ckpt_path=checkpoint, **more)])
        error = capsys.readouterr().err
        assert code == 2, (more, error)
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in error, error
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_saved_configuration_starts_a_new_run(tmp_path):
    run_fit(arguments(tmp_path / "a", trainer__max_epochs=1))
    run, _ = only_run(tmp_path / "a")
    run_fit(arguments(tmp_path / "a", ckpt_path="last"))
    first = (run / "record.json").read_bytes()
    run_fit(
        [f"--config={run / 'config.yaml'}", "--seed_everything=5"]
        + [f"--trainer.default_root_dir={tmp_path / 'b'}"]
    )
    _, record = only_run(tmp_path / "b")
    assert record["seed"] == 5 and record["epochs"] == 2 and record["status"] == "finished"
    assert (run / "record.json").read_bytes() == first


def test_damaged_metrics_file_is_an_error_of_one_line(tmp_path, capsys):
    run_fit(arguments(tmp_path, trainer__max_epochs=1))
    run, _ = only_run(tmp_path)
    for text in (b"\xff\xfe\x00garbage", b"a,b\n1,2\n"):
        (run / "metrics.csv").write_bytes(text)
        before = (run / "record.json").read_bytes(), (run / "config.yaml").read_bytes()
        assert main(["fit", *arguments(tmp_path, ckpt_path="last")]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {run / 'metrics.csv'} is damaged")
        assert (run / "metrics.csv").read_bytes() == text
        assert before == ((run / "record.json").read_bytes(), (run / "config.yaml").read_bytes())


def test_missing_file_of_a_run_is_an_error_of_one_line(tmp_path, capsys):
    run_fit(arguments(tmp_path, trainer__max_epochs=1))
    run, _ = only_run(tmp_path)
    more = arguments(tmp_path, trainer__max_epochs=2)
    auto = ["--run_dir", str(run), "--ckpt_path", "auto"]
    for name in ("metrics.csv", "record.json", "config.yaml"):
        (run / name).rename(tmp_path / name)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert main(["fit", *more, *auto]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        missing = "record.json" if name == "config.yaml" else name
        assert error.startswith(f"error: {run / missing} is missing; restore it, or")
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name in ("record.json", "config.yaml"):
        (tmp_path / name).rename(run / name)
    (run / "metrics.csv").touch()
    assert main(["fit", *more, *auto]) == 0
    assert json.loads((run / "record.json").read_text())["epochs"] == 2


def test_checkpoint_of_one_run_changes_no_other_run(tmp_path, capsys):
    run_fit(arguments(tmp_path, trainer__max_epochs=1))
    run, _ = only_run(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    checkpoint = run / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    for verb in ("fit", "test"):
        given = [f"--run_dir={other}", f"--ckpt_path={checkpoint}"]
        assert main([verb, *arguments(tmp_path, trainer__max_epochs=2), *given]) == 2
        error = capsys.readouterr().err
        assert f"run_dir={other} already has a run, and ckpt_path: {checkpoint} is not" in error
    assert {p: p.read_bytes() for p in other.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_partial_tests_and_tests_of_other_data_are_stored_separately(tmp_path, capsys):
    run_fit(arguments(tmp_path, trainer__max_epochs=1))
    _, record = only_run(tmp_path)
    assert main(["test", *arguments(tmp_path, ckpt_path="last")]) == 0
    _, tested = only_run(tmp_path)
    assert tested["test"]["images"] == 360 and tested["test"]["split"] == "test"
    assert {k: v for k, v in tested.items() if k != "test"} == record
    part = arguments(
        tmp_path, ckpt_path="last", trainer__limit_test_batches=1, data__eval_batch_size=64
    )
    assert main(["test", *part]) == 0
    other = arguments(tmp_path, ckpt_path="last", data__name="synthetic", data__samples=32)
    assert main(["test", *other, "--data.image_size=8"]) == 0
    _, after = only_run(tmp_path)
    assert after["test"] == tested["test"]
    first = after["tests"][0]
    assert (first["images"], first["batches"], first["data"]["name"]) == (64, 1, "digits")
    assert after["tests"][1]["data"]["name"] == "synthetic"
