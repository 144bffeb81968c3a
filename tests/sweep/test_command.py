"""The verb sweep with a stand-in for fit: failures, signals, joining, resuming, bad input."""

import csv
import os
import signal
import time

import optuna
import pytest
from optuna.trial import TrialState
from worker_pool_helpers import check_killed_worker, ran, study_of, wait_for

from tq_lightning.cli import main
from tq_lightning.report.inputs import find


@pytest.fixture
def with_results(replace_fit):
    """Return arguments that run the stand-in for fit in this process."""
    replace_fit("stand_in:fit")
    return ["--workers", "0"]


@pytest.fixture
def stand_in(with_results, no_results):
    """The same without tables and plots."""
    return with_results


def test_grid_runs_once_and_writes_records_tables_and_plots(
    write_sweep, tmp_path, with_results, monkeypatch, capsys
):
    path = write_sweep(
        parameters={
            "seed_everything": {"values": [0, 1]},
            "model.lr": {"values": [0.1, 0.2]},
            "w": {"values": [[8, 4]]},
        }
    )
    folder = tmp_path / "out"
    assert main(["sweep", str(path), "--dir", str(folder), *with_results]) == 0
    assert [row[1:] for row in ran(folder)] == [(0.1, 0), (0.2, 0), (0.1, 1), (0.2, 1)]
    best = study_of(folder).best_trial
    (attempt,) = (folder / "trials").glob("0001-*")
    assert best.value == 52.0 and best.user_attrs["record"] == str(attempt / "run" / "record.json")
    assert (
        best.user_attrs["run_dir"] == str(attempt) and "--w=[8, 4]" in best.user_attrs["arguments"]
    )
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [float(row["val/acc1_truncate_mean"]) for row in rows] == [52, 51, 51, 50] and rows[0][
        "w"
    ] == "[8, 4]"
    arms = list(csv.DictReader((folder / "arms.csv").open()))
    assert [(float(arm["mean val/acc1_truncate_mean"]), arm["seeds"]) for arm in arms] == [
        (51.5, "2"),
        (50.5, "2"),
    ]
    drawn = {file.name for file in (folder / "plots").iterdir()}
    assert drawn == {
        f"{kind}.png"
        for kind in ("optimization_history", "param_importances", "parallel_coordinate", "slice")
    }
    assert all(file.stat().st_size > 5000 for file in (folder / "plots").iterdir())
    assert "parameter importances" in capsys.readouterr().out
    monkeypatch.setattr("tq_lightning.sweep.results.write_results", lambda *_: None)
    assert (
        main(["sweep", str(path), "--dir", str(folder), *with_results]) == 0
    )  # the same command again has nothing to run
    assert len(ran(folder)) == 4


def test_resume_command_replaces_a_password_by_a_placeholder():
    from tq_lightning.cli.sweep import resume_command

    shown = resume_command(["s.yaml", "--storage", "postgresql+psycopg://me:se cr@t@host/db"])
    assert "cr@t" not in shown and "'postgresql+psycopg://me:***@host/db'" in shown
    assert "(replace *** by the password of --storage)" in shown
    plain = ["my sweep.yaml", "--storage", "postgresql+psycopg://me@host/db"]
    assert resume_command(plain).endswith(
        "tq_lightning sweep 'my sweep.yaml' --storage postgresql+psycopg://me@host/db"
    )


@pytest.mark.slow
def test_failed_trials_have_reasons_and_the_sweep_continues(write_sweep, tmp_path, with_results):
    ends = ["raise", "exit", "nan", "unlogged", "well"]
    path, folder = write_sweep(parameters={"end": {"values": ends}}), tmp_path / "out"
    assert main(["sweep", str(path), "--dir", str(folder), *with_results]) == 0
    # running out of memory in the first trial ends no worker: the others ran
    trials = study_of(folder).trials
    assert [t.state for t in trials] == [TrialState.FAIL] * 4 + [TrialState.COMPLETE]
    reasons = [t.user_attrs["reason"] for t in trials[:4]]
    assert reasons[0] == "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert reasons[1] == "fit exited with status 3"
    assert reasons[2] == "non-finite: train/loss_w2 is nan in the last epoch"
    assert reasons[3].startswith(
        "val/acc1_truncate_mean was never logged; the record has train/loss_w2"
    )
    assert "exited with status 3" in (folder / "trials.csv").read_text()


def test_sweep_without_a_result_is_an_error(write_sweep, tmp_path, stand_in, capsys):
    path = write_sweep(parameters={"end": {"values": ["raise"]}})
    assert main(["sweep", str(path), "--dir", str(tmp_path / "out"), *stand_in]) == 1
    assert "no trial has a result: RuntimeError: CUDA out of memory." in capsys.readouterr().err


def test_random_sweep_ends_at_its_cap_and_resumes_with_a_larger_cap(
    write_sweep, tmp_path, stand_in
):
    path = write_sweep(
        method="random", parameters={"model.lr": {"min": 0.0, "max": 1.0}}, run_cap=3
    )
    folder = tmp_path / "out"
    assert main(["sweep", str(path), "--dir", str(folder), *stand_in]) == 0
    assert main(["sweep", str(path), "--dir", str(folder), "--n-trials", "5", *stand_in]) == 0
    assert len({lr for _, lr, _ in ran(folder)}) == len(ran(folder)) == 5


def test_no_trial_starts_after_the_timeout(write_sweep, tmp_path, stand_in, capsys):
    path = write_sweep(
        method="bayes", parameters={"model.lr": {"min": 0.0, "max": 1.0}}, arguments=["--sleep=0.3"]
    )
    folder = tmp_path / "out"
    assert main(["sweep", str(path), "--dir", str(folder), "--timeout", "1", *stand_in]) == 0
    assert 1 <= len(ran(folder)) <= 4 and " done, 0 running, 0 failed" in capsys.readouterr().out
    assert all(
        t.state == TrialState.COMPLETE
        for t in study_of(folder).trials
        if t.state != TrialState.WAITING
    )


def test_several_objectives_give_a_pareto_front(write_sweep, tmp_path, with_results):
    path, folder = (
        write_sweep(early_terminate={"type": "hyperband", "min_iter": 1}),
        tmp_path / "out",
    )
    expected = "val/acc1_truncate_mean:max,storage/bytes:min"
    assert (
        main(["sweep", str(path), "--dir", str(folder), "--objectives", expected, *with_results])
        == 0
    )
    study = study_of(folder)
    assert [t.values for t in study.trials] == [[51, 1010], [52, 1020], [53, 1030]] and len(
        study.best_trials
    ) == 3
    assert (folder / "plots" / "pareto_front.png").stat().st_size > 5000
    assert not any("ReportToStudy" in word for word in study.trials[0].user_attrs["arguments"])


BAD = [
    (["--objectives", "a"], "expected NAME:max or NAME:min"),
    (["--objectives", "a:max,a:min"], "each name once"),
    (["--workers", "-1"], "--workers: expected an integer >= 0, got -1"),
    (["--workers", "9" * 20], "--workers: expected an integer <= 1024, got 99999999999999999999"),
    (["--n-trials", "0"], "--n-trials: expected an integer >= 1, got 0"),
    (["--storage", ""], "--storage: got ''; pass a value, or omit the option"),
    (["--dir", " "], "--dir: got ' '; pass a value, or omit the option"),
    (["--study-name", ""], "--study-name: got ''; pass a value, or omit the option"),
    (["--study-name", "s\udcff"], r"--study-name: got 's\udcff', pass a name in UTF-8"),
    (["--dir", "d\udcff"], r"--dir: got 'd\udcff', pass a name in UTF-8"),
    (["--n-trials", "x"], "expected an integer >= 1, got x"),
    (["--wrokers", "2"], "unrecognized arguments: --wrokers 2"),
    (
        ["--storage", "postgresql+psycopg://me:secret@127.0.0.1:1/x"],
        "cannot open the storage postgresql+psycopg://me:***@127.0.0.1:1/x: ",
    ),
    (["--storage", "sqlite:////nowhere/at/all.db"], "unable to open database file"),
    (["--storage", "nonsense"], "cannot open the storage nonsense: "),
    (["--storage", "sqlite://"], "sqlite:// is an in-memory database"),
    (["--", "--model.lr=1"], "searches model.lr; remove it from the arguments after --"),
]


@pytest.mark.parametrize(("argv", "message"), BAD)
def test_invalid_input_is_one_line_and_status_2(
    write_sweep, tmp_path, stand_in, capsys, argv, message
):
    command = ["sweep", str(write_sweep()), "--dir", str(tmp_path / "out"), *stand_in, *argv]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "secret" not in error
    assert not (tmp_path / "out" / "trials").exists()


def test_sweep_without_a_limit_is_an_error(write_sweep, tmp_path, stand_in, capsys):
    path = write_sweep(method="random")
    assert main(["sweep", str(path), "--dir", str(tmp_path / "out"), *stand_in]) == 2
    assert "a random sweep does not end by itself" in capsys.readouterr().err


def test_study_with_other_parameters_is_not_joined(write_sweep, tmp_path, stand_in, capsys):
    command = ["--dir", str(tmp_path / "out"), *stand_in]
    assert main(["sweep", str(write_sweep()), *command]) == 0
    other = write_sweep(parameters={"model.lr": {"values": [0.1, 0.5]}})
    assert main(["sweep", str(other), *command]) == 2
    error = capsys.readouterr().err
    assert (
        "exists" in error
        and "with other parameters" in error
        and "the study has [0.1, 0.2, 0.3], the file [0.1, 0.5]" in error
    )
    assert len(ran(tmp_path / "out")) == 3
    same = [str(write_sweep()), *command]
    assert main(["sweep", *same, "--", "--model.momentum=0.8"]) == 2
    assert "with other arguments after -- than" in capsys.readouterr().err
    assert main(["sweep", *same, "--study-name", "more", "--", "--model.momentum=0.8"]) == 0
    assert (
        main(["sweep", *same, "--study-name", "more"]) == 2
    )  # and a sweep with such arguments is not joined without them
    assert 'the study has ["--model.momentum=0.8"], the file null' in capsys.readouterr().err
    other = write_sweep(parameters={"model.lr": {"values": [0.1, 0.5]}})
    assert main(["sweep", str(other), *command, "--study-name", "other"]) == 0
    optuna.create_study(
        storage=f"sqlite:///{tmp_path}/out/study.db", study_name="foreign"
    ).add_trial(optuna.create_trial(value=1.0))
    assert main(["sweep", str(other), *command, "--study-name", "foreign"]) == 2
    assert "was not created from a sweep file" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_prints_the_resume_command(write_sweep, tmp_path, sweep_process):
    path, folder = write_sweep(arguments=["--sleep=0.5"]), tmp_path / "out"
    slow = write_sweep("slow.yaml", arguments=["--sleep=600"])
    process = sweep_process(slow, "--dir", folder, "--study-name", "s", "--workers", "2")
    wait_for(lambda: (folder / "trials" / "ran.txt").exists() and len(ran(folder)) == 2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=240)
    assert (
        process.returncode == 130
        and "Resume with: python -m tq_lightning sweep" in out
        and "Traceback" not in out
    )
    trials = study_of(folder, "s").trials
    assert not [t for t in trials if t.state == TrialState.RUNNING]
    assert [t.user_attrs["cause"] for t in trials if t.state == TrialState.FAIL] == [
        "interrupted"
    ] * 2
    for pid, _, _ in ran(folder):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert (
        path
    )  # the same command would take 600 s per trial; resuming is tested below with SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_killed_worker_loses_no_result_and_repeats_no_trial(
    write_sweep, tmp_path, sweep_process, storage
):
    check_killed_worker(
        write_sweep,
        tmp_path,
        sweep_process,
        f"journal:{tmp_path}/study.journal" if storage == "journal" else None,
    )


@pytest.mark.slow
def test_another_command_takes_over_from_a_killed_one(write_sweep, tmp_path, sweep_process):
    """The command and its worker die; a second command detects that the heartbeat stopped."""
    path, folder = write_sweep(arguments=["--sleep=1.5"]), tmp_path / "out"
    first = sweep_process(path, "--dir", folder, "--workers", "1")
    wait_for(lambda: (folder / "trials" / "ran.txt").exists())
    pid = ran(folder)[0][0]
    second = sweep_process(path, "--dir", folder, "--workers", "1", "--stale-after", "4")
    first.kill()
    os.kill(pid, signal.SIGKILL)
    out, _ = second.communicate(timeout=240)
    assert second.returncode == 0, out
    trials = study_of(folder).trials
    assert sorted(t.value for t in trials if t.state == TrialState.COMPLETE) == [51, 52, 53]
    lost = [t for t in trials if t.state == TrialState.FAIL]
    assert [t.user_attrs["reason"] for t in lost] == ["worker heartbeat timed out after 4 s"]
    assert len(ran(folder)) == 4


@pytest.mark.slow
def test_worker_with_broken_cuda_is_replaced(write_sweep, tmp_path, sweep_process):
    path = write_sweep(parameters={"end": {"values": ["cuda", "well"]}})
    process = sweep_process(path, "--dir", tmp_path / "out", "--workers", "1")
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    first, second = (pid for pid, _, _ in ran(tmp_path / "out"))
    assert first != second
    trials = study_of(tmp_path / "out").trials
    assert [t.state.name for t in trials] == ["FAIL", "COMPLETE"]
    assert (
        trials[0]
        .user_attrs["reason"]
        .startswith("RuntimeError: CUDA error: device-side assert triggered")
    )


def test_broken_cuda_in_this_process_ends_the_command(write_sweep, tmp_path, stand_in, capsys):
    path = write_sweep(parameters={"end": {"values": ["cuda", "well", "raise"]}})
    command = ["sweep", str(path), "--dir", str(tmp_path / "out"), *stand_in]
    assert main(command) == 130 and len(ran(tmp_path / "out")) == 1
    message = capsys.readouterr().out
    assert (
        "CUDA no longer works in this process" in message
        and "Resume with: python -m tq_lightning sweep" in message
    )
    assert main(command) == 0 and len(ran(tmp_path / "out")) == 3


@pytest.mark.slow
def test_workers_that_fail_to_start_end_the_command(write_sweep, tmp_path, sweep_process):
    process = sweep_process(write_sweep(), "--dir", tmp_path / "out", fit="stand_in:missing")
    out, _ = process.communicate(timeout=240)
    assert (
        process.returncode == 1
        and "3 workers exited before their first trial" in out
        and "has no attribute" in out
    )


def test_seconds_of_all_attempts_are_summed(write_sweep, tmp_path, replace_fit):
    replace_fit("stand_in:fit_epochs")
    path, folder = (
        write_sweep(
            arguments=["--epochs=2", "--stop=1", "--sleep=0.3"],
            parameters={"model.lr": {"values": [0.1]}},
        ),
        tmp_path / "out",
    )
    assert main(["sweep", str(path), "--dir", str(folder), "--workers", "0"]) == 0
    (row,) = csv.DictReader((folder / "trials.csv").open())
    attempts = study_of(folder).trials
    assert len(attempts) == 2 and row["attempt"] == "1"
    assert float(row["seconds"]) == pytest.approx(
        sum(t.duration.total_seconds() for t in attempts), abs=0.01
    )


@pytest.mark.parametrize("name", ["does lr matter?", "100 %41 #1", "{braces}", "über"])
def test_database_is_in_the_sweep_folder_for_any_name(
    write_sweep, tmp_path, stand_in, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    path = write_sweep()
    path.write_text(path.read_text() + f'name: "{name}"\n')
    for _ in range(2):  # the second command joins the study
        assert main(["sweep", str(path), *stand_in]) == 0
    folder = tmp_path / "runs" / "sweeps" / name
    assert [p.name for p in (tmp_path / "runs" / "sweeps").iterdir()] == [name]
    assert (folder / "study.db").read_bytes().startswith(b"SQLite format 3")
    assert len(ran(folder)) == 3
    assert len(find([str(folder / "study.db")])) == 3  # the report reads it too


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../outside", "'../../outside' cannot name a folder; pass --dir"),
        ("/tmp/outside", "'/tmp/outside' cannot name a folder"),
        ("..", "'..' cannot name a folder"),
        ("a\\nb", "cannot name a folder"),
        ("x" * 300, "cannot name a folder"),
    ],
)
def test_names_that_would_leave_the_folder_are_errors(
    write_sweep, tmp_path, stand_in, monkeypatch, capsys, name, message
):
    monkeypatch.chdir(tmp_path)
    path = write_sweep()
    path.write_text(path.read_text() + f'name: "{name}"\n')
    assert main(["sweep", str(path), *stand_in]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 300
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.yaml"]


def test_unwritable_folder_is_an_error_of_one_line(write_sweep, tmp_path, stand_in, capsys):
    (tmp_path / "file").write_text("")
    path = str(write_sweep())
    assert main(["sweep", path, "--dir", str(tmp_path / "file" / "out"), *stand_in]) == 2
    error = capsys.readouterr().err
    assert "cannot write" in error and error.count("\n") == 1
    assert main(["sweep", path, "--dir", str(tmp_path / "out"), *stand_in]) == 0
    capsys.readouterr()
    readonly = f"sqlite:///file:{tmp_path}/out/study.db?mode=ro&uri=true"
    other = write_sweep("other.yaml", parameters={"model.lr": {"values": [0.4]}})
    assert main(["sweep", str(other), "--storage", readonly, *stand_in]) == 2
    error = capsys.readouterr().err
    assert "readonly database" in error and error.count("\n") == 1, error


CASES = {
    "latin1": (b"# gelernt f\xfcr Ziffern\nmethod: grid\n", "line 1: not UTF-8 text"),
    "duplicate": (b"method: grid\nparameters:\n  a: {values: [1]}\n  a: {values: [2]}\n",
                  "line 4: duplicate key a (first on line 3)"),
    "broken": (b"method: grid\nparameters: {a: {values: [1, 2}\n", "not valid YAML"),
    "anchors": (
        b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + b"".join(
            b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 30)
        ),
        "more than 100,000 values",
    ),
    "grid": (
        b"method: grid\nmetric: {name: x, goal: maximize}\n"
        b"parameters: {a: {min: 1, max: 4000}, b: {min: 1, max: 6000}}\n"
        b'command: [python, -m, tq_lightning, fit, "${args}"]\n',
        "the grid has 24,000,000 points",
    ),
    "date": (b"method: grid\nparameters: {a: {values: [2024-01-01, 2]}}\n", "got date 2024-01-01"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_hostile_sweep_file_is_one_line_and_status_2(tmp_path, stand_in, capsys, case):
    content, message = CASES[case]
    path = tmp_path / "s.yaml"
    path.write_bytes(content)
    start = time.monotonic()
    assert main(["sweep", str(path), "--dir", str(tmp_path / "out"), *stand_in]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count("\n") == 1
    assert time.monotonic() - start < 10 and not (tmp_path / "out").exists()


def test_part_of_a_huge_grid_runs(tmp_path, stand_in):
    path = tmp_path / "s.yaml"
    path.write_bytes(CASES["grid"][0].replace(b"name: x", b"name: val/acc1_truncate_mean"))
    folder = tmp_path / "out"
    assert main(["sweep", str(path), "--dir", str(folder), "--n-trials", "2", *stand_in]) == 0
    assert [t.params for t in study_of(folder, "s").trials] == [{"a": 1, "b": 1}, {"a": 1, "b": 2}]


@pytest.mark.slow
def test_sigterm_to_a_worker_requeues_its_trial(write_sweep, tmp_path, sweep_process):
    path, folder = write_sweep(arguments=["--sleep=1.5"]), tmp_path / "out"
    process = sweep_process(path, "--dir", folder)
    wait_for(lambda: (folder / "trials" / "ran.txt").exists())
    os.kill(ran(folder)[0][0], signal.SIGTERM)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "Traceback" not in out, out
    trials = study_of(folder).trials
    assert sorted(t.value for t in trials if t.state == TrialState.COMPLETE) == [51, 52, 53]
    failed = [t for t in trials if t.state == TrialState.FAIL]
    assert [t.user_attrs["cause"] for t in failed] == ["interrupted"]


@pytest.mark.slow
def test_sigterm_to_the_command_gives_status_143(write_sweep, tmp_path, sweep_process):
    path, folder = write_sweep(arguments=["--sleep=600"]), tmp_path / "out"
    process = sweep_process(path, "--dir", folder)
    wait_for(lambda: (folder / "trials" / "ran.txt").exists())
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 143 and "interrupted. Progress is saved." in out, out
    assert study_of(folder).trials[0].user_attrs["cause"] == "interrupted"
