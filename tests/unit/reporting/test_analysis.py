"""Tests by hand, the Pareto front, the budgets, and sentences that claim no more than the seeds allow."""

import pytest
from pandas import DataFrame
from scipy import stats

from lckv.reporting.analysis import analyse, budgets_of, pareto_front, show_fraction
from lckv.reporting.metrics import Comparison, adjust, compare, summarize
from lckv.reporting.runs import read_runs
from lckv.reporting.sentences import answers, show_p, status
from tests.unit.reporting.sweeps import write_failure, write_run


def test_mean_and_sample_standard_deviation():
    summary = summarize([1.0, 2.0, None, 4.0])
    assert (summary.mean, summary.n) == (pytest.approx(7 / 3), 3)
    assert summary.std == pytest.approx((7 / 3) ** 0.5)
    assert summarize([3.0]).std is None
    assert summarize([]) is None
    assert summarize([1e200, 3e200]).std == pytest.approx(2**0.5 * 1e200)  # whose squares no float can hold


def test_equal_seeds_are_paired_in_whatever_order_they_come():
    comparison = compare({0: 1.0, 1: 2.0, 2: 3.1}, {2: 3.0, 0: 0.8, 1: 1.9})
    assert comparison.test == "paired t-test"
    assert comparison.p == pytest.approx(stats.ttest_rel([1.0, 2.0, 3.1], [0.8, 1.9, 3.0]).pvalue)
    assert comparison.difference == pytest.approx(0.4 / 3)
    # Differences 1 and 3: mean 2, standard error 1, t = 2 at one degree of freedom: p = 1 - 2 atan(2) / pi.
    assert compare({0: 1.0, 1: 3.0}, {0: 0.0, 1: 0.0}).p == pytest.approx(0.2951672)


def test_other_seeds_get_welchs_test():
    comparison = compare({0: 1.0, 1: 2.0}, {0: 3.0, 1: 3.5, 2: 5.0})
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
    tested = [Comparison(1.0, "paired t-test", p) for p in (0.01, 0.04, 0.03)]
    untested = Comparison(1.0, "one seed: no test")
    adjusted = adjust([None, tested[0], untested, *tested[1:]])
    assert adjusted[0] is None and adjusted[2] == untested
    assert [adjusted[place].adjusted_p for place in (1, 3, 4)] == pytest.approx([0.03, 0.06, 0.06])
    assert [each.is_significant for each in adjusted[1:]] == [True, False, False, False]
    assert [each.adjusted_p for each in adjust([Comparison(1.0, "", p) for p in (0.6, 0.7)])] == [1.0, 1.0]


def test_the_front_by_hand():
    points = [(8, 1.0), (4, 1.2), (4, 1.1), (2, 1.5), (3, 1.6), (6, 1.1)]
    front = pareto_front(DataFrame(points, columns=["written", "cost"]))
    assert front.values.tolist() == [[2, 1.5], [4, 1.1], [8, 1.0]]
    front = pareto_front(DataFrame([(x, -y) for x, y in points], columns=["written", "cost"]))  # more is better
    assert front.values.tolist() == [[2, -1.5], [3, -1.6]]


def test_budgets_are_what_patterns_need_or_halves_where_these_are_many():
    assert budgets_of([1, 0.5, 0.5, 0.375]) == [1, 0.5, 0.375]
    many = [written / 8 for written in (8, 7, 6, 5, 4.5, 3.5, 3, 1.5)]
    assert budgets_of(many) == [1, 0.5, 0.25]  # nobody needs between 3/16 and 1/4
    assert budgets_of([]) == []


def test_fractions_and_p_values_as_one_says_them():
    assert [show_fraction(each) for each in (1.0, 0.375, 1 / 3, 0.12345)] == ["1", "3/8", "1/3", "0.123"]
    assert [show_p(p) for p in (0.0004, 0.0123, 0.123, None)] == ["p < 0.001", "p = 0.012", "p = 0.12", "–"]


def analysed(folder):
    return analyse(read_runs(folder), folder)


def sentences(folder):
    return [str(answer) for answer in answers(analysed(folder))]


def write(folder, sharing, *values):
    for seed, value in enumerate(values):
        write_run(folder / f"{sharing}{seed}", sharing, seed, eval_bits_per_byte=value)


def test_a_clear_lead_and_one_within_the_noise(tmp_path):
    write(tmp_path, "llama", 1.0, 1.01, 1.02)
    write(tmp_path, "cla", 1.1, 1.11, 1.1201)
    write(tmp_path, "mix_attention", 1.1, 1.2, 1.12)
    assert sentences(tmp_path) == [
        "With all of Llama's KV bytes (8,192 per token): llama is best, with 1.0100 ± 0.0100 bits per byte over 3 "
        "seeds; its lead over the next, cla (1.1100 ± 0.0101), is more than the noise of the seeds (p < 0.001).",
        "Up to 1/2 of Llama's KV bytes (4,096 per token): cla is best, with 1.1100 ± 0.0101 bits per byte over 3 "
        "seeds; its lead over the next, mix_attention (1.1400 ± 0.0529), is within the noise of the seeds (p = 0.42).",
    ]


def test_one_seed_is_no_test_and_a_small_budget_may_be_best_in_a_large_one(tmp_path):
    write(tmp_path, "cla", 1.2)
    write(tmp_path, "pizza_bottom", 1.1)
    assert sentences(tmp_path) == [
        "From 1/2 of Llama's KV bytes down to 1/4 (4,096 to 2,048 per token): pizza_bottom is best (it needs 1/4), "
        "with 1.1000 bits per byte over 1 seed; the next is cla (1.2000); one seed: no test."
    ]


def test_equal_ones_are_level(tmp_path):
    write(tmp_path, "cla", 1.2)
    write(tmp_path, "mix_attention", 1.2)
    assert sentences(tmp_path)[0].endswith("over 1 seed; level with mix_attention (1.2000).")


def test_one_run_is_best_of_nothing(tmp_path):
    write_run(tmp_path / "a")
    report = analysed(tmp_path)
    assert answers(report) == []
    assert status(report) == "1 run: 1 finished. No two patterns can be compared."


def test_where_all_runs_failed(tmp_path):
    write_failure(tmp_path / "a")
    write_failure(tmp_path / "b")
    report = analysed(tmp_path)
    assert status(report) == "2 runs: 0 finished, 2 failed. No run has finished, so there is no figure to show."


def test_tests_against_the_best_are_adjusted_within_the_budget(tmp_path):
    write(tmp_path, "cla", 1.1, 1.11, 1.12)
    write(tmp_path, "lckv", 1.2, 1.22, 1.21)
    write(tmp_path, "sandwich_bottom", 1.21, 1.22, 1.25)
    (cohort,) = analysed(tmp_path).cohorts
    large, small = cohort.budgets
    p_values = sorted(test.p for test in large.versus_best.values())
    assert sorted(test.adjusted_p for test in large.versus_best.values()) == pytest.approx(
        [2 * p_values[0], max(2 * p_values[0], p_values[1])]
    )
    (test,) = small.versus_best.values()
    assert (small.best.label, test.p) == ("lckv", test.adjusted_p)
