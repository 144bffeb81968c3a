"""The command line: typed values reach their keys; an error is one line and status 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tq_lightning.callbacks.width_table import WidthTable
from tq_lightning.cli import LIGHTNING_VERBS, VERBS, main
from tq_lightning.errors import UserError

DIGITS = ["fit", "--config", str(Path(__file__).parents[2] / "conf" / "digits.yaml")]


def config_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*DIGITS, *arguments, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    assert main(list(arguments)) == status
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def run_verb(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tq_lightning", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=280
    )


@pytest.mark.slow
def test_matplotlib_backend_of_a_notebook_is_ignored() -> None:
    backend = "module://matplotlib_inline_that_is_not_installed.backend"
    done = run_verb("fit", "--help", MPLBACKEND=backend)
    assert (done.returncode, done.stderr) == (0, "") and "--model.quantizer" in done.stdout


@pytest.mark.slow
def test_closed_stdout_exits_without_traceback() -> None:
    command = f"{sys.executable} -m tq_lightning inspect --model.name resnet8_cifar"
    script = f"set -o pipefail; {command} | head -n 1; exit $?"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=280)
    assert done.stderr == "" and done.returncode in (0, 141)
    closed = subprocess.run(
        ["bash", "-c", f"{command} > >(exec 0<&-; exit 0); exit $?"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert closed.stderr == ""


def test_usage_shows_the_name_of_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m tq_lightning VERB")
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/tq-lightning", "--help"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("usage: tq-lightning VERB")
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert capsys.readouterr().out.startswith("usage: tq-lightning export")


def test_help_names_every_verb_and_loads_no_torch() -> None:
    code = (
        "import sys; from tq_lightning.cli import main; main(['--help']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in [*LIGHTNING_VERBS, *VERBS]:
        assert verb in done.stdout


@pytest.mark.parametrize(
    ("argument", "section", "key", "value"),
    [
        ("--model.widths=[8, 4]", "model", "widths", [8, 4]),
        ("--model.skip=['first', 'last']", "model", "skip", ["first", "last"]),
        ("--model.activations=None", "model", "activations", None),
        ("--model.activations=null", "model", "activations", None),
        ("--model.drop_rate=None", "model", "drop_rate", None),
        ("--model.lr='1e-3'", "model", "lr", 0.001),
        ("--model.lr=1e-3", "model", "lr", 0.001),
        ("--wandb=true", None, "wandb", True),
        ("--wandb", None, "wandb", True),
        ("--data.samples=None", "data", "samples", None),
    ],
)
def test_arguments_of_sweep_engines_are_parsed_with_their_types(
    capsys: pytest.CaptureFixture[str], argument: str, section: str | None, key: str, value: object
) -> None:
    config = config_of(capsys, argument)
    assert (config if section is None else config[section])[key] == value


def test_lists_as_text_equal_lists() -> None:
    from tq_lightning.training.lists import as_ints, as_list

    assert (
        as_ints("8,4,2,1", "k")
        == as_ints([8, 4, 2, 1], "k")
        == as_ints("[8, 4, 2, 1]", "k")
        == [8, 4, 2, 1]
    )
    assert as_ints(4, "k") == as_ints("4", "k") == [4]
    assert (
        as_list("first,last")
        == as_list("['first', 'last']")
        == as_list(["first", "last"])
        == ["first", "last"]
    )
    assert as_list("first") != as_list("first,last")


def test_later_config_files_override_earlier_ones(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "over.yaml").write_text("model: {lr: 1e-3, activations: null, quantizer: round}")
    model = config_of(capsys, "--config", str(tmp_path / "over.yaml"))["model"]
    assert (model["lr"], model["activations"], model["quantizer"]) == (0.001, None, "round")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fti"], "unknown verb 'fti'; pass one of fit"),
        (["swep"], "did you mean sweep?"),
        ([*DIGITS, "--model.quantiser", "floor"], "did you mean --model.quantizer"),
        ([*DIGITS, "--model.lr", "fast"], "error: model.lr: got 'fast', pass a number"),
        (
            [*DIGITS, "--trainer.max_epochs", "few"],
            "error: trainer.max_epochs: got 'few', pass an integer or null",
        ),
        (
            [*DIGITS, "--trainer.precision", "7"],
            "error: trainer.precision: got '7', pass 64, 32, 16 or 'transformer-engine'",
        ),
        # the parser repeats the value for each type that the key accepts
        (
            [*DIGITS, "--trainer.max_epochs", "true"],
            "error: trainer.max_epochs: got 'true', pass an integer or null",
        ),
        (
            [*DIGITS, "--data.samples", "1e400"],
            "error: data.samples: got '1e400', pass an integer or null",
        ),
        ([*DIGITS, "--model.lr="], "error: model.lr: got '', pass a number"),
        ([*DIGITS, "--model.num_classes="], "model.num_classes: got '', pass an integer or null"),
        ([*DIGITS, "--model.widths", "9"], "from 1 to max_bits=8, got [9]"),
        ([*DIGITS, "--model.widths", "a,b"], "got 'a,b', expected integers"),
        ([*DIGITS, "--model.teacher", "wide"], "pass one of none, widest"),
        ([*DIGITS, "--data.name", "digit"], "got 'digit', pass one of digits"),
        ([*DIGITS, "--trainer.devices", "two"], "devices"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml does not exist; pass a YAML file"),
        (["test", *DIGITS[1:]], "test needs a checkpoint: pass --ckpt_path"),
        (["predict", *DIGITS[1:]], "predict needs a checkpoint: pass --ckpt_path"),
    ],
)
def test_invalid_input_is_an_error_of_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in error_of(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "no\nsuch", "--out", "out"],
        ["export", "no\nsuch", "--out", "out"],
        ["inspect", "--config", "no\nsuch"],
        ["classify", "model", "no\nsuch"],
        ["sweep", "no\nsuch"],
        ["fit", "--config", "no\nsuch"],
    ],
)
def test_line_break_in_a_name_leaves_the_error_one_line(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "no\\nsuch" in err and err.count("\n") == 1


def test_error_with_an_unknown_type_name_is_unchanged() -> None:
    from tq_lightning.training.cli_messages import rewrite_parser_error

    text = (
        "Parser key \"a\": Expected a <class 'int'> Expected a Protocol of its own Given value: 7"
    )
    assert rewrite_parser_error(ValueError(text)) == text
    assert (
        rewrite_parser_error(ValueError(text.replace("Expected a Protocol of its own ", "")))
        == "a: got '7', pass an integer"
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.quantizer=flor", "unknown quantizer 'flor'; pass one of floor, round"),
        ("--model.name=resnet20_cifer", "did you mean resnet20_cifar"),
        ("--model.skip=first,lst", "skip pattern 'lst' matches no layer"),
        ("--model.checkpoint_path=nowhere.pth", "nowhere.pth"),
        (
            "--trainer.accumulate_grad_batches=0",
            "trainer.accumulate_grad_batches: got 0, pass 1 or more",
        ),
    ],
)
def test_error_after_parsing_leaves_no_run_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argument: str, message: str
) -> None:
    assert message in error_of(
        capsys, *DIGITS, argument, "--trainer.default_root_dir", str(tmp_path)
    )
    assert list(tmp_path.glob("*")) == []


def test_late_error_keeps_the_trained_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: object) -> None:
        raise UserError("too late")

    monkeypatch.setattr(WidthTable, "on_fit_end", late)
    short = [
        "--trainer.limit_train_batches",
        "1",
        "--trainer.limit_val_batches",
        "1",
        "--trainer.max_epochs",
        "1",
    ]
    assert "too late" in error_of(
        capsys, *DIGITS, *short, "--trainer.default_root_dir", str(tmp_path)
    )
    (run,) = tmp_path.iterdir()
    assert (run / "checkpoints" / "last.ckpt").is_file()


def test_invalid_config_file_is_an_error_of_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "broken.yaml").write_text("model: [1,\n  a: }")
    message = error_of(capsys, "fit", "--config", str(tmp_path / "broken.yaml"))
    assert f"{tmp_path / 'broken.yaml'}, line 2: not valid YAML" in message


def test_ckpt_path_last_without_a_run_is_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = error_of(
        capsys, *DIGITS, "--ckpt_path", "last", "--trainer.default_root_dir", str(tmp_path)
    )
    assert f"no */checkpoints/last.ckpt under {tmp_path}" in message
    monkeypatch.chdir(tmp_path)
    message = error_of(capsys, *DIGITS, "--ckpt_path", "last", "--trainer.default_root_dir", "null")
    assert "no */checkpoints/last.ckpt under runs;" in message


def test_invalid_checkpoint_is_an_error_of_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"no checkpoint")
    message = error_of(capsys, *DIGITS, "--ckpt_path", str(broken))
    assert (
        "is not a training checkpoint (not a file that torch.save wrote, or an incomplete one)"
        in message
    )


def test_root_dir_that_is_a_file_is_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    message = error_of(
        capsys, *DIGITS, "--trainer.default_root_dir", str(tmp_path / "file" / "runs")
    )
    assert f"cannot write below {tmp_path / 'file' / 'runs'}" in message
    assert f"{tmp_path / 'file'} is not a folder" in message


def test_test_and_resume_select_the_right_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import json

    short = ["--trainer.default_root_dir", str(tmp_path), "--trainer.limit_train_batches", "2"]
    short += ["--trainer.enable_model_summary", "false", "--trainer.check_val_every_n_epoch", "1"]
    for _ in range(2):
        assert main([*DIGITS, *short, "--trainer.max_epochs", "1"]) == 0
    runs = sorted(
        tmp_path.iterdir(), key=lambda run: (run / "checkpoints" / "last.ckpt").stat().st_mtime
    )
    assert len(runs) == 2, "the second run overwrote the first"
    for run in runs:
        assert {p.name for p in run.iterdir()} == {
            "checkpoints",
            "config.yaml",
            "layers.txt",
            "metrics.csv",
            "record.json",
        }
        assert {p.name for p in (run / "checkpoints").iterdir()} == {"best-0.ckpt", "last.ckpt"}
    untouched = (runs[0] / "record.json").read_text()

    assert main(["test", *DIGITS[1:], *short[:2], "--ckpt_path", "best"]) == 0
    record = json.loads((runs[1] / "record.json").read_text())
    assert record["status"] == "finished" and record["test"]["images"] == 360
    assert set(record["widths"]) == {str(bits) for bits in range(1, 9)}

    capsys.readouterr()
    assert main(["predict", *DIGITS[1:], *short[:2], "--ckpt_path", "best"]) == 0
    assert capsys.readouterr().err == ""
    rows = (runs[1] / "predictions.csv").read_text().splitlines()
    assert rows[0] == "sample,class,name,probability" and len(rows) == 361

    capsys.readouterr()
    more = [
        "--trainer.max_epochs",
        "2",
        "--ckpt_path",
        "last",
        "--model.lr",
        "0.5",
        "--model.widths",
        "8,4,2,1",
    ]
    assert main([*DIGITS, *short, *more]) == 0
    (message,) = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "keeps the settings of its checkpoint" in line
    ]
    assert message.endswith("checkpoint: model.lr=0.1, not 0.5")
    resumed = json.loads((runs[1] / "record.json").read_text())
    assert resumed["id"] == record["id"]
    assert [epoch for epoch, _ in resumed["curves"]["val/acc1_float"]] == [0, 1]
    assert resumed["curves"]["val/acc1_float"][0] == record["curves"]["val/acc1_float"][0]
    assert (runs[0] / "record.json").read_text() == untouched
    capsys.readouterr()
