"""Peak memory: known allocations, and the attention of a long prompt."""

import torch

from lckv.benchmarking.traffic import peak_bytes

CPU = torch.device("cpu")
MEGA = 1_000_000


def zeros(num_bytes):
    return torch.zeros(num_bytes, dtype=torch.uint8)


def test_the_peak_is_what_lives_at_once():
    def work(_):
        first = zeros(3 * MEGA)
        del first
        second, third = zeros(MEGA), zeros(MEGA)
        return second, third

    assert peak_bytes(work, CPU) == 3 * MEGA


def test_what_is_prepared_counts_as_long_as_it_lives_but_not_its_own_peak():
    def prepare():
        gone = zeros(9 * MEGA)
        del gone
        return [zeros(2 * MEGA)]

    assert peak_bytes(lambda kept: kept.append(zeros(MEGA)), CPU, prepare) == 3 * MEGA

    def replace(kept):
        kept.clear()
        kept.append(zeros(MEGA))

    assert peak_bytes(replace, CPU, prepare) == 2 * MEGA


def test_what_was_there_before_does_not_count():
    before = zeros(5 * MEGA)
    assert peak_bytes(lambda _: before.clone(), CPU) == 5 * MEGA
    assert peak_bytes(lambda _: before.zero_(), CPU) == 0
