"""Whether a text has begun to repeat itself, as the likeliest text of a small model does."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

LONGEST_PERIOD, FEWEST_REPEATS, SHORTEST_TAIL = 32, 3, 24
LONGEST_TAIL = max(LONGEST_PERIOD * FEWEST_REPEATS, SHORTEST_TAIL)
"""More of the text than this is not looked at."""


def is_looping(text: Sequence[Hashable]) -> bool:
    """Whether a text, of tokens or pieces, ends in few of them that follow one another again and again.

    They come three times at least, and the repeated tail has at least 24, so that three dots are no loop.
    """
    tail = list(text[-LONGEST_TAIL:])
    for period in range(1, LONGEST_PERIOD + 1):
        length = max(period * FEWEST_REPEATS, SHORTEST_TAIL)
        if length <= len(tail) and tail[-length:-period] == tail[period - length :]:
            return True
    return False
