"""The Pareto front, the budgets, and sentences that claim no more than the seeds allow."""

import pytest

from lckv.reporting.analysis import analyse
from lckv.reporting.budgets import Candidate, budgets_of, show_fraction, within
from lckv.reporting.collecting import Run, read_runs
from lckv.reporting.grouping import Group
from lckv.reporting.metrics import Metric, result_metric
from lckv.reporting.pareto import pareto_front
from lckv.reporting.sentences import answers, show_p, status
from lckv.reporting.statistics import Summary
from tests.unit.reporting.sweeps import write_failure, write_run

BITS = result_metric("bits_per_byte")
ACCURACY = Metric("recall:accuracy", "recall: accuracy", lambda run: None)


def candidate(written: float, quality: float) -> Candidate:
    return Candidate(Group("", (Run("x"),), {}, {}, {}), written, written / 8, Summary(quality, None, 1))


def test_the_front_by_hand():
    points = [(8, 1.0), (4, 1.2), (4, 1.1), (2, 1.5), (3, 1.6), (6, 1.1)]
    front = pareto_front([candidate(*point) for point in points], BITS)
    assert [(each.written, each.quality.mean) for each in front] == [(2, 1.5), (4, 1.1), (8, 1.0)]
    front = pareto_front([candidate(*point) for point in points], ACCURACY)  # where more is better
    assert [(each.written, each.quality.mean) for each in front] == [(2, 1.5), (3, 1.6)]
    assert pareto_front([], BITS) == []


def test_budgets_are_what_patterns_need_or_halves_where_these_are_many():
    assert budgets_of([candidate(written, 1) for written in (8, 4, 4, 3)]) == [1, 0.5, 0.375]
    many = [candidate(written, 1) for written in (8, 7, 6, 5, 4.5, 3.5, 3, 1.5)]
    assert budgets_of(many) == [1, 0.5, 0.25]  # nobody needs between 3/16 and 1/4
    assert len(within(many, 0.5)) == 3
    assert budgets_of([]) == []


@pytest.mark.parametrize(("fraction", "text"), [(1.0, "1"), (0.375, "3/8"), (1 / 3, "1/3"), (0.12345, "0.123")])
def test_fractions_as_one_says_them(fraction, text):
    assert show_fraction(fraction) == text


def test_p_values_as_papers_write_them():
    assert [show_p(p) for p in (0.0004, 0.0123, 0.123, None)] == ["p < 0.001", "p = 0.012", "p = 0.12", "–"]


def sentences(folder):
    return [str(answer) for answer in answers(analyse(read_runs(folder), folder))]


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
    report = analyse(read_runs(tmp_path), tmp_path)
    assert answers(report) == []
    assert status(report) == "1 run: 1 finished. No two patterns can be compared."


def test_where_all_runs_failed(tmp_path):
    write_failure(tmp_path / "a")
    write_failure(tmp_path / "b")
    report = analyse(read_runs(tmp_path), tmp_path)
    assert status(report) == "2 runs: 0 finished, 2 failed. No run has finished, so there is no figure to show."


def test_tests_against_the_best_are_adjusted_within_the_budget(tmp_path):
    write(tmp_path, "cla", 1.1, 1.11, 1.12)
    write(tmp_path, "lckv", 1.2, 1.22, 1.21)
    write(tmp_path, "sandwich_bottom", 1.21, 1.22, 1.25)
    (cohort,) = analyse(read_runs(tmp_path), tmp_path).cohorts
    large, small = cohort.budgets
    p_values = sorted(test.p for test in large.versus_best.values())
    assert sorted(test.adjusted_p for test in large.versus_best.values()) == pytest.approx(
        [2 * p_values[0], max(2 * p_values[0], p_values[1])]
    )
    (test,) = small.versus_best.values()
    assert (small.best.group.label, test.p) == ("lckv", test.adjusted_p)
