"""Bytes with units."""

import pytest

from lckv.errors import UserError
from lckv.utils.byte_sizes import parse_bytes


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
