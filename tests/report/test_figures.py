"""Figures from synthetic records: selection, flags and texts."""

import re

import pytest
from fixtures import records
from fixtures.records import compare
from matplotlib.axes import Axes

from tq_lightning.report import figures
from tq_lightning.report.figures import pareto, style
from tq_lightning.report.tables.model_cost import ratio


def drawn(name, *records, **more):
    return drawing(name, *records, **more)[0]


def drawing(name, *records, **more):
    """Return (figures, notes) of one function."""
    with style.styled():
        return figures.FIGURES[name](compare(*records, **more))


def texts(figure):
    """Return all texts of a figure, its subfigures and axes."""
    import matplotlib.text

    return " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


@pytest.fixture(scope="module")
def all_figures(request):
    return figures.draw(compare(*records.everything()))[0]


def test_all_records_give_every_figure(all_figures):
    sections = {d.section for d in all_figures}
    assert {
        "QT gap",
        "Mechanism",
        "Storage",
        "Energy",
        "STE",
        "Levels",
        "Training curves",
        "Pareto front",
    } <= sections
    assert "Low-bit robustness" in sections
    names = [d.name for d in all_figures]
    assert len(set(names)) == len(names)


def test_every_figure_has_labels_and_units(all_figures):
    for d in all_figures:
        assert len(d.alt) > 40, d.name
        assert d.caption, d.name
        for axes in d.canvas.findobj(lambda a: hasattr(a, "get_xlabel")):
            if axes.get_visible() and axes.get_ylabel():
                assert re.search(r"\[.+\]|\(no unit\)", axes.get_ylabel()), (
                    d.name,
                    axes.get_ylabel(),
                )
            if axes.get_visible() and axes.get_xlabel():
                assert re.search(r"\[.+\]|\(no unit\)|epoch", axes.get_xlabel()), (
                    d.name,
                    axes.get_xlabel(),
                )


def test_nothing_is_drawn_without_records():
    assert figures.draw(compare()) == ([], [])


def test_qt_gap_has_one_figure_per_setting_with_its_flags(make):
    first, second = drawn(
        "qt_gap",
        *make.pair(model="resnet8_cifar"),
        make.run("round", 0),
        make.run("floor", 0, epochs=3),
    )
    assert "Unequal budgets" not in texts(first.canvas)
    assert "Unequal budgets: floor 3 epochs" in texts(second.canvas).replace("\n", " ")
    assert "One seed" in texts(second.canvas)
    assert "validation split" in texts(first.canvas)
    assert "round, truncated" in first.alt


def test_paper_overlay_needs_the_setting_of_the_paper(make):
    papers = {"model": "preresnet20_cifar", "model_activations": "clamp_round", "test": True}
    (with_overlay,) = drawn("qt_gap", *make.pair(**papers))
    assert "paper, same row" in texts(with_overlay.canvas)
    assert "test split" in texts(with_overlay.canvas)
    (without,) = drawn("qt_gap", *make.pair(**{**papers, "model_activations": None}))
    assert "paper" not in texts(without.canvas)


def test_round_is_drawn_without_floor_only_if_there_is_no_pair(make):
    (alone,) = drawn("qt_gap", make.run("round", 0))
    assert "floor" not in alone.alt
    (both,) = drawn("qt_gap", *make.pair(), make.run("round", 0, "resnet8_cifar"))
    assert "resnet20" in both.title


def test_hollow_markers_are_explained_if_a_width_was_not_trained(make):
    (some,) = drawn("qt_gap", *make.pair())
    assert "hollow: width not trained" in texts(some.canvas)
    everything = {"model_widths": list(range(1, 9)), "model_float_pass": True}
    (every,) = drawn("qt_gap", *make.pair(**everything))
    assert "hollow" not in texts(every.canvas)


@pytest.mark.parametrize("trained", [True, False])
def test_float_marker_is_hollow_unless_float_was_trained(make, trained):
    (figure,) = drawn(
        "qt_gap", *make.pair(model_widths=list(range(1, 9)), model_float_pass=trained)
    )
    assert ("hollow" in texts(figure.canvas)) != trained
    lines = [line for axes in figure.canvas.findobj(Axes) for line in axes.lines]
    points = [
        line
        for line in lines
        if len(line.get_xdata()) == 1 and line.get_xdata()[0] > 9 and line.get_marker() in "o^"
    ]
    assert len(points) == 2
    assert all((point.get_markerfacecolor() == "white") != trained for point in points)


def test_curve_needs_three_validations(make):
    note = "Training curves need at least three validations. Omitted: resnet20_cifar · cifar10."
    for epochs in (1, 2):
        assert drawing("curves", *make.pair(epochs=epochs)) == ([], [note])
    made, notes = drawing("curves", *make.pair(epochs=3))
    assert (len(made), notes) == (1, [])


def test_figure_without_a_comparison_is_not_drawn(make):
    assert drawn("qt_gap", make.run("floor")) == []
    assert drawn("robustness", *make.pair()) == []
    assert drawn("pareto", make.run("floor")) == []
    assert drawn("ste", *make.pair()) == []
    assert len(drawn("robustness", *make.pair(), *make.pair(model="resnet8_cifar"))) == 1


def test_titles_state_the_finding(make):
    (figure,) = drawn("qt_gap", *make.pair(noise=0.0))
    message = "Truncated to 2 bits, round goes from 84.0 to 24.0 % and floor stays at 84.0 %"
    assert figure.title == f"{message} (resnet20_cifar · cifar10)"
    assert message in texts(figure.canvas).replace("\u00a0", " ").replace("\n", " ")


def test_floor_is_green_and_round_orange_on_every_figure(make):
    others = make.pair(model="resnet8_cifar")
    for name in ("qt_gap", "robustness", "pareto", "disagreement"):
        for figure in drawn(name, *make.pair(), *others):
            lines = [line for axes in figure.canvas.findobj(Axes) for line in axes.lines]
            colors = {str(line.get_label()): line.get_color() for line in lines}
            for label, color in colors.items():
                if "floor" in label:
                    assert color == style.GREEN, (name, label)
                if "round" in label:
                    assert color in (style.ORANGE, style.PALE[style.ORANGE]), (name, label)


def test_intervals_are_clipped_at_100_and_seeds_are_dots(make):
    # 98.6 ± 2.6 % at 8 bits
    records = [make.run(q, s, offset=12.0 + s) for q in ("round", "floor") for s in (-1, 0, 1)]
    (figure,) = drawn("qt_gap", *records)
    (axes,) = figure.canvas.findobj(Axes)
    ends = [y for bar in axes.collections for path in bar.get_paths() for _, y in path.vertices]
    assert max(ends) <= 100.0
    dots = [line for line in axes.lines if line.get_marker() == "." and len(line.get_xdata()) == 3]
    assert len(dots) >= 24


def test_number_of_settings_is_limited_with_a_note(make):
    records = [r for k in range(14) for r in make.pair(seeds=(0,), model_lr=float(k))]
    made, notes = drawing("qt_gap", *records)
    assert len(made) == 12
    assert "14 settings, the 12 with the most runs are drawn" in notes[0]


def test_disagreement_notes_omitted_arms(make):
    runs = [make.run("round", 0, model_lr=float(k)) for k in range(9)]
    _, notes = drawing("disagreement", *runs)
    assert notes == [
        "Codes that disagree: 9 settings, the 7 with the most runs are drawn; the tables list all."
    ]
    (figure,) = drawn("disagreement", *runs, ignore=["model.lr"])
    assert all(f"round, lr={k}.0, resnet20_cifar" in figure.alt for k in range(9))


def test_disagreement_is_omitted_if_only_codes_that_nest_have_it(make):
    rounded = [make.run("round", seed) for seed in (0, 1)]
    floor = [make.run("floor", seed) for seed in (0, 1)]
    assert drawn("disagreement", *rounded, *floor)
    for record in rounded:  # as written by an earlier version
        for width in record["widths"].values():
            del width["disagree"]
    assert drawn("disagreement", *rounded, *floor) == []


@pytest.mark.parametrize("name", ["robustness", "pareto", "ste"])
def test_figure_flags_unequal_budgets(make, name):
    def settings(epochs):
        both = [("resnet8_cifar", 15), ("resnet20_cifar", epochs)]
        more = [
            make.run("floor", s, m, epochs=e, model_ste="identity") for m, e in both for s in (0, 1)
        ]
        return [*(r for m, e in both for r in make.pair((0, 1), model=m, epochs=e)), *more]

    (unequal,) = drawn(name, *settings(5))
    assert re.search(
        r"Budgets differ between (settings|arms): 5 to 15 epochs, 1500 to 4500\s+steps",
        texts(unequal.canvas),
    )
    (equal,) = drawn(name, *settings(15))
    assert "Budgets" not in texts(equal.canvas)


@pytest.mark.parametrize("name", ["robustness", "pareto", "disagreement"])
def test_figure_flags_different_initial_weights(make, name):
    tuned = make.pair((0, 1), model="resnet8_cifar", model_checkpoint_path="trained.th")
    (unequal,) = drawn(name, *make.pair((0, 1)), *tuned)
    flag = (
        r"Initial weights differ between (settings|arms): from scratch, "
        r"from trained\s+weights \(trained.th\)"
    )
    assert re.search(flag, texts(unequal.canvas))
    assert "may have been trained on the validation images" in unequal.caption
    (equal,) = drawn(name, *make.pair((0, 1)), *make.pair((0, 1), model="resnet8_cifar"))
    assert "Starts" not in texts(equal.canvas)


def test_pareto_front_shows_its_spread_and_lists_omitted_runs(make):
    (figure,) = drawn(
        "pareto", *make.pair(), *(make.run("floor", s, model_ste="identity") for s in (0, 1))
    )
    (axes,) = figure.canvas.findobj(Axes)
    assert any(bars.has_yerr for bars in axes.containers)
    note = "Arms with an STE that the paper does not pair with their quantizer are not drawn."
    assert note in figure.caption
    assert "not drawn" not in drawn("pareto", *make.pair())[0].caption


def test_every_accuracy_has_its_split_and_number_of_seeds(make):
    records = [*make.pair((0, 1)), make.run("floor", 2, test=True)]
    others = make.pair((0, 1), model="resnet8_cifar")
    for name, more in {"qt_gap": [], "robustness": others, "pareto": []}.items():
        (figure,) = drawn(name, *records, *more)
        assert "validation split, best epoch, 2 to 3 seeds" in texts(figure.canvas)
        assert f"Only 1 of {5 + len(more)} runs were tested" in figure.caption
    (figure,) = drawn("qt_gap", *make.pair((0,), test=True))
    assert "test split, 1 seed" in texts(figure.canvas)


def test_storage_ratios_are_over_the_float_parameters(make):
    record = make.inspect()
    record["ways"]["float_master"]["total"] += 10**6  # buffers are not parameters
    assert (
        ratio(records.parse(record), "paper") == 4 * 25_557_032 / record["ways"]["paper"]["total"]
    )
    (figure,) = drawn("storage", record, make.inspect("resnet18", 11_689_512))
    assert "× smaller" in texts(figure.canvas)
    assert "× larger" in figure.alt


def test_pareto_front_keeps_only_points_that_are_not_dominated():
    points = [(1, 5.0), (2, 4.0), (3, 9.0), (3, 8.0), (4, 9.0)]
    assert pareto.pareto_front(points) == [(1, 5.0), (3, 9.0)]


def test_identical_figures_give_identical_files(tmp_path, make):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (figure,) = drawn("qt_gap", *make.pair())
        style.write(figure, tmp_path / name)
    for name in ("qt_gap_resnet20_cifar_cifar10.png", "qt_gap_resnet20_cifar_cifar10.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
