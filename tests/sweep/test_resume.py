"""A retry resumes from the last checkpoint of the earlier attempt, in a new folder."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial
from stand_in import CHECKPOINT
from worker_pool_helpers import ran, study_of, wait_for

from tq_lightning.cli import main
from tq_lightning.records import Evaluation, Record, write_record
from tq_lightning.report.inputs import find
from tq_lightning.report.runs import read
from tq_lightning.sweep.config import read_sweep
from tq_lightning.sweep.resume import attempt_folder, copy_earlier_run
from tq_lightning.sweep.trial_queue import MAX_LOST, TrialQueue
from tq_lightning.sweep.worker import Worker


def attempt(number, run_dir=None, **attrs):
    attrs |= {"point": 3, "attempt": number} | ({"retry_of": number - 1} if number else {})
    state = TrialState.FAIL if run_dir is not None else TrialState.WAITING
    return create_trial(
        state=state, user_attrs=attrs | ({"run_dir": str(run_dir)} if run_dir else {})
    )


def killed_run(attempt_dir, name, step, when):
    """Create the folder of a killed fit. Step None: no checkpoint; a string: a truncated one."""
    (attempt_dir / name / "checkpoints").mkdir(parents=True)
    (attempt_dir / name / "wandb").mkdir()
    (attempt_dir / name / "metrics.csv").write_text(f"{step}\n")
    path = attempt_dir / name / "checkpoints" / "last.ckpt"
    if isinstance(step, str):
        path.write_bytes(b"PK half")
    elif step is not None:
        torch.save({**CHECKPOINT, "global_step": step}, path)
    if step is not None:
        os.utime(path, (when, when))


def test_attempt_without_earlier_files_starts_a_new_run(tmp_path):
    study = optuna.create_study()
    study.add_trials([attempt(0, "/elsewhere/trials/0003-abcdef"), attempt(1)])
    first, retry = study.trials
    assert (
        copy_earlier_run(study, first, tmp_path / "0003-x") is None
        and copy_earlier_run(study, retry, tmp_path / "0003-y") is None
    )
    assert not list(tmp_path.iterdir())


def test_newest_intact_checkpoint_of_the_latest_attempt_is_copied(tmp_path, capsys):
    study, trials = optuna.create_study(), tmp_path / "trials"
    attempts = [trials / f"0003-{name}" for name in ("a", "b", "c")]
    for attempt_dir, run, step, when in [
        (attempts[0], "r0", 9, 900),  # of the earliest attempt: ignored although newer
        (attempts[1], "r1", 2, 100),
        (attempts[1], "r2", 3, 200),
        (attempts[1], "r3", "half", 300),
        (attempts[2], "r4", None, 400),
    ]:
        killed_run(attempt_dir, run, step, when)
    study.add_trials(
        [
            *(
                attempt(i, f"/other/mount/trials/{attempt_dir.name}")
                for i, attempt_dir in enumerate(attempts)
            ),
            attempt(3),
        ]
    )
    attempt_dir = attempt_folder(trials, study.trials[3])
    assert attempt_dir.name.startswith("0003-retry3-") and attempt_dir != attempt_folder(
        trials, study.trials[3]
    )
    assert copy_earlier_run(study, study.trials[3], attempt_dir)[1:] == (
        None,
        attempt_dir / "r2" / "checkpoints" / "last.ckpt",
        3,
    )
    assert {path.name for path in (attempt_dir / "r2").iterdir()} == {
        "checkpoints",
        "metrics.csv",
    }  # W&B's files are not copied
    assert (attempts[1] / "r2" / "metrics.csv").is_file() and not list(trials.glob("*.part"))
    assert "cannot resume " in capsys.readouterr().err


def test_stopped_trial_resumes_and_repeats_no_epoch(write_sweep, tmp_path, replace_fit, no_results):
    """Calls stop after one epoch more than MAX_LOST times, because progress resets the count."""
    replace_fit("stand_in:fit_epochs")
    epochs = MAX_LOST + 2
    path = write_sweep(
        arguments=[f"--epochs={epochs}", "--stop=1"],
        parameters={"model.lr": {"values": [0.1, 0.2]}},
    )
    folder = tmp_path / "out"
    assert main(["sweep", str(path), "--dir", str(folder), "--workers", "0"]) == 0
    assert [row[1:] for row in ran(folder)] == [
        (lr, epoch) for lr in (0.1, 0.2) for epoch in range(epochs)
    ]
    last = [t for t in study_of(folder).trials if t.state == TrialState.COMPLETE]
    assert [t.value for t in last] == [51, 52] and last[0].user_attrs["attempt"] == epochs - 1
    for trial in last:
        rows = (Path(trial.user_attrs["record"]).parent / "metrics.csv").read_text().splitlines()
        assert [int(row.split(",")[0]) for row in rows] == list(range(epochs))
    # the files of every attempt exist, and a report uses only the record of the last one
    records = [read(candidate)[0] for candidate in find([str(folder)])]
    assert len(records) == 2 * epochs
    taken = [
        json.loads(path.read_text())["id"]
        for path in folder.rglob("record.json")
        if '"finished"' in path.read_text()
    ]
    assert len(taken) == len(set(taken)) == 2


def test_trial_without_progress_is_abandoned(write_sweep, tmp_path, replace_fit, no_results):
    replace_fit("stand_in:fit_epochs")
    path = write_sweep(
        arguments=["--epochs=3", "--stop=0"], parameters={"model.lr": {"values": [0.1]}}
    )
    folder = tmp_path / "out"
    assert main(["sweep", str(path), "--dir", str(folder), "--workers", "0"]) == 1
    assert len(study_of(folder).trials) == MAX_LOST


def test_late_result_of_a_reassigned_trial_is_superseded(write_sweep, tmp_path):
    sweep = read_sweep(write_sweep(parameters={"model.lr": {"values": [0.1]}}))
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db")
    queue = TrialQueue(study, lambda _: {"model.lr": 0.1}, limit=1)
    queue.refresh()
    trial = queue.claim("me")
    record = tmp_path / "trials" / "record.json"

    def fit(argv):
        queue.fail(trial, "lost", "heartbeat timed out")  # by another worker
        attempt_dir = Path(
            next(word for word in argv if "default_root_dir" in word).partition("=")[2]
        )
        last = Evaluation({"val/acc1_truncate_mean": 1.0}, 0)
        write_record(attempt_dir / "record.json", Record("a", "finished", {}, last=last))
        shutil.copy(attempt_dir / "record.json", record)
        return {"record": str(attempt_dir / "record.json")}

    worker = Worker(queue, sweep, ["val/acc1_truncate_mean"], tmp_path, fit)
    result = worker.run_claimed(trial)
    assert result.state == "complete" and json.loads(record.read_text())["status"] == "finished"
    assert json.loads(Path(result.record).read_text())["status"] == "interrupted"
    assert (
        study.trials[0].state == TrialState.FAIL
        and queue.last_attempts()[0].user_attrs["cause"] == "lost"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_suspended_worker_drops_its_trial_on_wake_up(write_sweep, tmp_path, sweep_process):
    path = write_sweep(
        arguments=["--epochs=12", "--sleep=0.5"],
        parameters={"model.lr": {"values": [0.1, 0.2, 0.3, 0.4]}},
    )
    folder, fit = tmp_path / "out", "stand_in:fit_epochs"
    first = sweep_process(path, "--dir", folder, "--stale-after", "3", fit=fit)
    wait_for(lambda: (folder / "trials" / "ran.txt").exists() and len(ran(folder)) >= 2)
    pid = ran(folder)[0][0]
    os.kill(pid, signal.SIGSTOP)
    second = sweep_process(path, "--dir", folder, "--stale-after", "3", fit=fit)
    wait_for(lambda: any(row[0] != pid and row[1] == 0.1 for row in ran(folder)))
    seen, woken = len([row for row in ran(folder) if row[0] == pid]), time.monotonic()
    os.kill(pid, signal.SIGCONT)
    for process in (first, second):
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
    mine = [row for row in ran(folder) if row[0] == pid]
    late = [row for row in mine[seen:] if row[1] == 0.1]
    assert len(late) <= 3, (
        late,
        time.monotonic() - woken,
    )  # it noticed within its next heartbeat
    assert {row[1] for row in mine} != {0.1}  # and continued with other trials
    trials = study_of(folder).trials
    assert sorted(t.value for t in trials if t.state == TrialState.COMPLETE) == [51, 52, 53, 54]
    assert [t.user_attrs["cause"] for t in trials if t.state == TrialState.FAIL] == ["lost"]
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    rows = [
        (Path(t.user_attrs["record"]).parent / "metrics.csv").read_text().splitlines() for t in done
    ]
    assert [[int(row.split(",")[0]) for row in one] for one in rows] == [list(range(12))] * 4


@pytest.mark.parametrize("pruned", [False, True])
def test_finished_run_without_a_stored_result_is_not_repeated(write_sweep, tmp_path, pruned):
    """The worker dies after the fit but before storing the result: one run, one result."""
    from stand_in import METRIC, fit

    sweep = read_sweep(
        write_sweep(
            parameters={"model.lr": {"values": [0.1]}},
            early_terminate={"type": "hyperband", "min_iter": 1},
        )
    )
    study = optuna.create_study(
        direction="maximize", storage=f"sqlite:///{tmp_path}/study.db", study_name="s"
    )
    queue = TrialQueue(study, lambda _: {"model.lr": 0.1}, limit=1)
    queue.refresh()
    dying = Worker(queue, sweep, [METRIC], tmp_path, fit, name="dying")
    claimed = queue.claim("dying")
    result = dying.objective.run(claimed)  # and not stored
    assert result.state == "complete" and len(ran(tmp_path)) == 1
    trial = optuna.trial.Trial(study, claimed._trial_id)
    trial.report(51.0, 1)
    if pruned:
        trial.set_user_attr("pruned", 1)
    queue.fail_worker("dying", "lost", "worker was killed by SIGKILL")

    queue.refresh()
    retry = Worker(queue, sweep, [METRIC], tmp_path, fit).run_claimed(queue.claim("next"))
    assert len(ran(tmp_path)) == 1 and queue.finished()
    assert retry.state == ("pruned" if pruned else "complete")
    last = queue.last_attempts()[0]
    assert last.state == (TrialState.PRUNED if pruned else TrialState.COMPLETE)
    assert last.intermediate_values == {1: 51.0}
    finished = [p for p in tmp_path.rglob("record.json") if '"finished"' in p.read_text()]
    assert [str(path) for path in finished] == [last.user_attrs["record"]]
    # the first worker was only suspended; the result that it stores later is ignored
    dying.objective.store(claimed, result)
    assert [p for p in tmp_path.rglob("record.json") if '"finished"' in p.read_text()] == finished
    assert queue.study.trials[0].state == TrialState.FAIL


def test_storage_outage_between_claim_and_fit_is_tolerated(
    write_sweep, tmp_path, replace_fit, no_results, monkeypatch
):
    from optuna.exceptions import StorageInternalError

    replace_fit("stand_in:fit")
    path, folder = write_sweep(), tmp_path / "out"
    real, failures = optuna.trial.Trial, [3]

    def flaky(*args):
        failures[0] -= 1
        if failures[0] >= 0:
            raise StorageInternalError("gone")
        return real(*args)

    monkeypatch.setattr("optuna.trial.Trial", flaky)
    monkeypatch.setattr("tq_lightning.sweep.storage.time.sleep", lambda _: None)
    assert main(["sweep", str(path), "--dir", str(folder), "--workers", "0"]) == 0
    assert sorted(t.value for t in study_of(folder).trials) == [51, 52, 53]


@pytest.mark.slow
def test_permanent_outage_is_an_error_of_one_line(
    write_sweep, tmp_path, replace_fit, no_results, monkeypatch, capsys
):
    from optuna.exceptions import StorageInternalError

    def gone(*_):
        raise StorageInternalError("gone")

    replace_fit("stand_in:fit")
    monkeypatch.setattr("optuna.trial.Trial", gone)
    monkeypatch.setattr("tq_lightning.sweep.storage.OUTAGE_SECONDS", 0.0)
    command = ["sweep", str(write_sweep()), "--dir", str(tmp_path / "out"), "--workers", "0"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: the storage has been unreachable" in error
