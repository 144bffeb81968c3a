"""Sweeps of real fits on two batches of digits: directories, records, pruning, DDP."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from optuna.trial import TrialState
from worker_pool_helpers import study_of, wait_for

from tq_lightning.cli import main
from tq_lightning.sweep.study import FIT
from tq_lightning.sweep.trial import run_trial

HERE = Path(__file__).parent
TINY = [
    "--config",
    str(HERE.parents[1] / "conf" / "digits.yaml"),
    "--trainer.max_epochs=2",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--model.calibration_batches=1",
    "--trainer.accelerator=cpu",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trials_are_fits_with_their_own_records_and_reported_epochs(write_sweep, tmp_path):
    parameters = {
        "seed_everything": {"values": [3, 4]},
        "model.widths": {"values": [[8, 2]]},
        "model.activations": {"value": None},
    }
    early = {"type": "hyperband", "min_iter": 1}
    path, folder = (
        write_sweep(parameters=parameters, early_terminate=early, arguments=TINY),
        tmp_path / "out",
    )
    assert main(["sweep", str(path), "--dir", str(folder), "--workers", "0"]) == 0
    trials = study_of(folder).trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 2 or TrialState.PRUNED in [
        t.state for t in trials
    ]
    records = [json.loads(Path(t.user_attrs["record"]).read_text()) for t in trials]
    assert [record["seed"] for record in records] == [3, 4] and records[0]["id"] != records[1]["id"]
    for trial, record in zip(trials, records, strict=True):
        run_dir = Path(trial.user_attrs["record"]).parent
        assert record["status"] == "finished" and record["config"]["model"]["widths"] == [8, 2]
        assert (run_dir / "config.yaml").is_file() and run_dir.parent == Path(
            trial.user_attrs["run_dir"]
        )
        curve = dict(record["curves"]["val/acc1_truncate_mean"])
        assert trial.intermediate_values == {
            epoch + 1: pytest.approx(value, abs=1e-4) for epoch, value in curve.items()
        }
        assert trial.value == pytest.approx(
            record["last"]["metrics"]["val/acc1_truncate_mean"], abs=1e-4
        )
    assert (folder / "plots" / "slice.png").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pruned_trial_ends_early_and_writes_its_record(tmp_path):
    from tq_lightning.cli import run_fit

    result = run_trial(
        run_fit,
        [*TINY, "--trainer.max_epochs=4"],
        tmp_path,
        ["val/acc1_truncate_mean"],
        lambda step, value: step == 2,
    )
    record = json.loads(Path(result.record).read_text())
    assert (
        result.state == "pruned" and record["status"] == "finished" and record["last"]["epoch"] == 1
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_failing_trial_has_the_error_message_of_fit(tmp_path):
    from tq_lightning.cli import run_fit

    result = run_trial(
        run_fit, [*TINY, "--model.lr=1e12"], tmp_path, ["val/acc1_truncate_mean"], None
    )
    assert result.state == "failed" and "learning rate" in result.reason


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_trial_resumes_from_its_last_checkpoint(
    write_sweep, tmp_path, sweep_process, processes
):
    """After SIGKILL, the retry trains the remaining epochs in a copy with one CSV."""
    arguments = [*TINY, "--trainer.max_epochs=3", "--model.widths=[8,2]"]
    if processes > 1:
        arguments += ["--trainer.strategy=ddp", f"--trainer.devices={processes}"]
    early = {"type": "hyperband", "min_iter": 1}
    path = write_sweep(
        arguments=arguments, early_terminate=early, parameters={"model.lr": {"values": [0.01]}}
    )
    folder = tmp_path / "out"
    process = sweep_process(path, "--dir", folder, "--workers", "1", fit=FIT)

    def first_epoch_is_over() -> bool:  # the checkpoint is written shortly before the row
        rows = [path.read_text().count("\n") for path in folder.glob("trials/*/*/metrics.csv")]
        return (
            bool(list(folder.glob("trials/*/*/checkpoints/last.ckpt"))) and max(rows, default=0) > 2
        )

    wait_for(lambda: first_epoch_is_over() or process.poll() is not None, 600)
    log = next(iter((folder / "logs").iterdir()), None)
    pids = [
        int(entry)
        for entry in os.listdir("/proc")
        if entry.isdigit() and is_worker(entry, log.stem)
    ]
    assert len(pids) == 1, process.poll()
    os.kill(pids[0], signal.SIGKILL)
    out, _ = process.communicate(timeout=800)
    assert process.returncode == 0, out
    first, second = study_of(folder).trials
    assert first.user_attrs["cause"] == "lost" and second.state == TrialState.COMPLETE, out
    record = json.loads(Path(second.user_attrs["record"]).read_text())
    run_dir = Path(second.user_attrs["record"]).parent
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [int(row["epoch"]) for row in csv.DictReader(file) if row["val/acc1_truncate_mean"]]
    assert (
        rows == [0, 1, 2]
        and record["epochs"] == 3
        and record["last"]["epoch"] == 2
        and record["processes"] == processes
    )
    steps = 2 * len(rows)  # two batches an epoch
    begun = second.user_attrs["resumed_step"]
    assert 2 <= begun < steps == record["steps"] and f"--ckpt_path={run_dir}" in record["command"]
    (earlier,) = Path(first.user_attrs["run_dir"]).iterdir()
    kept = {key: value for key, value in validation_scores(earlier).items() if key < begun}
    assert kept and kept == {
        key: value for key, value in validation_scores(run_dir).items() if key < begun
    }
    assert list(second.intermediate_values) == [1, 2, 3]  # the pruner has the whole curve
    assert second.intermediate_values[1] == first.intermediate_values[1]
    assert len(list((run_dir / "checkpoints").glob("best*"))) == 1
    status = json.loads((earlier / "record.json").read_text())["status"]
    assert status == "running" and earlier.name == run_dir.name and earlier != run_dir


def is_worker(pid, name):
    """Return True if a process is the sweep worker of this name, not another rank of its fit."""
    try:
        words = Path("/proc", pid, "cmdline").read_text().split("\0")
    except OSError:
        return False
    return "tq_lightning.sweep.worker" in words and name in words[-2]


def validation_scores(run):
    """Return step -> val/acc1_truncate_mean from metrics.csv of a run."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/acc1_truncate_mean"]]
    return {int(row["step"]): float(row["val/acc1_truncate_mean"]) for row in rows}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pruning_under_ddp_stops_every_process(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pruned_under_ddp",
            str(tmp_path),
            *TINY,
            "--trainer.strategy=ddp",
            "--trainer.devices=2",
        ],
        env=os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0 and "pruned after [1]: " in done.stdout, done.stdout + done.stderr
    record = json.loads(Path(done.stdout.split("pruned after [1]: ")[1].split()[0]).read_text())
    assert record["processes"] == 2 and record["last"]["epoch"] == 0
