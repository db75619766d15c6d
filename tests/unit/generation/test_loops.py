"""Texts that repeat themselves, and those that only seem to."""

import pytest

from lckv.generation.loops import is_looping


@pytest.mark.parametrize("period", [1, 2, 5, 8, 31, 32])
def test_a_tail_that_comes_three_times_is_a_loop(period):
    cycle = list(range(period))
    loop = [99, 98] + cycle * max(3, -(-24 // period))
    assert is_looping(loop) and is_looping([str(token) for token in loop])
    assert is_looping(loop + cycle[: period // 2])  # wherever it stops
    assert not is_looping([*loop, 99])


def test_few_repeats_and_long_ones_are_no_loop():
    assert not is_looping([])
    assert not is_looping(list(range(8)) * 2)
    assert not is_looping([0] * 23) and is_looping([0] * 24)
    assert not is_looping([99, *range(1, 10), *range(10), *range(10)])  # 29 of 30
    assert not is_looping(list(range(33)) * 5)
