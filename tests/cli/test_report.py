"""The verb report: atomic writes, one-line errors, no import of torch."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module

import pytest
from fixtures.records import make  # noqa: F401

from tq_lightning import files
from tq_lightning.cli import report as command
from tq_lightning.errors import UserError


@pytest.fixture
def quick(monkeypatch):
    """Skip the drawing of figures in tests about files."""
    monkeypatch.setattr(
        import_module("tq_lightning.report.figures"), "draw", lambda comparisons: ([], [])
    )


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_narrow_terminal_truncates_no_text(tmp_path, make, quick, capsys, monkeypatch):
    make.write(tmp_path / "runs", *make.pair(seeds=(0, 1)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert command.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # bold and colors
    table = [line for line in out.splitlines() if line[:1] in "┏┃┡│└"]
    assert len(table) > 5 and max(map(len, table)) <= 80
    assert "…" not in out and "floor" in out and "round" in out
    assert re.search(r"^model \S+, data ", out, re.MULTILINE)


def test_name_with_a_line_break_stays_in_its_row(tmp_path, make, quick, capsys):
    record = make.run()
    record["config"]["model"]["name"] = "local-dir:a\nb"
    make.write(tmp_path / "runs", record)
    assert command.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert len(rows) == 2 and rows[1].startswith("local-dir:a b\t")


@pytest.mark.slow
def test_report_is_complete_without_importing_torch(tmp_path, make):
    failed = make.run(seed=5, status="failed", reason="out of memory")
    make.write(tmp_path / "runs", *make.pair(seeds=(0, 1)), make.inspect(), failed)
    code = (
        "import sys; from tq_lightning.cli.report import main; "
        "main(['runs', '--out', 'results/first', '--title', 'A title']); "
        "heavy = {'torch', 'lightning', 'timm'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    made = set(files_in(tmp_path / "results" / "first"))
    assert {
        "index.html",
        "runs.csv",
        "summary.md",
        "report.json",
        "tables/qt_gap.md",
        "tables/storage.tex",
    } <= made
    assert {
        "figures/storage.png",
        "figures/storage.svg",
        "figures/qt_gap_resnet20_cifar_cifar10.png",
    } <= made
    assert os.listdir(tmp_path / "results") == ["first"]  # no partial files beside it
    page = (tmp_path / "results" / "first" / "index.html").read_text()
    assert "<title>A title</title>" in page
    assert "unfinished: status failed (out of memory)" in page
    assert (
        "resnet20_cifar\tcifar10\tfloor\tscaled\t0,1" in done.stdout
    )  # plain lines: this is not a terminal
    assert "left out: runs/" in done.stdout
    assert "4 runs in 2 arms, 1 inspect record, 1 left out" in done.stdout


def test_arms_are_distinguishable_in_the_terminal(tmp_path, make, quick, capsys):
    kinds = ("clamp_round", "clamp_round_truncate")
    records = [
        make.run("floor", 0, model_activations=kind, model_lr=lr)
        for kind in kinds
        for lr in (0.1, 0.2)
    ]
    make.write(tmp_path / "runs", *records, make.run("floor", 0, model_level="left"))
    command.main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    settled = [
        tuple(cell for head, cell in zip(rows[0], row, strict=True) if "bit" not in head)
        for row in rows[1:]
    ]
    assert len(set(settled)) == len(settled) == 5
    assert {"level", "activations", "also"} < set(rows[0])


def test_report_folder_is_replaced_atomically(tmp_path, make, quick):
    make.write(tmp_path / "runs", *make.pair(seeds=(0,)))
    out = tmp_path / "report"
    command.main([str(tmp_path / "runs"), "--out", str(out)])
    (out / "stale.txt").write_text("from before")
    command.main([str(tmp_path / "runs"), "--out", str(out)])
    assert "stale.txt" not in files_in(out)
    assert sorted(os.listdir(tmp_path)) == ["report", "runs"]


def test_report_inside_the_runs_folder_is_not_read(tmp_path, make, quick):
    runs = make.write(tmp_path / "runs", make.run())
    command.main([str(runs), "--out", str(runs / "report")])
    (runs / "report" / "record.json").write_text("{}")
    command.main([str(runs), "--out", str(tmp_path / "second")])
    assert json.loads((tmp_path / "second" / "report.json").read_text())["left_out"] == []


@pytest.mark.parametrize("moment", ["fill", "move"])
def test_failed_report_keeps_the_old_one(tmp_path, monkeypatch, make, quick, moment):
    make.write(tmp_path / "runs", make.run())
    out = tmp_path / "report"
    command.main([str(tmp_path / "runs"), "--out", str(out)])
    before = {name: (out / name).read_bytes() for name in files_in(out)}

    def fail(*_, **__):
        raise OSError("disk full")

    if moment == "fill":
        monkeypatch.setattr(import_module("tq_lightning.report.html"), "page", fail)
    else:
        real = os.replace
        monkeypatch.setattr(files, "_exchange", lambda one, two: False)  # as on other systems
        monkeypatch.setattr(
            "os.replace",
            lambda a, b: fail() if b == out and not a.name.endswith(".old") else real(a, b),
        )
    with pytest.raises(UserError, match="disk full"):
        command.main([str(tmp_path / "runs"), "--out", str(out)])
    assert {name: (out / name).read_bytes() for name in files_in(out)} == before
    assert sorted(os.listdir(tmp_path)) == ["report", "runs"]


def test_out_with_foreign_files_is_an_error_and_unchanged(tmp_path, make, quick):
    make.write(tmp_path / "runs", make.run())
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    for name, words in {
        "file": "is a file",
        "photos": "the folder exists and is not a report",
    }.items():
        with pytest.raises(UserError, match=words):
            command.main([str(tmp_path / "runs"), "--out", str(tmp_path / name)])
    assert (tmp_path / "file").read_text() == (tmp_path / "photos" / "a.txt").read_text() == "mine"
    with pytest.raises(UserError, match="cannot be written"):
        command.main([str(tmp_path / "runs"), "--out", str(tmp_path / "file" / "below")])


def test_out_may_be_an_empty_folder(tmp_path, make, quick):
    make.write(tmp_path / "runs", make.run())
    (tmp_path / "report").mkdir()
    assert command.main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0


def test_invalid_input_creates_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        command.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "results" / "report")])
    assert os.listdir(tmp_path) == []


def test_invalid_arguments_are_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match=r"the following arguments are required: --out; .*--help"):
        command.main([str(tmp_path)])


def test_unknown_ignored_key_is_an_error(tmp_path, make):
    make.write(tmp_path / "runs", make.run())
    with pytest.raises(UserError, match=r"--ignore model\.lrr: no run has this key"):
        command.main(
            [str(tmp_path / "runs"), "--out", str(tmp_path / "report"), "--ignore", "model.lrr"]
        )


@pytest.mark.slow
def test_report_of_two_thousand_runs(tmp_path, make, quick):
    """Two thousand records make one report; its duration is not asserted."""
    records = [
        r for k in range(250) for r in make.pair(seeds=range(4), model_lr=round(0.001 * k, 3))
    ]
    make.write(tmp_path / "runs", *records)
    assert command.main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "runs.csv").read_text().count("\n") == 2000 * 16 + 1
