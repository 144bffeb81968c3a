"""The verbs fit, test, validate and predict: the run that they belong to, and their errors."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tq_lightning.callbacks.resume import StepCheckpoint
from tq_lightning.cli import main, run_fit
from tq_lightning.errors import UserError
from tq_lightning.training.run_messages import next_command, start_line
from tq_lightning.training.trainer_validation import _is_share

SMALL = [
    *("--model.name", "resnet8_cifar", "--model.calibration_batches", "1"),
    *("--data.name", "digits", "--data.batch_size", "16", "--data.eval_batch_size", "64"),
    *("--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "4"),
    *("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"),
    *("--trainer.limit_predict_batches", "1", "--trainer.log_every_n_steps", "2"),
]


def small(root, *more):
    return [*SMALL, "--trainer.default_root_dir", str(root), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return (root, run folder, deleted start weights) of one epoch with step checkpoints."""
    root = tmp_path_factory.mktemp("root")
    weights = root.parent / "start.pth"
    from tq_lightning.models import create_model

    torch.save(create_model("resnet8_cifar", num_classes=10).state_dict(), weights)
    plain = StepCheckpoint.on_train_batch_end

    def keep_copy(self, trainer, *args):
        plain(self, trainer, *args)
        last = Path(self.dirpath) / "last.ckpt"
        if last.is_file() and trainer.global_step == 2:
            shutil.copy(last, last.with_name("inside.ckpt"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepCheckpoint, "on_train_batch_end", keep_copy)
        metrics = run_fit(
            small(root, "--trainer.max_epochs", "1", "--checkpoint_every_n_steps", "2")
            + ["--model.checkpoint_path", str(weights)]
        )
    weights.unlink()
    return root, Path(metrics["run_dir"])


@pytest.fixture
def copied(finished, tmp_path):
    """Return (root, run folder) of a copy of the finished run."""
    root = tmp_path / "runs"
    shutil.copytree(finished[0], root)
    return root, root / finished[1].name


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_fit_prints_the_run_folder_and_the_next_commands(tmp_path, capsys):
    metrics = run_fit(small(tmp_path, "--trainer.max_epochs", "1"))
    run, lines = metrics["run_dir"], capsys.readouterr().out.splitlines()
    assert lines[0] == f"run folder: {run}"
    assert "quantized: 6 of 8 layers" in lines[1] and "in float: conv1, fc" in lines[1]
    assert lines[1].endswith(f"see {run}/layers.txt")
    assert "layer3.0.conv2" in (Path(run) / "layers.txt").read_text()
    assert [line.split(", loss")[0] for line in lines if ", step " in line] == [
        "epoch 0, step 2/4",
        "epoch 0, step 4/4",
    ]
    assert lines[-2].startswith("best epoch 0: top-1 ") and "at 8/4/2/1 bits" in lines[-2]
    assert f"test --config {run}/config.yaml --ckpt_path {run}/checkpoints/best-0.ckpt" in lines[-1]
    assert not any("Warning" in line for line in lines)


def test_resuming_a_finished_run_is_an_error(copied):
    root, _ = copied
    before = contents(root)
    for end in ("--trainer.max_epochs=1", "--trainer.max_steps=3"):
        with pytest.raises(UserError, match=r"nothing is left to train; pass a larger --trainer"):
            run_fit(small(root, end, "--ckpt_path", "last"))
    assert contents(root) == before


def test_checkpoint_outside_a_run_folder_starts_a_new_run(copied, tmp_path, capsys):
    root, run = copied
    elsewhere = tmp_path / "a" / "b" / "model.ckpt"
    elsewhere.parent.mkdir(parents=True)
    shutil.copy(run / "checkpoints" / "last.ckpt", elsewhere)
    before = contents(root)
    more = ["--trainer.max_epochs", "2", "--ckpt_path", str(elsewhere)]
    metrics = run_fit(small(root, *more))
    assert Path(metrics["run_dir"]).parent == root and Path(metrics["run_dir"]) != run
    assert {p: v for p, v in contents(root).items() if p in before} == before
    assert [p.name for p in (tmp_path / "a").rglob("*")] == ["b", "model.ckpt"]
    runs = sorted(root.iterdir())
    assert main(["test", *small(root, "--ckpt_path", str(elsewhere))]) == 0
    assert sorted(root.iterdir()) == runs and len(list((tmp_path / "a").rglob("*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed_everything", "5"], "seed 5, not 0"),
        (["--data.batch_size", "8"], "batch 8, not 16"),
        (["--data.samples", "500"], "samples 500, not 1293"),
        (["--data.name", "synthetic", "--data.image_size", "8"], "data synthetic, not digits"),
    ],
)
def test_resuming_inside_an_epoch_needs_the_same_batches(copied, change, message):
    root, run = copied
    before = contents(root)
    inside = ["--trainer.max_epochs", "2", "--ckpt_path", str(run / "checkpoints" / "inside.ckpt")]
    with pytest.raises(UserError, match="written inside an epoch") as error:
        run_fit(small(root, *inside, *change))
    assert message in str(error.value)
    assert contents(root) == before
    if "--seed_everything" in change:
        run_fit(small(root, *inside))  # the same batches
        run_fit(small(root, "--trainer.max_epochs", "3", "--ckpt_path", "last", *change))


def test_saved_configuration_starts_a_new_run(copied):
    root, run = copied
    run_fit(small(root, "--trainer.max_epochs", "2", "--ckpt_path", "last"))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved.get("ckpt_path") is None and saved["trainer"]["max_epochs"] == 2
    more = ["--seed_everything", "5", "--trainer.default_root_dir", str(root)]
    more += ["--model.checkpoint_path", "null"]
    metrics = run_fit(["--config", str(run / "config.yaml"), *more])
    assert Path(metrics["run_dir"]) != run
    assert yaml.safe_load((Path(metrics["run_dir"]) / "config.yaml").read_text())[
        "seed_everything"
    ] == 5  # fmt: skip


def test_resumed_run_keeps_its_seed(copied, capsys):
    """Record and configuration keep the seed that the weights come from."""
    root, run = copied
    more = ["--trainer.max_epochs", "2", "--ckpt_path", "last", "--seed_everything", "5"]
    run_fit(small(root, *more))
    assert "the run keeps its seed: seed_everything=0, not 5" in capsys.readouterr().err
    record = json.loads((run / "record.json").read_text())
    assert record["epochs"] == 2 and record["seed"] == record["config"]["seed_everything"] == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data.name", "synthetic"], "data.name: got synthetic, but {} was trained with digits"),
        (["--data.val_fraction", "0.2"], "data.val_fraction: got 0.2, but {} was trained with 0.1"),
    ],
)
def test_run_is_not_resumed_on_other_data(copied, change, message):
    """Its record would have one data set, and a best epoch on the other one."""
    root, run = copied
    before = contents(root)
    more = ["--trainer.max_epochs", "2", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    with pytest.raises(UserError) as error:
        run_fit(small(root, *more, *change))
    assert str(error.value).startswith(message.format(run)) and contents(root) == before
    new = ["--run_dir", str(root / "new"), "--data.image_size", "8"]
    run_fit(small(root, *more, *change, *new))
    assert json.loads((run / "record.json").read_bytes())["epochs"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed_everything", "5"], "seed_everything=0, not 5"),
        (["--model.quantizer", "round"], "model.quantizer=floor, not round"),
        (["--data.name", "synthetic", "--data.image_size", "8"], "data.name=digits, not synthetic"),
    ],
)
def test_last_resumes_another_run_only_if_it_is_alike(copied, change, message):
    """The run that was meant may have no checkpoint yet."""
    root, run = copied
    killed = root / "killed"
    killed.mkdir()
    shutil.copy(run / "config.yaml", killed)
    before = contents(root)
    more = ["--trainer.max_epochs", "2", "--ckpt_path", "last", *change]
    with pytest.raises(UserError, match="the newest of several runs") as error:
        run_fit(small(root, *more))
    assert message in str(error.value)
    assert f"--ckpt_path {run / 'checkpoints' / 'last.ckpt'}" in str(error.value)
    assert contents(root) == before


@pytest.mark.slow
def test_initial_weights_are_needed_only_at_the_start(copied, capsys):
    root, run = copied
    config = ["--config", str(run / "config.yaml"), "--trainer.default_root_dir", str(root)]
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["checkpoint_path"]
    left = run / ".record.json.0a1b2c3d.tmp"  # of a killed command
    left.touch()
    for verb in ("test", "validate", "predict"):
        assert main([verb, *config, "--ckpt_path", "best"]) == 0, capsys.readouterr().err
    assert not left.exists()
    capsys.readouterr()
    assert main(["fit", *config, "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    assert main(["fit", *config]) == 2
    assert "start.pth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the training needs an end: pass --trainer.max_epochs, --trainer.max_steps or"),
        (["--trainer.max_epochs", "0"], "trainer.max_epochs: got 0, pass 1 or more"),
        (["--seed_everything", "false"], "seed_everything: got False, pass an integer from 0"),
        (["--seed_everything", "-5"], "seed_everything: got -5, pass an integer from 0"),
        (["--checkpoint_every_n_steps", "-3"], "checkpoint_every_n_steps: got -3, pass 1 or more"),
        (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches=0 leaves nothing to"),
        (["--trainer.limit_train_batches", "0.001"], "limit_train_batches=0.001 of 80 batches is"),
        (["--trainer.limit_val_batches", "0"], "limit_val_batches=0 leaves the run without a res"),
        (["--model.name", "resnet8_cifra"], "model.name: unknown model 'resnet8_cifra'; did you"),
        (["--model.teacher_name", "resnet8"], "model.teacher_name: unknown model 'resnet8'"),
        (
            ["--model.teacher_name", "resnet8_cifar", "--model.teacher_checkpoint_path", "no.pth"],
            "model.teacher_checkpoint_path: no.pth does not exist",
        ),
        (["--model.checkpoint_path", "no.pth"], "model.checkpoint_path: no checkpoint at no.pth"),
        (["--model.lr", "null"], "model.lr: got null, pass a number"),
        (["--trainer.detect_anomaly", "None"], "trainer.detect_anomaly: got null, pass true or"),
        (["--trainer.fast_dev_run", "-1"], "trainer.fast_dev_run: got -1, pass true, false, or"),
        (["--trainer.gradient_clip_algorithm", "max"], "gradient_clip_algorithm: got max, pass no"),
        (["--trainer.gradient_clip_algorithm", "norm"], "got norm, but no gradient is clipped"),
        (
            ["--trainer.enable_checkpointing", "false", "--checkpoint_every_n_steps", "9"],
            "checkpoint_every_n_steps: got 9, but trainer.enable_checkpointing is false",
        ),
        (["--data.num_classes", "1"], "data.num_classes=1 is out of range; pass 2 to 1000000000"),
        (["--trainer.profiler", "fast"], "trainer.profiler: got fast, pass simple, advanced, "),
        (["--trainer.reload_dataloaders_every_n_epochs", "-1"], "every_n_epochs: got -1, pass 0"),
        (["--trainer.devices", "1025"], "trainer.devices: got 1025, pass a number from 1 to 1024"),
        (["--data.auto_augment", "nonsense"], "data.auto_augment='nonsense' is not a policy"),
        (["--data.std", "[0, 0, 0]"], "data.std: got [0.0, 0.0, 0.0], pass numbers above 0"),
        (["--run_dir", ""], "run_dir: got an empty path"),
        (["--trainer.default_root_dir", ""], "trainer.default_root_dir: got an empty path"),
        (["--model", "null"], "model: got 'null', pass {key: value}, or a YAML file with keys"),
        (["--model.max_bits", "9"], "model.max_bits: max_bits must be an integer from 1 to 8"),
        (["--data.mean", "[a, b, c]"], "data.mean: pass 3 numbers, e.g. [0.5, 0.5, 0.5], or null"),
        (["--trainer.callbacks", "nonsense"], "trainer.callbacks: got 'nonsense', pass the import"),
        (
            ["--trainer.callbacks", "lightning.pytorch.callbacks.EarlyStopping"],
            "trainer.callbacks: EarlyStopping needs monitor; pass --trainer.callbacks.monitor V",
        ),
        (
            ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitr", "val/loss"],
            "trainer.callbacks: EarlyStopping has no argument monitr; omit it",
        ),
        (["--trainer.callbacks", "BatchSizeFinder"], "BatchSizeFinder changes the batch size, but"),
        (["--trainer.callbacks", "LearningRateFinder"], "LearningRateFinder changes the learning"),
        (
            ["--trainer.precision", "16-mixed", "--trainer.accelerator", "cpu"],
            "trainer.precision: got 16-mixed, which this device does not support; pass bf16-mixed",
        ),
        (["--data.image_size", "100000"], "data.image_size=100000 is out of range; pass 1 to 8192"),
        (["--trainer.precision", "bf16-true"], "trainer.precision: bf16-true converts the weights"),
        (["--trainer.precision", "64-true"], "trainer.precision: 64-true converts the weights"),
        (
            ["--trainer.val_check_interval", "0"],
            "trainer.val_check_interval: got 0, pass a fraction",
        ),
        (["--trainer.val_check_interval", "9"], "got 9, but an epoch has 4 batches; pass at most"),
        (["--trainer.val_check_interval", "0.1"], "got 0.1, which is less than one of 4 batches"),
        (["--trainer.check_val_every_n_epoch", "0"], "check_val_every_n_epoch: got 0, pass 1 or"),
        (["--trainer.log_every_n_steps", "-1"], "trainer.log_every_n_steps: got -1, pass 1 or"),
        (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val: got -1, pass a number"),
        (["--trainer.num_sanity_val_steps", "-5"], "num_sanity_val_steps: got -5, pass 0 or more"),
        (["--trainer.max_time", "00:00:00:00"], "trainer.max_time: got 00:00:00:00, pass days"),
        (["--trainer.min_epochs", "5"], "trainer.min_epochs: got 5, but trainer.max_epochs is 2"),
        (["--trainer.barebones", "true"], "trainer.barebones: got True, pass false"),
        (["--data.mixup", "0.2", "--data.batch_size", "15"], "data.batch_size=15 is odd"),
        (
            ["--data.smoothing", "0.1", "--model.num_classes", "20"],
            "make targets of the data's 10 classes",
        ),
        (["--data.num_classes", "4"], "data.num_classes=4, but digits at"),
        (["--data.batch_size", "5000"], "data.batch_size=5000 is too large: 1293 training samples"),
        (["--model.num_classes", "4"], "model.num_classes: got 4, but the data has 10 classes"),
        (["--model.model_args", "{in_chans: 1}"], "got in_chans=1, but the images have 3 channels"),
        (["--model.model_args", "{1: 2}"], "model.model_args: got {1: 2}, pass a mapping of names"),
        (
            ["--data.name", "os:getcwd", "--data.data_args", "{1: 2}"],
            "data.data_args: got {1: 2}, pass a mapping of names",
        ),
        (["--model.warmup_epochs", "4"], "model.warmup_epochs: got 4, but trainer.max_epochs is 2"),
        (["--trainer.accelerator", "gpu"], "trainer.accelerator: got 'gpu', but PyTorch finds no"),
        (["--trainer.accelerator", "gpu7"], "trainer.accelerator: got 'gpu7', pass one of auto"),
        (["--trainer.strategy", "dpp"], "trainer.strategy: got 'dpp', pass one of auto, ddp"),
        (["--trainer.devices", "0"], "trainer.devices: got 0, pass a number from 1"),
        (["--trainer.devices", "many"], "trainer.devices: got many, pass a number from 1"),
        (["--trainer.num_nodes", "0"], "trainer.num_nodes: got 0, pass 1 or more"),
        (["--trainer.default_root_dir", "/proc/no/such"], "/proc"),
        (["--trainer.default_root_dir", "/dev/null/x"], "/dev/null"),
        (["--trainer.accelerator", "tpu"], "trainer.accelerator: this accelerator is not avai"),
        (["--trainer.num_nodes", "9" * 20], f"num_nodes: got {'9' * 20}, pass 1 or more, up to 21"),
        (["--trainer.devices", "9" * 20], f"trainer.devices: got {'9' * 20}, pass a number"),
        (["--trainer.accumulate_grad_batches", "9" * 20], "accumulate_grad_batches: got 99999"),
        (["--trainer.max_time", "{hour: 1}"], "trainer.max_time: got {'hour': 1}, pass days:hours"),
        (["--trainer.val_check_interval", "{}"], "trainer.val_check_interval: got {}, pass a frac"),
        (["--trainer.val_check_interval", "nan"], "val_check_interval: got nan, pass a fraction"),
        (["--trainer.max_time", "soon"], "trainer.max_time: got soon, pass days:hours:minutes:sec"),
        (
            ["--trainer.limit_val_batches", "1.5"],
            "trainer.limit_val_batches: got 1.5, pass a fr",
        ),
        (["--trainer.val_check_interval", "1.5"], "trainer.val_check_interval: got 1.5, pass a fr"),
        (["--data.root", "null"], "data.root: got null, expected text"),
        (["--data.name", "imagefolder", "--data.root", "no/such"], "no data at"),
        (["--data.crop_pct", "0.5"], "data.crop_pct=0.5 has no effect on the data of data.name"),
        (["--model.quantizer", "flor"], "model.quantizer: unknown quantizer 'flor'; pass one of"),
        (["--model.level", "centr"], "model.level: unknown level 'centr'; pass one of"),
        (["--model.ste", "scald"], "model.ste: unknown ste 'scald'"),
        (["--model.widths", "8,4,[2"], "model.widths: got '8,4,[2', expected"),
        (["--model.teacher", "wides"], "model.teacher: got 'wides', pass one of none, widest"),
    ],
)
def test_invalid_values_are_errors_before_a_model_is_built(
    tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr("timm.create_model", None)
    if torch.cuda.is_available() and "gpu" in arguments:
        pytest.skip("this machine has a GPU")
    end = (
        []
        if not arguments or "--trainer.max_epochs" in arguments
        else ["--trainer.max_epochs", "2"]
    )
    assert main(["fit", *small(tmp_path / "runs", *end, *arguments)]) == 2
    printed = capsys.readouterr()
    (line,) = [x for x in printed.err.splitlines() if x.startswith("error: ")]
    assert message in line
    assert list(tmp_path.iterdir()) == [] and "run folder" not in printed.out


@pytest.mark.parametrize(
    ("value", "accepted"),
    [(0, True), (0.5, True), (1, True), (20.0, True), (1.5, False), (-1, False), (-0.5, False)],
)
def test_batch_limit_is_a_fraction_or_a_number_of_batches(value, accepted):
    """Sweep engines send the number 20 as 20.0."""
    assert _is_share(value) == accepted


def test_empty_section_is_an_error_of_one_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("trainer: {max_epochs: 1}\nmodel:\n#  name: resnet18\n")
    assert main(["fit", "--config", str(tmp_path / "c.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: model: the section is empty; add keys to it, or remove it"


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint"])
def test_callback_on_a_metric_that_is_not_logged_is_an_error_of_one_line(tmp_path, capsys, name):
    given = ["--trainer.callbacks", name, "--trainer.callbacks.monitor", "val/acc1_truncate_w9"]
    assert main(["fit", *small(tmp_path, "--trainer.max_epochs", "1", *given)]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    message = "error: trainer.callbacks: the metric 'val/acc1_truncate_w9' is not logged; did you"
    assert line.startswith(message) and "val/acc1_truncate_w8" in line


def test_callback_with_the_state_of_one_of_ours_is_an_error_of_one_line(tmp_path, capsys):
    """Lightning raised RuntimeError for a ModelCheckpoint with its default arguments."""
    given = ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
    assert main(["fit", *small(tmp_path, "--trainer.max_epochs", "1", *given)]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    message = "error: trainer.callbacks: two of type ModelCheckpoint have the same monitor and"
    assert line.startswith(message) and "pass another monitor, e.g. val/loss" in line


def test_seed_true_is_a_number_that_auto_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    more = ["--run_dir", str(tmp_path / "run"), "--ckpt_path", "auto", "--seed_everything", "true"]
    arguments = small(tmp_path, "--trainer.max_epochs", "1", *more)
    assert json.loads(Path(run_fit(arguments)["record"]).read_text())["seed"] == 7
    assert main(["fit", *arguments]) == 0
    assert f"{tmp_path / 'run'} is finished" in capsys.readouterr().err


def test_seed_true_is_not_that_of_an_earlier_fit_of_the_process(tmp_path, monkeypatch):
    """As in a sweep, whose workers run one trial after another."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    once = small(tmp_path, "--trainer.max_epochs", "1")
    runs = [run_fit([*once, "--seed_everything", seed]) for seed in ("3", "true")]
    assert [json.loads(Path(r["record"]).read_text())["seed"] for r in runs] == [3, 0]
    assert "PL_GLOBAL_SEED" not in os.environ


@pytest.mark.parametrize("flag", ["--wandb", "--tensorboard"])
@pytest.mark.parametrize("logger", ["false", "CSVLogger"])
def test_logger_flag_beside_own_loggers_is_an_error(tmp_path, capsys, flag, logger):
    """The flag had no effect: nothing was logged to W&B."""
    more = ["--trainer.max_epochs", "1", flag, "--trainer.logger", logger]
    more += ["--trainer.logger.save_dir", str(tmp_path)] if logger != "false" else []
    assert main(["fit", *small(tmp_path, *more)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {flag[2:]}: got true, but trainer.logger replaces the loggers")
    assert list(tmp_path.iterdir()) == []


def test_next_command_names_the_newest_best_checkpoint(tmp_path):
    """A kill between two writes leaves both best-9 and best-10, which text sorts before 9."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for seconds, name in enumerate(["best-9.ckpt", "best-10.ckpt"], 1):
        (folder / name).touch()
        os.utime(folder / name, (seconds, seconds))
    assert next_command("fit", tmp_path).endswith(f"--ckpt_path {folder / 'best-10.ckpt'}")


def test_start_line_names_only_a_folder_that_the_verb_writes(copied):
    run, checkpoint = copied[1], Path("some/last.ckpt")
    name = f"run folder: {run}"
    assert start_line("fit", run, None, None) == name
    assert start_line("test", run, checkpoint, 3) == f"{name} (test last.ckpt, step 3)"
    for verb in ("test", "validate"):
        assert start_line(verb, Path("new"), checkpoint, 3) == f"{verb} some/last.ckpt, step 3"


def test_warm_up_may_be_as_long_as_the_training(tmp_path):
    run_fit(small(tmp_path, "--trainer.max_epochs", "1", "--model.warmup_epochs", "1"))


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("trainer: {default_root_dir: '~/runs', max_epochs: 1}\n")
    metrics = run_fit([*SMALL, "--config", "~/c.yaml"])
    assert Path(metrics["run_dir"]).parent == tmp_path / "runs"
    assert not (tmp_path / "~").exists()
    assert main(["test", *SMALL, "--config", "c.yaml", "--ckpt_path", "last"]) == 0


BREAKS = {
    "weights of other shapes": lambda c: c["state_dict"].update(
        {"model.fc.weight": torch.zeros(3, 3)}
    ),
    "no optimizer": lambda c: c.pop("optimizer_states"),
    "another optimizer": lambda c: c.update(optimizer_states=[{"state": {}, "param_groups": []}]),
    "no loops": lambda c: c.pop("loops"),
    "no weights": lambda c: c.update(state_dict={}),
    "weights that are text": lambda c: c.update(state_dict="text"),
    "callbacks that are a list": lambda c: c.update(callbacks=[1]),
    "no hyperparameters": lambda c: c.pop("hyper_parameters"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_checkpoint_with_invalid_parts_is_an_error_of_one_line(copied, capsys, broken):
    root, run = copied
    path = run / "checkpoints" / "broken.ckpt"
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    BREAKS[broken](checkpoint)
    torch.save(checkpoint, path)
    before = contents(root)
    more = ["--trainer.max_epochs", "2", "--ckpt_path", str(path)]
    assert main(["fit", *small(root, *more)]) == 2
    err = capsys.readouterr().err
    (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
    assert "broken.ckpt" in line and "Traceback" not in err
    assert contents(root) == before


def test_checkpoint_with_code_is_rejected_without_the_advice_of_torch(tmp_path, capsys):
    torch.save({"state_dict": {}, "hyper_parameters": {"x": Path("x")}}, tmp_path / "code.ckpt")
    more = ["--trainer.max_epochs", "2", "--ckpt_path", str(tmp_path / "code.ckpt")]
    assert main(["fit", *small(tmp_path, *more)]) == 2
    err = capsys.readouterr().err
    assert "it contains objects that could run code" in err
    assert "weights_only" not in err and "trust" not in err
