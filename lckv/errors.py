"""The one exception that means "you asked for something that cannot be": shown as one line, exit code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in what the user gave. Entry points print it as one line, without a traceback, and exit with 2."""


def near_miss(given: str, allowed: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the allowed name nearest to `given`, or an empty string."""
    matches = get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
