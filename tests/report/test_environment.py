"""Reports do not depend on matplotlib settings or on special characters in names."""

import json
import os
import re
import subprocess
import sys

import matplotlib
import pytest
from fixtures.records import compare

from tq_lightning.cli import report as command
from tq_lightning.report import figures
from tq_lightning.report.figures import style


@pytest.mark.slow
def test_notebook_backend_and_usetex_are_ignored(tmp_path, make):
    """Run the command in the environment of a notebook, whose backend cannot be imported here."""
    make.write(tmp_path / "runs", *make.pair((0, 1)))
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\n")
    svgs = []
    for name, more in {
        "plain": {},
        "notebook": {
            "MPLBACKEND": "module://nothing_like_it.backend_inline",
            "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
        },
    }.items():
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MPLB", "MATPL"))}
        done = subprocess.run(
            [sys.executable, "-m", "tq_lightning", "report", "runs", "--out", name],
            cwd=tmp_path,
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), (name, done.stderr)
        svg = (tmp_path / name / "figures/qt_gap_resnet20_cifar_cifar10.svg").read_text()
        svgs.append(re.sub(r"\bp[0-9a-f]{10}\b", "clip", svg))  # matplotlib 3.8: memory addresses
    assert svgs[0] == svgs[1]


def test_drawing_keeps_the_settings_of_the_caller(make):
    with matplotlib.rc_context({"font.size": 17.0}):
        backend = dict.__getitem__(matplotlib.rcParams, "backend")  # no backend was chosen
        figures.draw(compare(*make.pair((0, 1))))
        assert matplotlib.rcParams["font.size"] == 17.0
        assert dict.__getitem__(matplotlib.rcParams, "backend") == backend


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a$b$c$ \x1b[31m", "$ lone \udce9 surrogate 雪 é & <b>"])
def test_report_accepts_any_characters_in_names(tmp_path, make, name):
    make.write(tmp_path / "runs", *make.pair((0, 1), data_name=name), make.inspect(model=name))
    out = tmp_path / "report"
    assert command.main([str(tmp_path / "runs"), "--out", str(out)]) == 0
    page = (out / "index.html").read_text(encoding="utf-8")
    shown = name.replace("\udce9", "?").replace("\x1b", "?")
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["left_out"] == []
    assert shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in page


def test_dollar_signs_are_drawn_literally(make):
    with style.styled():
        (figure,), _ = figures.FIGURES["qt_gap"](compare(*make.pair((0, 1), data_name="a$b$c")))
        figure.canvas.draw_without_rendering()
