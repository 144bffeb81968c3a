"""Reading records: which are used, and the reasons for those left out."""

import json
import os
import shutil
import sqlite3

import pytest

from tq_lightning.errors import UserError
from tq_lightning.records.publish import flatten, shorten
from tq_lightning.report.inputs import find
from tq_lightning.report.runs import load
from tq_lightning.sweep.storage import sqlite_url


def reasons(loaded):
    return [reason for _, reason in loaded.left_out]


def test_copies_of_a_killed_writer_are_not_read(tmp_path, make):
    """A worker that is killed while it copies a run leaves a hidden temporary folder."""
    make.write(tmp_path, make.run())
    (run,) = [path.parent for path in tmp_path.rglob("record.json")]
    shutil.copytree(run, tmp_path / ".0001-retry1.0a1b2c3d.tmp" / "run")
    assert len(find([str(tmp_path)])) == 1
    shutil.copytree(run, tmp_path / ".hidden" / "run")  # not a temporary name
    assert len(find([str(tmp_path)])) == 2


def test_folder_glob_file_and_overlap_read_each_run_once(tmp_path, make):
    make.write(tmp_path / "runs", *make.pair(seeds=(0, 1)), make.inspect())
    loaded = load(
        [
            str(tmp_path / "runs"),
            str(tmp_path / "runs" / "*"),
            *map(str, (tmp_path / "runs").rglob("record.json")),
        ]
    )
    assert len(loaded.runs) == 4
    assert len(loaded.inspects) == 1
    assert loaded.left_out == []


def test_copy_with_a_test_block_is_preferred(tmp_path, make):
    """Of the copy in the W&B folder and the run's record, the one with a test block is used."""
    record = make.run(test=True)
    make.write(tmp_path / "runs", record)
    files = tmp_path / "wandb" / "run-1" / "files"
    files.mkdir(parents=True)
    (files / "record.json").write_text(json.dumps({k: v for k, v in record.items() if k != "test"}))
    loaded = load([str(tmp_path)])
    assert [run.has_test for run in loaded.runs] == [True]
    assert "a copy of" in reasons(loaded)[0]
    alone = load([str(tmp_path / "wandb" / "run-1")])
    assert [run.has_test for run in alone.runs] == [False]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"status": "failed", "reason": "out of memory"},
            "unfinished: status failed (out of memory)",
        ),
        ({"status": "interrupted"}, "unfinished: status interrupted"),
        ({"status": "running", "widths": {}}, "unfinished: status running"),
        ({"schema": 2}, "schema 2; this version reads schema 1"),
        ({"kind": "other"}, "kind 'other'"),
        ({"config": None}, "broken: config is missing"),
        ({"widths": {}}, "no widths"),
        (
            {"widths": {"four": {"quantize": 80.0, "truncate": 80.0}}},
            "broken: widths has a key that is not a width in bits",
        ),
        ({"seed": [1]}, "broken: seed is '[1]', not an integer"),
        ({"test": {"metrics": []}}, "broken: test.metrics is '[]', not a mapping"),
        ({"bytes": {"planes": 7}}, "broken: bytes.planes is '7', not a mapping"),
        (
            {"curves": {"val/acc1_truncate_w8": 1}},
            "broken: curves.val/acc1_truncate_w8 is '1', not a list of pairs",
        ),
        ({"widths": {"4": {"quantize": 80.0}}}, "broken: widths.4.truncate is missing"),
        (
            {"widths": {"4": {"quantize": float("nan"), "truncate": 1.0}}},
            "broken: widths.4.quantize is 'nan', not a number",
        ),
    ],
)
def test_unusable_records_are_listed_never_used(tmp_path, make, change, reason):
    make.write(tmp_path, make.run(seed=0), make.run(seed=1) | change)
    loaded = load([str(tmp_path)])
    assert [run.seed for run in loaded.runs] == [0]
    assert len(loaded.left_out) == 1
    assert reason in reasons(loaded)[0]


def test_partial_and_foreign_json_is_skipped_with_a_reason(tmp_path, make):
    make.write(tmp_path, make.run())
    whole = json.dumps(make.run(seed=1))
    for name, text in {
        "half": whole[: len(whole) // 2],
        "foreign": '{"a": 1}',
        "empty": "",
        "list": "[1]",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(text)
    (tmp_path / "metrics.json").write_text(
        '{"a": 1}'
    )  # neither a record nor an inspect record by name: not listed
    loaded = load([str(tmp_path)])
    assert len(loaded.runs) == 1
    found = {path.split("/")[-2]: reason for path, reason in loaded.left_out}
    assert "half-written" in found["half"]
    assert "half-written" in found["empty"]
    assert "the key 'schema' is missing" in found["foreign"]
    assert "the key 'schema' is missing" in found["list"]


@pytest.mark.parametrize("part", ["ways", "read_at", "energy", "mechanism", "policy"])
def test_broken_inspect_record_does_not_break_the_report(tmp_path, make, part):
    whole, broken = make.inspect(), make.inspect("resnet18", 11_689_512)
    broken[part] = "x"
    make.write(tmp_path, whole, broken)
    loaded = load([str(tmp_path)])
    assert [record.model for record in loaded.inspects] == ["resnet50"]
    assert reasons(loaded) == [f"broken: {part} is 'x', not a mapping"]


def test_different_runs_with_the_same_id_are_left_out(tmp_path, make):
    one, other = make.run(seed=0), make.run(seed=1)
    other["id"] = one["id"]
    for name, record in {"a": one, "b": other, "c": make.run(seed=2)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(record))
    loaded = load([str(tmp_path)])
    assert [run.seed for run in loaded.runs] == [2]
    assert len(loaded.left_out) == 2
    assert all(
        f"different runs with the same id ({one['id']})" in reason for reason in reasons(loaded)
    )
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "record.json").write_text(
        json.dumps(one)
    )  # a copy of one of two contradictory records is not counted either
    left_out = load([str(tmp_path)]).left_out
    assert len(left_out) == len(dict(left_out)) == 3
    assert not any("counted once" in reason for _, reason in left_out)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nothing", "no such file or folder"),
        ("nix*", "the pattern matches no file or folder"),
        ("empty", "the folder is empty"),
        ("photos", "no record.json among its 1 files"),
        ("photos/a.txt", "neither a JSON record nor an Optuna study"),
        ("dir", "no usable record among 1: dir/record.json: not a regular file"),
        ("pipe", "no usable record among 1: pipe/record.json: not a regular file"),
        ("half/record.json", "no usable record among 1: half/record.json: broken JSON"),
        ("sqlite:///absent.db", "no such SQLite file"),
        ("notes.db", "notes.db: not readable as an Optuna study"),
        ("no*", "none of the 1 matches has a record.json; the last: notes.db"),
    ],
)
def test_invalid_input_is_an_error_of_one_line(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "photos", "half", "dir/record.json", "pipe"):
        (tmp_path / name).mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe" / "record.json")
    (tmp_path / "photos" / "a.txt").write_text("x")
    (tmp_path / "half" / "record.json").write_text('{"schema": 1,')
    with sqlite3.connect(tmp_path / "notes.db") as base:
        base.execute("create table t (a int)")
    before = (tmp_path / "notes.db").read_bytes()
    with pytest.raises(UserError) as caught:
        load([given])
    assert (tmp_path / "notes.db").read_bytes() == before  # a foreign database is only read
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_only_complete_trials_of_a_study_are_used(tmp_path, monkeypatch, make, kind):
    """Complete trials are used; pruned and failed ones and those without records are listed."""
    optuna = pytest.importorskip("optuna")
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    monkeypatch.chdir(tmp_path)
    make.write(tmp_path / "trials", *(make.run(seed=seed) for seed in (0, 1)))
    storage = (
        JournalStorage(JournalFileBackend("study.log"))
        if kind == "journal"
        else "sqlite:///study.db"
    )
    study = optuna.create_study(study_name="ste", storage=storage)
    states = [optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED]
    for path, state in zip(sorted((tmp_path / "trials").rglob("record.json")), states, strict=True):
        attributes = {"record": str(path.relative_to(tmp_path))}
        study.add_trial(optuna.trial.create_trial(state=state, value=1.0, user_attrs=attributes))
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    given = {
        "journal": [["study.log"], ["trials", "study.log"]],
        "sqlite": [["study.db"], ["trials", "sqlite:///study.db"]],
    }
    for inputs in given[kind]:
        loaded = load(inputs)
        assert len(loaded.runs) == 1
        assert any("the trial is pruned, not complete" in reason for reason in reasons(loaded))
        assert any("the trial (fail) has no record" in reason for reason in reasons(loaded))


@pytest.mark.parametrize("moved", [False, True])
def test_pruned_trials_are_read_from_a_moved_sweep_folder(tmp_path, monkeypatch, make, moved):
    """The record of a pruned trial has status finished; the study has the actual state."""
    optuna = pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "sweep"
    states = [optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED]
    made = []
    for number, state in enumerate(states):
        path = home / "trials" / f"{number:04}" / "run" / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(make.run(seed=number)))
        made.append(
            optuna.trial.create_trial(state=state, value=1.0, user_attrs={"record": str(path)})
        )
    study = optuna.create_study(study_name="ste", storage="sqlite:///sweep/study.db")
    study.add_trials(made)
    if moved:
        home = home.rename(tmp_path / "elsewhere")
    for given in (str(home), str(home / "study.db")):
        loaded = load([given])
        assert [run.seed for run in loaded.runs] == [0]
        (reason,) = reasons(loaded)
        assert "the trial is pruned, not complete" in reason


def test_journal_of_a_sweep_is_read(tmp_path, monkeypatch, make):
    optuna = pytest.importorskip("optuna")
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    monkeypatch.chdir(tmp_path)
    make.write(tmp_path / "trials", record := make.run())
    study = optuna.create_study(storage=JournalStorage(JournalFileBackend("study.log")))
    attributes = {"record": f"trials/{record['id']}/record.json"}
    study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.COMPLETE, value=1.0, user_attrs=attributes
        )
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("journal:study.log", "journal:~/study.log"):
        assert [run.id for run in load([given]).runs] == [record["id"]]
    study = optuna.create_study(storage="sqlite:///study.db")
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs=attributes))
    assert [run.id for run in load(["sqlite:///~/study.db"]).runs] == [record["id"]]
    (tmp_path / "study.db").rename(tmp_path / "a {b} ?.db")
    escaped = "a%20%7Bb%7D%20%3F.db"  # two ways in which versions of SQLAlchemy write the path
    for url in (f"sqlite:///{escaped}", f"sqlite:///file:{escaped}?uri=true"):
        assert [run.id for run in load([url]).runs] == [record["id"]]
    assert [run.id for run in load([sqlite_url(tmp_path / "a {b} ?.db")]).runs] == [record["id"]]


def test_paths_of_the_machine_are_shortened_and_urls_kept():
    given = {
        "root": "/home/me/data/cifar10",
        "list": ["--x=/a/b/c.yaml"],
        "mixed": [["/a/b/c.yaml", 1], [2, 3]],
    }
    kept = {"url": "https://a.b/c/d", "rel": "runs/x/y", "n": 1, "curve": [[0, 1.5], [1, 2.5]]}
    shown = {"root": "…/cifar10", "list": ["--x=…/c.yaml"], "mixed": [["…/c.yaml", 1], [2, 3]]}
    assert shorten(given | kept) == shown | kept


def test_full_paths_are_kept_on_request(tmp_path, make):
    make.write(tmp_path, make.run())
    assert load([str(tmp_path)]).runs[0].record.config["data"]["root"] == "…/cifar10"
    assert (
        load([str(tmp_path)], full_paths=True).runs[0].record.config["data"]["root"]
        == "/home/someone/data/cifar10"
    )


def test_flatten_joins_keys_with_dots():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, 2]}) == {"a.b": 1, "a.c": {}, "d": [1, 2]}
