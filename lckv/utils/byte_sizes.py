"""Bytes with units, and budgets of keys and values."""

from __future__ import annotations

import re
from typing import Any

from lckv.errors import UserError

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{kind}b": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for kind, base in (("", 1000), ("i", 1024))
}


def parse_bytes(value: Any, key: str) -> int:
    """Reads a number of bytes such as `4096`, `64MB` (a million bytes each) or `1.5GiB` (2^30 bytes each).

    Raises:
        UserError: if it cannot be read, or is not above zero; the message names `key`.
    """
    text = str(value).strip()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text, re.IGNORECASE | re.ASCII)
    unit = found[2].lower() if found else None
    if found is None or isinstance(value, bool) or unit not in _UNITS or float(found[1]) * _UNITS[unit] < 1:
        raise UserError(f"{key}={text}: allowed are bytes, with or without a unit: 1000000, 64MB, 64MiB, 1.5GB, 2GiB")
    number = found[1]
    return int(number) * _UNITS[unit] if number.isdigit() else int(float(number) * _UNITS[unit])


def parse_budget(value: Any) -> float | int:
    """Reads `budget`: a fraction of the KV as a float, or bytes per token as an int.

    Raises:
        UserError: if it is neither a number above 0 and below 1 nor a number of bytes.
    """
    text = str(value).strip()
    if value is None or isinstance(value, bool) or not re.match(r"\d|\.\d", text):
        raise UserError(
            f"budget={'null' if value is None else text}: allowed is a fraction of the model's KV above 0 and below "
            "1, such as 0.5, or bytes of KV per token, such as 12KiB"
        )
    is_number = re.fullmatch(r"\d*\.?\d*(e-?\d+)?", text) is not None
    if is_number and (float(text) <= 1 or not text.isdigit()):  # no one means one byte and a half
        if not 0 < float(text) < 1:
            raise UserError(f"budget={text}: allowed is a fraction above 0 and below 1, or bytes, such as 12KiB")
        return float(text)
    return parse_bytes(text, "budget")
