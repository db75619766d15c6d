"""The one exception that means "you asked for something that cannot be": shown as one line, exit code 2."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave. Entry points print it as one line, without a traceback, and exit with 2."""


def first_line(error: BaseException) -> str:
    """What an error says, as far as it fits into a line of ours; its type, if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of the machine or of an accelerator; torch has no type for the former."""
    text = str(error)
    return isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text


def near_miss(given: str, allowed: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the allowed name nearest to `given`, or an empty string."""
    matches = get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def near_file(path: Path) -> str:
    """The same for a file that is not there, among what lies beside it."""
    return near_miss(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])


def check_whole_number(key: str, value: object, minimum: int = 1, maximum: int | None = None) -> None:
    """Refuses what is not a whole number of `minimum` or more, and of `maximum` or less where there is one.

    Raises:
        UserError: naming the key, as the user writes it.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < minimum
        or (maximum is not None and value > maximum)
    ):
        allowed = f"{minimum} or more" if maximum is None else f"{minimum} to {maximum}"
        raise UserError(f"{key}={value!r}: allowed is a whole number, {allowed}")


def check_positive(key: str, value: float) -> None:
    """Refuses what is not above zero, or infinite.

    Raises:
        UserError: naming the key, as the user writes it.
    """
    if not 0 < value < math.inf:
        raise UserError(f"{key}={value!r}: allowed is a number above 0")


def check_choice(key: str, value: object, allowed: Iterable[object]) -> None:
    """Refuses what is none of the `allowed` names.

    Raises:
        UserError: naming the key, as the user writes it, and the nearest name.
    """
    choices = list(allowed)
    if value not in choices:
        names = [str(choice) for choice in choices]
        hint = near_miss(value, names) if isinstance(value, str) else ""
        raise UserError(f"{key}={value!r}: allowed are {', '.join(names)}{hint}")
