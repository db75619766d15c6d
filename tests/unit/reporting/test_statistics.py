"""Means, tests and their correction, against scipy and figures worked out by hand."""

import pytest
from scipy import stats

from lckv.reporting.statistics import Comparison, adjust, compare, holm, summarize


def test_mean_and_sample_standard_deviation():
    summary = summarize([1.0, 2.0, 4.0])
    assert (summary.mean, summary.n) == (pytest.approx(7 / 3), 3)
    assert summary.std == pytest.approx((7 / 3) ** 0.5)
    assert summarize([3.0]).std is None
    assert summarize([]) is None
    assert summarize([1e200, 3e200]).std == pytest.approx(2**0.5 * 1e200)  # whose squares no float can hold


def test_equal_seeds_are_paired_in_whatever_order_they_come():
    one, other = {0: 1.0, 1: 2.0, 2: 3.1}, {2: 3.0, 0: 0.8, 1: 1.9}
    comparison = compare(one, other)
    assert comparison.test == "paired t-test"
    assert comparison.p == pytest.approx(stats.ttest_rel([1.0, 2.0, 3.1], [0.8, 1.9, 3.0]).pvalue)
    assert comparison.difference == pytest.approx(0.4 / 3)


def test_paired_test_by_hand():
    """Differences 1 and 3: mean 2, standard error 1, t = 2 at one degree of freedom: p = 1 - 2 atan(2) / pi."""
    assert compare({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0}).p == pytest.approx(0.2951672)


def test_other_seeds_get_welchs_test():
    one, other = {0: 1.0, 1: 2.0}, {0: 3.0, 1: 3.5, 2: 5.0}
    comparison = compare(one, other)
    assert comparison.test == "Welch's t-test"
    assert comparison.p == pytest.approx(stats.ttest_ind([1.0, 2.0], [3.0, 3.5, 5.0], equal_var=False).pvalue)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ({0: 1.0}, {0: 2.0, 1: 2.1}, "one seed: no test"),
        ({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5}, "no spread: no test"),
        ({0: 1.0, 1: 1.0}, {2: 2.0, 3: 2.0}, "no spread: no test"),
    ],
)
def test_where_there_is_nothing_to_test_with(one, other, words):
    comparison = compare(one, other)
    assert (comparison.test, comparison.p, comparison.is_significant) == (words, None, False)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_only_tests_are_adjusted_for():
    tested, untested = Comparison(1.0, "paired t-test", 0.04), Comparison(1.0, "one seed: no test")
    adjusted = adjust([None, tested, untested, tested])
    assert adjusted[0] is None and adjusted[2] == untested
    assert [adjusted[1].adjusted_p, adjusted[3].adjusted_p] == [0.08, 0.08]
    assert not adjusted[1].is_significant
