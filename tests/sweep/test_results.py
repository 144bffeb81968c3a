"""The tables of a sweep fit the terminal, without wrapped cells."""

import io

import pytest
from rich.console import Console

from tq_lightning.sweep.results import _print

ROWS = [
    {
        "trial": n,
        "state": "failed" if n == 3 else "complete",
        "val/acc1_truncate_mean": None if n == 3 else 97.2 - n,
        "model.quantizer": "floor",
        "model.widths": "[8, 4, 2, 1]",
        "model.teacher": "recursive",
        "seed_everything": n,
        "seconds": 28.1,
        "reason": "non-finite: train/loss_w2 is nan in the last epoch" if n == 3 else "",
    }
    for n in range(5)
]


def printed(width, rows=ROWS):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    _print(console, "digits: trials", rows)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [50, 80, 160])
def test_table_fits_and_names_omitted_columns(width):
    text = printed(width)
    rows = [line.split()[0] for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert max(map(len, text.splitlines())) <= width and rows == ["0", "1", "2", "3", "4"]
    assert "acc1_truncate_mean" in text and "trial 3: non-finite" in text
    left_out = "not shown, but in the CSV: seconds" in text
    assert left_out == (width < 160) and ("recursive" in text) == (width > 50)


def test_table_without_rows_is_not_printed():
    assert printed(80, []) == ""


def test_brackets_are_printed_literally():
    row = {"trial": 0, "state": "failed", "[/v2]": "[first,last]", "reason": "[/red]"}
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    _print(console, "[/v2]: trials", [row])
    text = console.file.getvalue()
    assert "[/v2]: trials" in text and "[first,last]" in text and "trial 0: [/red]" in text
    assert "[/v2]" in printed(20, [row | {"seconds": "x" * 30}])
