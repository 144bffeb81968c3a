"""The pictures of a study: what is in them, with units, and no label over another."""

import itertools

import pytest

from tq_lightning.sweep.plots import PLOTS, Axis, Shown, Study, draw, front, with_unit

CHOICES = ("null", "clamp_round_truncate", "pact_floor_truncate", "[8, 7, 6, 5, 4, 3, 2, 1]")
AXES = [
    Axis("seed_everything", ("0", "1")),
    Axis("model.activations", CHOICES),
    Axis("model.lr", log=True),
]


def study(count=12, names=("val/acc1_truncate_mean",)):
    trials = [
        Shown(
            number,
            (50.0 + number, 1000.0 + 10 * number)[: len(names)],
            {
                "seed_everything": str(number % 2),
                "model.activations": CHOICES[number % 4],
                "model.lr": 10 ** -(number % 5),
            },
            best=number > 8,
        )
        for number in range(count)
    ]
    return Study(
        list(names),
        [True, False][: len(names)],
        AXES,
        trials,
        [{"model.lr": 0.75, "model.activations": 0.25}] * 2,
    )


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


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize("count", [1, 12])
def test_no_label_lies_over_another_and_none_is_cut(name, count):
    figure = PLOTS[name](study(count), 0)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    boxes = [
        (text.get_text(), text.get_rotation(), text.get_window_extent(renderer))
        for text in visible_texts(figure)
    ]
    for (a, turned, box), (b, also, other) in itertools.combinations(boxes, 2):
        if not (turned % 90 or also % 90):  # the frames of slanted texts meet where the texts don't
            assert not box.padded(-1).overlaps(other.padded(-1)), (a, b)
    width, height = figure.canvas.get_width_height()
    assert all(
        box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        for _, _, box in boxes
    )


@pytest.mark.parametrize("name", PLOTS)
def test_the_objective_is_named(name):
    said = " ".join(text.get_text() for text in visible_texts(PLOTS[name](study(), 0)))
    assert "val/acc1_truncate_mean" in said and ("(%)" in said or "share of the variance" in said)


def test_units():
    assert (
        with_unit("val/qt_gap_w2") == "val/qt_gap_w2 (percentage points)"
        and with_unit("train/loss_w2") == "train/loss_w2"
    )
    assert with_unit("storage/bytes") == "storage/bytes"


def test_a_front_marks_its_trials_by_number():
    texts = {
        text.get_text()
        for text in visible_texts(front(study(names=("val/acc1_float", "storage/bytes"))))
    }
    assert {
        "9",
        "10",
        "11",
        "val/acc1_float (%), more is better",
        "storage/bytes, less is better",
    } <= texts and "3" not in texts


def test_what_tells_no_importances_is_not_drawn(tmp_path):
    told = study()
    silent = Study(told.names, told.maximize, told.axes, told.trials, [{}])
    assert {path.stem for path in draw(silent, tmp_path)} == set(PLOTS) - {"param_importances"}
    assert draw(Study(told.names, told.maximize, told.axes, [], [{}]), tmp_path / "none") == []
