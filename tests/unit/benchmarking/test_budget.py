"""Bytes with units, and the batches that fit into them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lckv.benchmarking.budget import largest_batch
from lckv.byte_sizes import parse_bytes
from lckv.errors import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("12B", 12),
        ("64MB", 64 * 10**6),
        ("64mb", 64 * 10**6),
        ("64 MiB", 64 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("0.5KiB", 512),
        ("3TiB", 3 * 2**40),
        ("9007199254740993", 9007199254740993),  # more than a float can tell apart
    ],
)
def test_bytes_with_units(text, expected):
    assert parse_bytes(text, "kv_budget") == expected


@pytest.mark.parametrize("text", ["", "MB", "12XB", "-5MB", 0, "0.5B", "1e6", "nan", True, "64 M B", "１2MB"])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(UserError, match="^kv_budget=.*: allowed are bytes, with or without a unit"):
        parse_bytes(text, "kv_budget")


@given(st.integers(1, 10**6), st.integers(0, 10**8), st.integers(1, 5000))
def test_the_largest_batch_fits_and_one_more_does_not(per_sequence, budget, limit):
    batch_size = largest_batch(lambda size: size * per_sequence, budget, limit)
    assert batch_size == min(limit, budget // per_sequence)


def test_a_cache_that_grows_in_steps():
    assert largest_batch(lambda size: 100 * -(-size // 8), 250, 1000) == 16
