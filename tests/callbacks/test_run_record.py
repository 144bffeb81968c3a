"""record.json: its schema, its status after any end, its best epoch."""

import csv
import json

import pytest
import torch
from fixtures.fits import TWO_STEPS

from tq_lightning.callbacks.metric_log import MetricLog
from tq_lightning.callbacks.run_record import RunRecord
from tq_lightning.cli import run_fit
from tq_lightning.errors import TrainingError, UserError
from tq_lightning.quant.config import QuantConfig

RUN = [*TWO_STEPS, "--trainer.max_epochs", "2"]


def record_of(root):
    (run,) = root.iterdir()
    return json.loads((run / "record.json").read_text())


def test_finished_run_has_a_complete_record(tmp_path):
    returned = run_fit(
        [
            *RUN,
            "--seed_everything",
            "7",
            "--model.quantizer",
            "round",
            "--trainer.default_root_dir",
            str(tmp_path),
        ]
    )
    record = record_of(tmp_path)
    assert returned["val/acc1_truncate_mean"] == pytest.approx(
        record["last"]["metrics"]["val/acc1_truncate_mean"], abs=1e-3
    )
    assert record["schema"] == 1 and record["status"] == "finished" and record["reason"] is None
    assert record["seed"] == record["config"]["seed_everything"] == 7
    assert {"trainer", "model", "data"} <= record["config"].keys() and record["config"]["model"][
        "quantizer"
    ] == "round"
    assert record["ste"] == "identity" and record["nested"] is False
    assert record["calibration"] == "augmented"
    assert {"tq_lightning", "torch", "lightning", "timm", "python"} <= record["versions"].keys()
    assert (
        record["device"] == "cpu"
        and record["epochs"] == 2
        and record["steps"] == 4
        and record["seconds"] > 0
    )
    assert record["command"].startswith("python -m tq_lightning")
    assert (
        len(record["id"]) == 32
        and isinstance(record["dirty"], bool)
        and "commit" in record
        and "started" in record
    )

    names = [
        f"val/{key}_w{b}"
        for b in range(1, 9)
        for key in ("acc1_quantize", "acc1_truncate", "qt_gap")
    ]
    names += [
        "val/acc1_truncate_mean",
        "val/acc1_float",
        *(f"train/loss_w{b}" for b in (8, 4, 2, 1)),
    ]
    assert set(names) <= record["curves"].keys()
    for name in names:
        assert [epoch for epoch, _ in record["curves"][name]] == [0, 1], name
        assert record["last"]["metrics"][name] == record["curves"][name][-1][1]
    scores = [value for _, value in record["curves"]["val/acc1_truncate_mean"]]
    assert record["last"]["epoch"] == 1 and record["best"]["monitor"] == "val/acc1_truncate_mean"
    assert record["best"]["epoch"] == scores.index(max(scores))
    assert set(record["widths"]) == {str(b) for b in range(1, 9)}
    for bits, row in record["widths"].items():
        assert row["quantize"] - row["truncate"] == pytest.approx(row["qt_gap"], abs=1e-3)
        assert row["truncate"] == record["best"]["metrics"][f"val/acc1_truncate_w{bits}"]
    assert record["widths"]["8"]["disagree"] == 0 and record["widths"]["2"]["disagree"] > 0.01
    planes = [record["bytes"]["planes"][str(b)] for b in range(1, 9)]
    assert planes == sorted(planes) and record["bytes"]["float"] > record["bytes"]["packed"] > 0


@pytest.mark.slow
def test_resumed_run_keeps_model_arguments_and_takes_new_max_epochs(tmp_path):
    root = ("--trainer.default_root_dir", str(tmp_path))
    run_fit([*RUN, *root])
    before = record_of(tmp_path)
    run_fit([*RUN, *root, "--ckpt_path", "last", "--trainer.max_epochs", "3"])
    after = record_of(tmp_path)
    assert (
        before["config"]["model"] == after["config"]["model"]
        and after["config"]["model"]["num_classes"] is None
    )
    assert (
        before["config"]["trainer"]["max_epochs"],
        after["config"]["trainer"]["max_epochs"],
    ) == (2, 3)
    assert before["id"] == after["id"] and after["epochs"] == 3


@pytest.mark.slow
def test_losses_of_an_epoch_are_written_before_its_checkpoint(tmp_path, monkeypatch):
    """A run killed right after the checkpoint of an epoch has that epoch's row exactly once."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def losses(root):
        (run,) = root.iterdir()
        return [
            (row["epoch"], row["step"], row["train/loss_w2"])
            for row in csv.DictReader((run / "metrics.csv").open(newline=""))
            if row["train/loss_w2"]
        ]

    run_fit([*RUN, "--trainer.default_root_dir", str(tmp_path / "whole")])
    root = ("--trainer.default_root_dir", str(tmp_path / "killed"))
    real = ModelCheckpoint.on_train_epoch_end

    def killed(self, *args):
        real(self, *args)
        if self.filename == "last":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ModelCheckpoint, "on_train_epoch_end", killed)
        run_fit([*RUN, *root])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")[:1]
    run_fit([*RUN, *root, "--ckpt_path", "last"])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert [epoch for epoch, *_ in losses(tmp_path / "whole")] == ["0", "1"]


def test_failed_run_records_the_reason(tmp_path, monkeypatch):
    from tq_lightning.training import losses

    monkeypatch.setitem(
        losses.LOSSES, "cross_entropy", lambda x, y: losses.cross_entropy(x, y) * float("nan")
    )
    with pytest.raises(TrainingError):
        run_fit([*RUN, "--trainer.default_root_dir", str(tmp_path)])
    record = record_of(tmp_path)
    assert record["status"] == "failed"
    assert record["reason"].startswith("step 0: loss is not finite at width 8 (learning rate")


class EndedTrainer:
    """The attributes of a Trainer that RunRecord reads at the end of a run."""

    is_global_zero, sanity_checking, interrupted, world_size = True, False, False, 1
    current_epoch, global_step, limit_val_batches = 0, 6, 1.0
    callback_metrics: dict = {}
    callbacks: tuple = ()
    strategy = type("Strategy", (), {"root_device": torch.device("cpu")})()


class Report:
    report = type("Report", (), {"share": 0.9, "embedding_share": 0.0})()
    model = type("Model", (), {"tq": QuantConfig().to_dict()})()

    def modules(self):
        return ()


def running(path, place=None, **config):
    place = place or EndedTrainer()
    record = RunRecord(path, {"seed_everything": 1, **config})
    record.setup(place, Report(), "fit")
    record.on_train_start(place, Report())
    return record


def read(path):
    return json.loads((path / "record.json").read_text())


def test_status_is_interrupted_or_failed(tmp_path):
    record = running(tmp_path)
    assert read(tmp_path)["status"] == "running"
    record.on_exception(EndedTrainer(), Report(), KeyboardInterrupt())
    assert (read(tmp_path)["status"], read(tmp_path)["reason"]) == (
        "interrupted",
        "KeyboardInterrupt",
    )
    record.on_exception(
        EndedTrainer(), Report(), RuntimeError("what comes after does not change it")
    )
    assert read(tmp_path)["status"] == "interrupted"
    other = running(tmp_path / "other")
    other.on_exception(EndedTrainer(), Report(), RuntimeError("out of memory\nwith a long story"))
    assert (read(tmp_path / "other")["status"], read(tmp_path / "other")["reason"]) == (
        "failed",
        "out of memory",
    )


def scores(mean, **more):
    metrics = {"val/acc1_truncate_mean": mean, "val/images": 9.0}
    for bits in range(1, 9):
        metrics |= {
            f"val/acc1_quantize_w{bits}": mean,
            f"val/acc1_truncate_w{bits}": mean - bits,
            f"val/qt_gap_w{bits}": float(bits),
        }
    return metrics | more


def at(epoch, step, mean=None, **more):
    """Return a Trainer at the end of a validation."""
    metrics = {} if mean is None else scores(mean, **more)
    state = {"current_epoch": epoch, "global_step": step, "callback_metrics": metrics}
    return type("At", (EndedTrainer,), state)()


def validate(record, *places):
    for place in places:
        record.on_validation_end(place, Report())


def test_best_epoch_is_the_same_for_all_widths(tmp_path):
    """The best mean over the trained widths, the first among equals; not the best of each width."""
    record = running(tmp_path)
    last = at(3, 40, 60.0, **{"val/acc1_truncate_w1": 99.0})
    validate(record, at(0, 10, 50.0), at(1, 20, 70.0), at(2, 30, 70.0), last)
    got = read(tmp_path)
    assert (got["best"]["epoch"], got["last"]["epoch"], got["epochs"]) == (1, 3, 4)
    assert got["widths"]["1"] == {"quantize": 70.0, "truncate": 69.0, "qt_gap": 1.0}
    assert got["curves"]["val/acc1_truncate_w1"][3] == [3, 99.0]


def test_several_validations_in_an_epoch_keep_the_best_of_all(tmp_path):
    """A curve has the last value of each epoch; the best is that of the best checkpoint."""
    record = running(tmp_path)
    validate(record, at(0, 5, 50.0), at(0, 10, 80.0), at(0, 15, 60.0))
    got = read(tmp_path)
    assert (got["best"]["step"], got["best"]["metrics"]["val/acc1_truncate_mean"]) == (10, 80.0)
    assert got["widths"]["2"]["truncate"] == 78.0
    assert got["curves"]["val/acc1_truncate_mean"] == [[0, 60.0]] and got["last"]["step"] == 15


def test_training_metrics_belong_to_their_epoch(tmp_path):
    log = MetricLog()
    log.epoch, log.train_metrics = 0, {"train/loss_w2": 0.5}
    record, place = running(tmp_path), at(0, 10, 50.0)
    validate(record, place)
    place.callbacks = [log]
    record.on_save_checkpoint(place, Report(), {})
    got = read(tmp_path)
    assert got["curves"]["train/loss_w2"] == [[0, 0.5]]
    assert got["best"]["metrics"]["train/loss_w2"] == got["last"]["metrics"]["train/loss_w2"] == 0.5


def test_resumed_run_keeps_identity_time_and_earlier_results(tmp_path):
    first = running(tmp_path)
    first._start -= 100.0
    validate(first, at(0, 10, 50.0))
    before = read(tmp_path)
    running(tmp_path, at(1, 10))
    after = read(tmp_path)
    assert after["id"] == before["id"] and after["started"] == before["started"]
    assert after["seconds"] >= 100.0 and after["status"] == "running"
    for key in ("best", "last", "widths", "curves"):
        assert after[key] == before[key]
    assert running(tmp_path / "other")._record.id != before["id"]


@pytest.mark.parametrize("step", [20, None])
def test_resumed_run_drops_results_after_its_checkpoint(tmp_path, step):
    """Killed in epoch 2, resumed from the end of epoch 0; also with a record without steps."""
    first = running(tmp_path)
    validate(first, at(0, 10, 50.0), at(1, 20, 90.0))
    if step is None:
        tree = read(tmp_path)
        for block in ("best", "last"):
            del tree[block]["step"]
        (tmp_path / "record.json").write_text(json.dumps(tree))
    second = running(tmp_path, at(1, 10))
    got = read(tmp_path)
    assert got["best"]["epoch"] == got["last"]["epoch"] == 0
    assert got["widths"]["1"]["truncate"] == 49.0
    assert got["curves"]["val/acc1_truncate_mean"] == [[0, 50.0]]
    validate(second, at(1, 20, 40.0))
    assert read(tmp_path)["best"]["epoch"] == 0


def test_resuming_from_the_best_checkpoint_keeps_its_validation(tmp_path):
    """It was written in the validation at the end of epoch 1, which does not run again."""
    validate(running(tmp_path), at(0, 10, 50.0), at(1, 20, 90.0), at(2, 30, 60.0))
    running(tmp_path, at(1, 20))
    got = read(tmp_path)
    assert got["best"]["epoch"] == got["last"]["epoch"] == 1
    assert got["curves"]["val/acc1_truncate_mean"] == [[0, 50.0], [1, 90.0]]


def test_resumed_run_records_both_calibrations(tmp_path, monkeypatch):
    from tq_lightning.callbacks import setting_changes

    monkeypatch.setattr(setting_changes, "untrained_widths", lambda model: [7])
    trainer = EndedTrainer()
    trainer.current_epoch = 1
    assert running(tmp_path, trainer, model={})._record.calibration == "augmented"
    tree = read(tmp_path)
    tree["curves"] = {"train/loss": [[0, 1.0]]}
    (tmp_path / "record.json").write_text(json.dumps(tree))
    assert running(tmp_path, trainer, model={})._record.calibration == "augmented"
    del tree["calibration"]
    (tmp_path / "record.json").write_text(json.dumps(tree))
    for _ in range(2):  # resumed once, and once more
        assert (
            running(tmp_path, trainer, model={})._record.calibration
            == "not augmented, then augmented"
        )


def resumed(path, epoch, step, **data):
    """Return the changes of the record of a run that resumes at a step with other data keys."""
    running(path, at(epoch, step), model={}, data={"batch_size": 16, **data})
    return read(path).get("changes")


def test_settings_that_change_at_a_resume_are_recorded(tmp_path):
    assert resumed(tmp_path, 0, 0) is None
    assert resumed(tmp_path, 1, 10) is None
    entry = {"key": "data.batch_size", "epoch": 2, "step": 20, "before": 16, "after": 32}
    assert resumed(tmp_path, 2, 20, batch_size=32) == [entry]
    assert resumed(tmp_path, 3, 30, batch_size=32) == [entry]  # unchanged since
    second = {"key": "data.batch_size", "epoch": 4, "step": 40, "before": 32, "after": 8}
    assert resumed(tmp_path, 4, 40, batch_size=8) == [entry, second]


def test_changes_after_the_checkpoint_of_a_resume_are_undone(tmp_path):
    """The steps that were trained with them are trained again."""
    resumed(tmp_path, 0, 0)
    resumed(tmp_path, 2, 20, batch_size=32)
    assert resumed(tmp_path, 2, 20) is None
    resumed(tmp_path, 2, 20, batch_size=32)
    got = resumed(tmp_path, 1, 10, batch_size=32)
    assert [(c["step"], c["before"], c["after"]) for c in got] == [(10, 16, 32)]
    assert resumed(tmp_path, 0, 0, batch_size=32) is None  # nothing was trained with 16


def test_environment_that_changes_at_a_resume_is_recorded(tmp_path):
    running(tmp_path, model={})
    tree = read(tmp_path) | {"processes": 2, "commit": None}
    tree["versions"]["torch"] = "2.0"
    (tmp_path / "record.json").write_text(json.dumps(tree))
    running(tmp_path, at(1, 10), model={})
    got = read(tmp_path)["changes"]
    assert [(c["key"], c["before"]) for c in got] == [("processes", 2), ("versions.torch", "2.0")]


@pytest.mark.slow
def test_resume_with_another_batch_size_and_precision(tmp_path, capsys):
    root = ("--trainer.default_root_dir", str(tmp_path))
    run_fit([*RUN, *root, "--trainer.max_epochs", "1"])
    other = ("--data.batch_size", "32", "--data.samples", "500", "--trainer.precision")
    more = (*other, "bf16-mixed", "--trainer.accumulate_grad_batches", "2", "--ckpt_path", "last")
    with pytest.raises(UserError, match=r"data.image_size: got 16, but .* pass the same data"):
        run_fit([*RUN, *root, *more, "--data.image_size", "16"])
    run_fit([*RUN, *root, *more])
    keys = ["precision", "max_epochs", "accumulate_grad_batches"]
    expected = [*(f"trainer.{key}" for key in keys), "data.batch_size", "data.samples"]
    assert [change["key"] for change in record_of(tmp_path)["changes"]] == expected
    assert f"changed since the last step: {', '.join(expected)}" in capsys.readouterr().out
    (run,) = tmp_path.iterdir()
    assert (run / "config.yaml").read_text().startswith("# settings of the last resume")


def test_sanity_check_is_not_recorded(tmp_path):
    record = running(tmp_path)
    sanity = at(0, 0, 50.0)
    sanity.sanity_checking = True
    validate(record, sanity)
    assert "best" not in read(tmp_path)


def test_other_processes_write_nothing(tmp_path):
    second = type("Second", (EndedTrainer,), {"is_global_zero": False})()
    record = running(tmp_path / "run", second)
    record.on_exception(second, Report(), RuntimeError("x"))
    assert not (tmp_path / "run").exists()


def test_fit_without_steps_leaves_the_record_unchanged(tmp_path):
    validate(running(tmp_path), at(0, 10, 50.0))
    before = (tmp_path / "record.json").read_bytes()
    record = RunRecord(tmp_path, {})
    record.setup(EndedTrainer(), Report(), "fit")
    with pytest.raises(UserError, match=r"nothing to train: the run is at epoch 0, step 6; pass"):
        record.on_fit_end(EndedTrainer(), Report())
    record.on_exception(EndedTrainer(), Report(), UserError("nothing to train"))
    assert (tmp_path / "record.json").read_bytes() == before


def test_run_killed_after_its_last_checkpoint_is_completed(tmp_path, monkeypatch):
    """It has no step left, but its record has no result yet."""
    more = ["--model.ema_decay", "0.5", "--trainer.default_root_dir"]
    run_fit([*RUN, *more, str(tmp_path / "a")])

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "on_fit_end", kill)
        with pytest.raises(KeyboardInterrupt):
            run_fit([*RUN, *more, str(tmp_path / "b")])
    killed = record_of(tmp_path / "b")
    assert killed["status"] == "interrupted" and killed.get("bytes") is None
    run_fit([*RUN, *more, str(tmp_path / "b"), "--ckpt_path", "last"])
    record, expected = record_of(tmp_path / "b"), record_of(tmp_path / "a")
    assert record["status"] == "finished" and record.get("reason") is None
    for key in ("steps", "epochs", "bytes", "widths"):
        assert record[key] == expected[key], key
    assert record["seconds"] >= killed["seconds"] and record["id"] == killed["id"]
    with pytest.raises(UserError, match="nothing is left to train"):
        run_fit([*RUN, *more, str(tmp_path / "b"), "--ckpt_path", "last"])


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"schema": 1}'])
def test_damaged_record_is_an_error_before_any_write(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(UserError) as caught:
        RunRecord(tmp_path, {}).setup(EndedTrainer(), Report(), "fit")
    assert str(tmp_path / "record.json") in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "record.json").read_text() == text


# -- the test block
# --------------------------------------------------------------------------------------------------
class Tested(EndedTrainer):
    """A Trainer after a test of `batches` of 4 batches."""

    def __init__(self, batches=4, split="test", acc=70.0):
        self.num_test_batches, self.test_dataloaders = [batches], [range(4)]
        self.callback_metrics = {"test/acc1_truncate_w2": acc, "test/images": 10.0 * batches}
        self.datamodule = type("Data", (), {"split_of": lambda _, stage: split})()


OWN = {"data": {"name": "cifar10", "root": "data", "image_size": None, "batch_size": 128}}


def test_block(path, trainer, checkpoint="best", precision=None, **data):
    config = {"trainer": {"precision": precision}, "data": {**OWN["data"], **data}}
    record = RunRecord(path, config, checkpoint)
    record.setup(trainer, Report(), "test")
    record.on_test_end(trainer, type("Module", (), {"loaded_epoch": 3})())
    return read(path)


test_block.__test__ = False


def test_full_test_on_the_data_of_the_run_sets_its_result(tmp_path):
    validate(running(tmp_path, **OWN), at(0, 10, 50.0))
    before = read(tmp_path)
    got = test_block(tmp_path, Tested(), batch_size=7)  # how images are read changes no result
    assert got["test"] == {
        "metrics": {"test/acc1_truncate_w2": 70.0},
        "checkpoint": "best",
        "epoch": 3,
        "images": 40,
        "data": {"name": "cifar10", "root": "data"},
        "split": "test",
    }
    assert {k: v for k, v in got.items() if k != "test"} == before
    assert test_block(tmp_path, Tested(acc=71.0))["test"]["metrics"] == {
        "test/acc1_truncate_w2": 71.0
    }


@pytest.mark.parametrize(
    ("trainer", "data", "why"),
    [
        (Tested(2), {}, "a part of the split"),
        (Tested(), {"name": "cifar100"}, "name"),
        (Tested(), {"root": "elsewhere"}, "root"),
        (Tested(), {"image_size": 64}, "image_size"),
        (Tested(), {"data_args": {"year": 2020}}, "data_args"),
        (Tested(), {"name": "synthetic", "samples": 64}, "name, samples"),
    ],
)
def test_other_test_is_recorded_separately(tmp_path, capsys, trainer, data, why):
    validate(running(tmp_path, **OWN), at(0, 10, 50.0))
    before = test_block(tmp_path, Tested())
    assert capsys.readouterr().out == ""
    got = test_block(tmp_path, trainer, **data)
    assert got["test"] == before["test"] and len(got["tests"]) == 1
    assert got["tests"][0]["data"]["name"] == data.get("name", "cifar10")
    assert got["tests"][0].get("batches") == (2 if why == "a part of the split" else None)
    assert f"not a test of the run's own data ({why})" in capsys.readouterr().out
    assert len(test_block(tmp_path, trainer, **data)["tests"]) == 2


def test_test_in_another_precision_is_recorded_separately(tmp_path, capsys):
    trainer = {"precision": "bf16", "plugins": None}
    validate(running(tmp_path, **OWN, trainer=trainer), at(0, 10, 50.0))
    for same in ("bf16", "bf16-mixed"):
        got = test_block(tmp_path, Tested(), precision=same)
        assert got["test"]["images"] == 40 and "tests" not in got
    for other in (None, "32-true", "16-mixed"):
        got = test_block(tmp_path, Tested(acc=60.0), precision=other)
        assert got["test"]["metrics"] == {"test/acc1_truncate_w2": 70.0}
        assert "not a test of the run's own settings (precision)" in capsys.readouterr().out
    assert [test["other_precision"] for test in got["tests"]] == ["32-true", "32-true", "16-mixed"]
    given = {"data": OWN["data"], "trainer": trainer | {"plugins": ["Other"]}}
    record = RunRecord(tmp_path, given, "best")
    record.setup(Tested(), Report(), "test")
    record.on_test_end(Tested(), type("Module", (), {"loaded_epoch": 3})())
    assert len(read(tmp_path)["tests"]) == 4
