"""metrics.csv after a resume, and after a kill in the middle of a row."""

import csv

import pytest

from tq_lightning.callbacks.csv_logger import ResumableCSVLogger


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def log(root, resume_step=None, rows=()):
    logger = ResumableCSVLogger(str(root), "run", resume_step)
    for metrics, step in rows:
        logger.log_metrics(metrics, step)
    _ = logger.experiment
    return root / "run" / "metrics.csv"


def test_resume_drops_repeated_rows_and_accepts_new_keys(tmp_path):
    path = log(
        tmp_path,
        rows=[
            ({"epoch": 0, "a": 1.0}, 9),
            ({"epoch": 1, "a": 2.0}, 19),
            ({"epoch": 2, "a": 3.0}, 29),
        ],
    )
    assert len(rows_of(path)) == 3
    log(tmp_path, 20, [({"epoch": 2, "a": 4.0, "b": 5.0}, 29)])
    assert [(r["step"], r["a"], r["b"]) for r in rows_of(path)] == [
        ("9", "1.0", ""),
        ("19", "2.0", ""),
        ("29", "4.0", "5.0"),
    ]
    log(tmp_path, None)
    assert len(rows_of(path)) == 3


@pytest.mark.parametrize("torn", ["2", "2,3.0", "2,3.0,", "2,3.0,29,7,8", "\x00"])
def test_partial_row_of_a_killed_run_is_dropped(tmp_path, torn):
    path = log(tmp_path, rows=[({"epoch": 0, "a": 1.0}, 9), ({"epoch": 1, "a": 2.0}, 19)])
    assert path.read_text().splitlines()[0] == "a,epoch,step"
    with path.open("a") as file:
        file.write(torn)
    log(tmp_path, 20, [({"epoch": 2, "a": 4.0}, 29)])
    assert [r["step"] for r in rows_of(path)] == ["9", "19", "29"]


def test_empty_file_of_a_killed_run_is_continued(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").touch()
    log(tmp_path, resume_step=2, rows=[({"a": 1.0}, 2)])
    assert [row["step"] for row in rows_of(tmp_path / "run" / "metrics.csv")] == ["2"]


def test_every_row_is_written_immediately(tmp_path):
    assert len(rows_of(log(tmp_path, rows=[({"epoch": 0, "a": 1.0}, 9)]))) == 1


def test_metrics_of_the_step_and_epoch_of_the_last_row_are_added_to_it(tmp_path):
    first = [({"epoch": 0, "a": 1.0}, 9), ({"epoch": 1, "a": 2.0}, 19)]
    other = [({"epoch": 1, "a": 3.0}, 19), ({"b": 4.0}, 19), ({"epoch": 1, "b": 5.0}, 20)]
    path = log(tmp_path, rows=[*first, ({"epoch": 1, "b": 0.1}, 19), *other])
    assert path.read_text().splitlines() == [
        "a,b,epoch,step",
        "1.0,,0,9",
        "2.0,0.1,1,19",
        "3.0,,1,19",  # a value is not replaced
        ",4.0,,19",
        ",5.0,1,20",
    ]
