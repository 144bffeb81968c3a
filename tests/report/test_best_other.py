"""The best other arm, below the paper's rows in tables, findings and figures."""

from fixtures.records import compare, perplexities

from tq_lightning.report.best_other import best_other
from tq_lightning.report.figures.accuracy import qt_gap as draw
from tq_lightning.report.findings import beyond_paper
from tq_lightning.report.tables import accuracy

SEEDS = (0, 1, 2)


def learned(make, offset, **more):
    """Return three runs with a learned range, `offset` points above the floor arm."""
    settings = {"model_normalizer": "learned", "model_ste": "identity", **more}
    return [make.run("floor", seed, offset=offset, **settings) for seed in SEEDS]


def test_a_better_arm_stands_below_the_paper_rows(make):
    found = compare(*make.pair(test=True), *learned(make, 3.0, test=True))
    table = accuracy.headline(found)
    names = [
        "round, quantized",
        "round, truncated",
        "floor, truncated",
        "best other arm, truncated",
    ]
    assert [row["weights"] for row in table.rows] == names
    assert table.rows[3]["2 bits [%]"][1] > table.rows[2]["2 bits [%]"][1]
    assert "floor with normalizer=learned, ste=identity (the only other arm)" in table.notes[0]
    finding = beyond_paper(found)
    assert "compared with floor truncated: better by 2.9 points at 1 bit, 3.1" in finding.answer
    assert ["floor truncated" in line for line in finding.lines] == [True, False]
    assert ["round quantized" in line for line in finding.lines] == [False, True]
    differences = accuracy.differences(found).rows
    assert len([row for row in differences if row["factor"] == "best other arm"]) == 3 * 8
    (figure,), _ = draw(found)
    assert "best other arm, truncated: " in figure.alt
    assert "the only other arm" in figure.caption


def test_a_worse_arm_is_not_shown(make):
    found = compare(*make.pair(), *learned(make, -3.0))
    assert len(accuracy.headline(found).rows) == 3
    assert beyond_paper(found) is None


def test_the_choice_among_several_arms_is_reported(make):
    arms = [*learned(make, 2.0), *learned(make, 4.0, model_scale="span")]
    found = compare(*make.pair(), *arms)
    best, note = best_other(found, found.by_quantizer[0])
    assert best["model.scale"] == "span"
    assert "chosen from 2 other arms on this split" in note


def test_only_arms_with_the_same_model_data_budget_and_codes_that_nest_count(make):
    others = [
        *learned(make, 9.0, model="resnet8_cifar"),
        *learned(make, 9.0, data_name="svhn"),
        *learned(make, 9.0, epochs=30),
        *learned(make, 9.0, model_widths=[8, 4]),
        *(make.run("round", s, offset=9.0, model_normalizer="learned") for s in SEEDS),
    ]
    found = compare(*make.pair(), *others)
    group = next(g for g in found.by_quantizer if g.first["model.normalizer"] == "tanh")
    assert best_other(found, group) is None


def test_lower_perplexity_is_better(make):
    base = [perplexities(record) for record in make.pair()]
    better = [perplexities(record) for record in learned(make, 3.0)]
    found = compare(*base, *better)
    assert best_other(found, found.by_quantizer[0]) is not None
    assert "better by" in beyond_paper(found).answer
    worse = compare(*base, *(perplexities(record) for record in learned(make, -3.0)))
    assert best_other(worse, worse.by_quantizer[0]) is None


def test_a_tested_arm_counts_on_the_validation_split_but_an_untested_one_not_on_the_test_split(
    make,
):
    found = compare(*make.pair(), *learned(make, 3.0, test=True))
    group = found.by_quantizer[0]
    assert group.split == "val" and best_other(found, group) is not None
    found = compare(*make.pair(test=True), *learned(make, 3.0))
    group = found.by_quantizer[0]
    assert group.split == "test" and best_other(found, group) is None
