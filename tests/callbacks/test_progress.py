"""The progress bar fits a terminal of 80 columns. Printed losses are those of metrics.csv."""

import csv
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fixtures.fits import TWO_STEPS
from lightning.pytorch.callbacks import Callback

from tq_lightning.callbacks.progress import FitProgressBar
from tq_lightning.cli import run_fit


def test_the_bar_has_the_loss_but_not_the_name_of_the_run():
    logger = SimpleNamespace(version="20261126-063955-b0ee02")
    trainer = SimpleNamespace(loggers=[logger], progress_bar_metrics={"train/loss": 2.5})
    assert FitProgressBar().get_metrics(trainer, None) == {"train/loss": 2.5}


def screen(output: str, columns: int) -> list[str]:
    """Return the lines of a terminal without a bottom that received `output`."""
    rows, row, column = [""], 0, 0
    for control, text in re.findall(r"(\x1b\[[?\d;]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", output):
        for character in text:
            if column == columns:
                row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row][:column].ljust(column) + character + rows[row][column + 1 :]
            column += 1
        if control == "\r":
            column = 0
        elif control == "\n":  # the terminal driver has added a return
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif control.endswith("A"):
            row -= int(control[2:-1] or 1)
        elif control.endswith("K"):
            rows[row] = "" if control[2:-1] == "2" else rows[row][:column]
        else:
            assert control == "" or control[-1] in "mhl", repr(control)
    return [line.rstrip() for line in rows]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudoterminal")
def test_bar_and_tables_share_a_terminal_of_80_columns(tmp_path):
    import fcntl
    import pty
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    argv = [*TWO_STEPS, "--trainer.max_epochs", "2", "--run_dir", str(tmp_path / "run")]
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    fit = subprocess.Popen(
        [sys.executable, "-m", "tq_lightning", "fit", *argv],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=Path(__file__).parents[2],
        env={**kept, "TERM": "xterm-256color"},
    )
    os.close(follower)
    output = b""
    try:
        while chunk := os.read(leader, 65536):
            output += chunk
    except OSError:  # how Linux reports that the other side is closed
        pass
    os.close(leader)
    text = output.decode()
    assert fit.wait() == 0, text
    lines = screen(text, 80)
    shown = "\n".join(lines)
    for epoch in (0, 1):
        start = lines.index(f"epoch {epoch} (validation)")
        table = lines[start + 1 : start + 13]
        assert table[0].startswith("┏") and table[2].startswith("┡") and table[11][0] == "└", shown
        assert [line.split()[1] for line in table[3:11]] == list("87654321"), shown
        assert len({len(line) for line in table}) == 1, shown
    bars = [line for line in lines if line.startswith("Epoch ") and " left" in line]
    assert len(bars) == 1, shown  # the others were replaced by the next one
    assert "train/loss" in bars[0] and "━" in bars[0]


class BarLosses(Callback):
    """Collect the loss of the progress bar after each optimizer step."""

    losses: list[float] = []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.progress_bar_metrics["train/loss"]))


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_printed_loss_is_the_logged_one(tmp_path, capsys, monkeypatch, accumulate):
    monkeypatch.setattr(BarLosses, "losses", [])
    flags = {
        "limit_train_batches": 4,
        "accumulate_grad_batches": accumulate,
        "log_every_n_steps": 1,
        "callbacks": f"{__name__}.BarLosses",
    }
    args = [text for key, value in flags.items() for text in (f"--trainer.{key}", str(value))]
    run_fit([*TWO_STEPS, *args, "--run_dir", str(tmp_path / "run")])
    printed = [float(text) for text in re.findall(r", loss (\S+),", capsys.readouterr().out)]
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        logged = [float(row["train/loss"]) for row in csv.DictReader(file) if not row["epoch"]]
    assert len(printed) == 4 // accumulate
    assert printed == pytest.approx(logged, rel=1e-3)
    assert BarLosses.losses == pytest.approx(logged, rel=1e-5)
