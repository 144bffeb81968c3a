"""A signal ends a fit after its optimizer step; the same command resumes it bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.runs import assert_same_run, last, record, rows

from tq_lightning.callbacks.stop_on_signal import REPEAT_SECONDS, REQUEUE, STOP, SignalFlag
from tq_lightning.cli import main
from tq_lightning.errors import Interrupted

TESTS = Path(__file__).parents[1]
FIT = [
    *("fit", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"),
    *("--trainer.limit_train_batches", "6", "--trainer.limit_val_batches", "1"),
    *("--model.name", "test_resnet", "--model.widths", "8,2", "--model.calibration_batches", "1"),
    *("--model.drop_rate", "0.3", "--model.ema_decay", "0.5", "--model.opt", "adamw"),
    *("--data.name", "digits", "--data.image_size", "16", "--data.batch_size", "8"),
]  # fmt: skip


def fit(run: Path, *more: str) -> int:
    return main([*FIT, "--run_dir", str(run), "--ckpt_path", "auto", *more])


def send(name: str, epoch: int, batch: int | None) -> list[str]:
    where = [f"--trainer.callbacks.name={name}", f"--trainer.callbacks.epoch={epoch}"]
    at = [] if batch is None else [f"--trainer.callbacks.batch={batch}"]
    return ["--trainer.callbacks+=fixtures.signals.SendSignal", *where, *at]


def status(run: Path) -> str:
    return record(run)["status"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accumulate", "step"),
    [
        (2, 4),
        pytest.param(1, 8, marks=pytest.mark.slow),
        pytest.param(3, 3, marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_run_equals_an_uninterrupted_one(tmp_path, capsys, accumulate, step):
    more = ["--trainer.accumulate_grad_batches", str(accumulate)]
    assert fit(tmp_path / "whole", *more) == 0
    run = tmp_path / "stopped"
    handler = signal.getsignal(signal.SIGUSR1)
    assert fit(run, *more, *send("SIGTERM", 1, 1)) == 143
    assert "interrupted: stopped by SIGTERM" in capsys.readouterr().err
    assert status(run) == "interrupted" and last(run)["global_step"] == step
    assert signal.getsignal(signal.SIGUSR1) == handler
    assert fit(run, *more) == 0
    assert status(run) == "finished"
    assert_same_run(run, tmp_path / "whole")
    # the same command has nothing left to do
    before = (run / "record.json").read_bytes()
    assert fit(run, *more) == 0
    assert "is finished" in capsys.readouterr().err
    assert (run / "record.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "more"),
    [
        ((0, None), []),  # the validation of an epoch
        pytest.param((0, 5), [], marks=pytest.mark.slow),  # the last batch of an epoch
        # a batch followed by a validation
        pytest.param((0, 2), ["--trainer.val_check_interval", "3"], marks=pytest.mark.slow),
    ],
)
def test_signal_takes_effect_after_validation_and_epoch_end(tmp_path, where, more):
    uninterrupted, run = tmp_path / "whole", tmp_path / "stopped"
    assert fit(uninterrupted, *more) == 0
    assert fit(run, *more, *send("SIGUSR1", *where)) == 138
    assert status(run) == "interrupted"
    assert fit(run, *more) == 0
    assert_same_run(run, uninterrupted)


@pytest.mark.slow
def test_signal_in_the_last_validation_finishes_the_run(tmp_path):
    assert fit(tmp_path / "run", *send("SIGUSR1", 1, None)) == 0
    assert status(tmp_path / "run") == "finished"


def test_run_without_checkpoints_stops_too(tmp_path):
    more = ["--trainer.enable_checkpointing", "false"]
    assert fit(tmp_path / "run", *more, *send("SIGTERM", 0, 2)) == 143
    assert status(tmp_path / "run") == "interrupted"
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_signal_stops_an_evaluation_at_once(tmp_path, capsys):
    run = tmp_path / "run"
    assert fit(run) == 0
    verb = ["test", *FIT[1:], "--run_dir", str(run), "--ckpt_path", "last"]
    before = (run / "record.json").read_bytes()
    at = ["--trainer.callbacks+=fixtures.signals.SendSignal", "--trainer.callbacks.name=SIGTERM"]
    assert main([*verb, *at, "--trainer.callbacks.epoch=-1"]) == 143
    assert (run / "record.json").read_bytes() == before
    assert not (run / ".lock").exists()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_names_only_an_existing_checkpoint(tmp_path, capsys):
    """Without a checkpoint, `--ckpt_path last` would resume another run."""
    run = tmp_path / "a"
    assert fit(run, *send("SIGINT", 0, 1)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted: {run} has no checkpoint yet"
    assert fit(run, "--checkpoint_every_n_steps", "2", *send("SIGINT", 0, 3)) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(
        f"resume with the same command and --ckpt_path {run}/checkpoints/last.ckpt"
    )


def test_run_that_never_started_leaves_no_files(tmp_path):
    at = ["--trainer.callbacks+=fixtures.signals.SendSignal", "--trainer.callbacks.name=SIGTERM"]
    assert fit(tmp_path / "a" / "b", *at, "--trainer.callbacks.epoch=-1") == 143
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_resumed_fit_continues_its_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    assert fit(run, "--wandb", *send("SIGTERM", 1, 1)) == 143
    assert fit(run, "--wandb") == 0
    attempts = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(attempts) == 2
    assert len({name.rsplit("-", 1)[1] for name in attempts}) == 1
    logged = (run / "wandb" / "logged.txt").read_text().splitlines()
    assert len(logged) == len(set(logged)) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_resumed_inside_an_epoch_equal_an_uninterrupted_run(tmp_path):
    """One rank gets the signal, and the resumed epoch logs the training losses of both."""

    def fit_on_two(run: Path, *more: str) -> int:
        ranks = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
        auto = ["--run_dir", str(run), "--ckpt_path", "auto"]
        path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
        return subprocess.run(
            [sys.executable, "-m", "tq_lightning", *FIT, *ranks, *auto, *more],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            timeout=400,
        ).returncode

    assert fit_on_two(tmp_path / "whole") == 0
    run = tmp_path / "stopped"
    assert fit_on_two(run, *send("SIGTERM", 1, 2), "--trainer.callbacks.rank=1") == 143
    assert status(run) == "interrupted" and last(run)["global_step"] == 9
    assert fit_on_two(run) == 0
    assert_same_run(run, tmp_path / "whole")
    losses = [float(row["train/loss_w8"]) for row in rows(run) if row["epoch"]]
    assert len(set(losses)) == 2


def test_second_sigterm_stops_at_once(monkeypatch):
    """Unless it arrives right after the first, as from `timeout`, or follows SLURM's SIGUSR1."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with SignalFlag() as flag:
        flag.defer()
        signal.raise_signal(signal.SIGTERM)
        now[0] = REPEAT_SECONDS - 1
        signal.raise_signal(signal.SIGTERM)
        assert flag.request == STOP
        now[0] = REPEAT_SECONDS + 1
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
    with SignalFlag() as flag:
        flag.defer()
        signal.raise_signal(signal.SIGUSR1)
        now[0] += 2 * REPEAT_SECONDS
        signal.raise_signal(signal.SIGTERM)
        assert flag.request == REQUEUE
        now[0] += 2 * REPEAT_SECONDS
        with pytest.raises(Interrupted) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.requeue
