"""The plots of a study: contents, units, and labels that do not overlap."""

import itertools
import warnings

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial

from tq_lightning.sweep.plots import draw, figures, with_unit

KINDS = {"optimization_history", "param_importances", "parallel_coordinate", "slice"}
CHOICES = ("null", "clamp_round_truncate", "pact_floor_truncate", "[8, 7, 6, 5, 4, 3, 2, 1]")
SPACE = {
    "seed_everything": CategoricalDistribution([0, 1]),
    "model.activations": CategoricalDistribution(list(CHOICES)),
    "model.lr": FloatDistribution(1e-4, 1, log=True),
}


def study(count=12, names=("val/acc1_truncate_mean",)):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made = optuna.create_study(directions=["maximize", "minimize"][: len(names)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.set_metric_names(list(names))
    for n in range(count):
        params = {
            "seed_everything": n % 2,
            "model.activations": CHOICES[n % 4],
            "model.lr": 10.0 ** -(n % 5),
        }
        values = [50.0 + n, 1000.0 + 10 * n][: len(names)]
        made.add_trial(create_trial(values=values, params=params, distributions=SPACE))
    return made


def drawn(count=12, **kwargs):
    import matplotlib

    with matplotlib.rc_context({"figure.constrained_layout.use": True}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importances = [{"model.lr": 1.0} if count > 1 else {}] * 2
        return dict(figures(study(count, **kwargs), importances))


def visible_texts(figure):
    from matplotlib.text import Text

    hidden = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        hidden |= {
            label
            for tick in ticks
            if not low <= tick.get_loc() <= high
            for label in (tick.label1, tick.label2)
        }
    return [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text not in hidden
    ]


@pytest.mark.parametrize("count", [1, 12])
def test_labels_do_not_overlap_and_are_not_clipped(count):
    for name, figure in drawn(count).items():
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        boxes = [
            (text.get_text(), text.get_rotation(), text.get_window_extent(renderer))
            for text in visible_texts(figure)
        ]
        for (a, turned, box), (b, also, other) in itertools.combinations(boxes, 2):
            # bounding boxes of slanted labels overlap although the labels do not
            if not (turned % 90 or also % 90):
                assert not box.padded(-1).overlaps(other.padded(-1)), (name, a, b)
        width, height = figure.canvas.get_width_height()
        for text, _, box in boxes:
            assert box.x0 >= -1 and box.y0 >= -1, (name, text)
            assert box.x1 <= width + 1 and box.y1 <= height + 1, (name, text)


def test_every_plot_names_the_objective_with_its_unit():
    plots = drawn()
    assert set(plots) == KINDS
    for name, figure in plots.items():
        printed = " ".join(text.get_text() for text in visible_texts(figure))
        assert "val/acc1_truncate_mean" in printed, name
        assert ("(%)" in printed) or ("share of the variance" in printed), name


def test_metric_names_get_their_units():
    assert with_unit("val/qt_gap_w2") == "val/qt_gap_w2 (percentage points)"
    assert with_unit("train/loss_w2") == "train/loss_w2"
    assert with_unit("storage/bytes") == "storage/bytes"


def test_pareto_front_has_trial_numbers_and_units():
    plots = drawn(names=("val/acc1_float", "storage/bytes"))
    assert set(plots) == {f"{kind}_{i}" for kind in KINDS for i in (1, 2)} | {"pareto_front"}
    texts = {text.get_text() for text in visible_texts(plots["pareto_front"])}
    assert {"0", "11", "val/acc1_float (%)", "storage/bytes"} <= texts


def test_no_importance_plot_without_importances(tmp_path):
    written = draw(study(), tmp_path / "some", [{}])
    assert {path.stem for path in written} == KINDS - {"param_importances"}
    assert all(path.stat().st_size > 5000 for path in written)
    assert draw(study(0), tmp_path / "none", [{}]) == [] and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_plots_ignore_the_matplotlib_settings_of_the_user(tmp_path):
    import os
    import subprocess
    import sys
    from pathlib import Path

    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\n")
    settings = {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
    }
    here = Path(__file__)
    code = (
        "import sys, pathlib; from test_plots import study, draw; "
        "print(len(draw(study(4), pathlib.Path(sys.argv[1]), [{'model.lr': 1}])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "plots")],
        env=os.environ | settings | {"PYTHONPATH": f"{here.parent}:{here.parents[2]}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "4"), done.stderr
    assert "plots.py" not in done.stderr
