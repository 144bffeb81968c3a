"""Intervals against scipy.stats, and their wording."""

import pytest
from fixtures.records import runs
from scipy import stats

from tq_lightning.report.stats import difference, mean_interval, number, split_of


def test_mean_interval_uses_students_t():
    values = [86.1, 86.9, 85.7, 86.4]
    got = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert got.ends == pytest.approx((low, high))
    assert got.text() == "86.3 ± 0.8"


def test_one_seed_has_no_interval():
    got = mean_interval([80.0])
    assert got.half is None
    assert got.text() == "80.0"


def test_difference_is_paired_only_if_seeds_match():
    a, b = {0: 80.0, 1: 82.0, 2: 85.0}, {0: 79.5, 1: 81.4, 2: 84.6}
    paired = difference(a, b)
    interval = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval()
    assert paired.how == "paired"
    assert paired.ends == pytest.approx(tuple(interval))
    assert paired.sign == 1
    welch = difference(a, {3: 79.5, 4: 81.4, 5: 84.6})
    interval = stats.ttest_ind(
        list(a.values()), list(b.values()), equal_var=False
    ).confidence_interval()
    assert welch.how == "Welch"
    assert welch.ends == pytest.approx(tuple(interval))
    assert welch.sign == 0  # the same numbers, significant only if paired


def test_wording_follows_the_interval():
    above = difference({0: 2.0, 1: 2.1}, {0: 1.0, 1: 1.1}).words("a", "b")
    assert above == "a is above b by 1.00 points [+1.00, +1.00], paired"
    nothing = difference({0: 1.0, 1: 2.0}, {0: 2.0, 1: 1.0}).words("a", "b")
    assert nothing.startswith("no difference shown, a - b = +0.00 points [-12.7")
    one = difference({0: 1.0}, {0: 2.0})
    assert "one seed: no interval" in one.words("a", "b")
    assert one.verdict() == "one seed: no interval"
    assert one.sign == 0
    assert difference({0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.0}).verdict() == "a below b"


def test_difference_of_equal_values_is_zero():
    same = difference({0: 5.0, 1: 5.0}, {2: 5.0, 3: 5.0})
    assert same.verdict() == "no difference shown"


def test_number_has_no_negative_zero():
    assert number(-0.04) == "0.0"
    assert number(-0.04, sign="+") == "+0.0"
    assert number(-0.06) == "-0.1"


def test_test_split_is_used_only_if_every_run_has_it(make):
    with_test, without = make.run(test=True), make.run(seed=1)
    made = runs(with_test, without)
    assert split_of(made[:1]) == "test"
    assert split_of(made) == "val"
    del with_test["test"]["metrics"]["test/acc1_truncate_w3"]
    assert split_of(runs(with_test)) == "val"
