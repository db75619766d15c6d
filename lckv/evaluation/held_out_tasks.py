"""Two tasks for LM-Harness, made of the held-out books of the embedded text whenever they run.

Each is a function that a YAML file in `tasks/` names as its `custom_dataset`. The documents are always the same, in
the same order, which is drawn once for all: so the first few, which `harness.limit` takes, come from all the books.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from lckv.config import DataConfig
from lckv.data.sources import build_source

NUM_DOCUMENTS = 500
NUM_EXAMPLES = 16
"""How many more documents there are to take examples from (`harness.num_fewshot`)."""

NUM_CHOICES = 4
MIN_LETTERS = 4
"""Shorter words are seldom names or things."""

_PASSAGE_VERSES = 5
_NUM_VERSES_OF_WORD = range(2, 21)  # beyond, it is mostly words such as "shall"; below, often a name seen nowhere else
_NUM_SIMILAR = 50  # words nearest in length, at least, from which the wrong ones are drawn
_WORD = re.compile(r"[A-Za-z]+")
_LAST_WORD = re.compile(r"\s([A-Za-z]+)[^A-Za-z\s]*$")


@dataclass(frozen=True)
class Verse:
    """A verse, and those before it in its chapter.

    Attributes:
        text: the verse.
        before: at most five verses that it follows, one per line.
    """

    text: str
    before: str


def last_word(**_: Any) -> Any:
    """Documents of `lckv_last_word`: the text up to a verse's last word, and that word.

    Only words of four letters or more that occur earlier in the text, so that a model can know them from what it has
    read; verses that begin a chapter are left out.
    """
    return _splits(_last_words())


def cloze(**_: Any) -> Any:
    """Documents of `lckv_cloze`: the text up to a gap, and four words to fill it, each with the rest of the verse.

    The gap is a word of four letters or more, neither first nor last, that 2 to 20 verses hold. The three wrong words
    are from other verses: written as large or small, about as long, not in the text, and drawn as often as they occur.
    The right one stands at each of the four places equally often.
    """
    return _splits(_clozes())


@cache  # reading the whole text takes longer than making a task of it
def _verses() -> tuple[Verse, ...]:
    chapters = [
        document.split("\n") for document, is_held_out in build_source(DataConfig()).documents() if is_held_out
    ]
    return tuple(
        Verse(line, "\n".join(lines[max(0, index - _PASSAGE_VERSES) : index]))
        for lines in chapters
        for index, line in enumerate(lines)
    )


def _splits(documents: Iterator[dict[str, Any]]) -> Any:
    from datasets import Dataset, DatasetDict  # slow to import

    sizes = {"test": NUM_DOCUMENTS, "fewshot": NUM_EXAMPLES}
    return DatasetDict({name: Dataset.from_list(list(islice(documents, size))) for name, size in sizes.items()})


def _last_words() -> Iterator[dict[str, Any]]:
    verses = list(_verses())
    random.Random(0).shuffle(verses)
    for verse in verses:
        match = _LAST_WORD.search(verse.text)
        if match is None or not verse.before:
            continue
        context, word = f"{verse.before}\n{verse.text[: match.start()]}", match.group(1)
        if len(word) >= MIN_LETTERS and word.lower() in _words_of(context):
            yield {"context": context, "word": word}


def _clozes() -> Iterator[dict[str, Any]]:
    counts = _count_verses_of_words()
    verses, draw = list(_verses()), random.Random(0)
    draw.shuffle(verses)
    number = 0
    for verse in verses:
        gaps = [match for match in _inner_words(verse.text) if match.group() in counts]
        if gaps:
            yield _cloze(verse, draw.choice(gaps), counts, draw, gold=number % NUM_CHOICES)
            number += 1


def _count_verses_of_words() -> dict[str, int]:
    """How many verses hold each word that may be asked for, in alphabetical order."""
    counts = Counter(word for verse in _verses() for word in {*_WORD.findall(verse.text)} if len(word) >= MIN_LETTERS)
    return {word: count for word, count in sorted(counts.items()) if count in _NUM_VERSES_OF_WORD}


def _inner_words(text: str) -> list[re.Match[str]]:
    """Words with a space before them, as lm-eval puts one there; the first and the last one left out."""
    return [match for match in list(_WORD.finditer(text))[1:-1] if text[match.start() - 1] == " "]


def _cloze(verse: Verse, gap: re.Match[str], counts: dict[str, int], draw: random.Random, gold: int) -> dict[str, Any]:
    known = _words_of(f"{verse.before} {verse.text}")
    candidates = _wrong_words(gap.group(), known, counts, draw)
    candidates.insert(gold, gap.group())
    return {
        "context": f"{verse.before}\n{verse.text[: gap.start()]}".strip(),
        "choices": [candidate + verse.text[gap.end() :] for candidate in candidates],
        "gold": gold,
    }


def _wrong_words(word: str, known: set[str], counts: dict[str, int], draw: random.Random) -> list[str]:
    """Words like `word` that are not among the `known` ones."""
    distances = {
        other: abs(len(other) - len(word))
        for other in counts
        if other[0].isupper() == word[0].isupper() and other.lower() not in known
    }
    largest = sorted(distances.values())[:_NUM_SIMILAR][-1]
    similar = [other for other, distance in distances.items() if distance <= largest]
    # As often as they occur, as the right one is: else the most common of the four would mostly be right.
    ranks = {other: draw.random() ** (1 / counts[other]) for other in similar}
    return sorted(similar, key=lambda other: ranks[other])[1 - NUM_CHOICES :]


def _words_of(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}
