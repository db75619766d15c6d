"""Prompts with one sentence hidden in a text, cut to an exact number of tokens."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lckv.errors import UserError

NUM_CANDIDATES = 10

_BEGINNING = " The secret word of the tower is"

# More text than this gives no other figures, only longer preparation.
_ENOUGH_TOKENS = 2**18

# With fewer words of one length in tokens, long haystacks would soon hold them all.
_ENOUGH_WORDS = 100

_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s)|(?=\n)")
_WORD = re.compile(r"[^\W\d_]{4,}")


@dataclass(frozen=True)
class NeedlePrompt:
    """A text in which a word is said once and asked for at the end.

    Attributes:
        input_ids: the whole prompt: bos where the tokenizer has one, the text with the needle in it, and the question.
        question_length: how many of the last tokens are the question, which is how the needle begins.
        candidates: the tokens of words, equally many each, of which none but the answer is in the prompt.
        answer: which of the candidates the needle holds.
    """

    input_ids: list[int]
    question_length: int
    candidates: list[tuple[int, ...]]
    answer: int

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The tokens that are right."""
        return self.candidates[self.answer]


class Haystack:
    """A text to hide needles in.

    Everything is put together from tokens, so that lengths are exact. A haystack ends with a sentence, for the
    question to follow it as text does, and begins wherever its length wants it to; the needle lies between sentences.

    Args:
        tokenizer: a fast tokenizer.
        texts: documents, joined in this order; no more are read than are of use.
        num_tokens: how long the longest haystack will be.
        key_prefix: what stands before the names of settings in error messages.

    Raises:
        UserError: if there are too few words to choose among.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], num_tokens: int, key_prefix: str = ""
    ) -> None:
        self._tokenizer = tokenizer
        self._key_prefix = key_prefix
        self._prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        (self._question,) = self._encode_after(".", [_BEGINNING])
        (self._end,) = self._encode_after(_BEGINNING, ["."])
        self._tokens: list[int] = []
        self._boundaries: list[int] = [0]
        words: set[str] = set()
        for text in texts:
            self._add(text)
            words.update(word for word in _WORD.findall(text) if word == word.lower())
            if len(self._tokens) >= max(num_tokens, _ENOUGH_TOKENS):
                break
        self._words = self._alike_words(sorted(words))
        self.answer_length = len(next(iter(self._words.values())))

    def __len__(self) -> int:
        """Tokens of the text, up to where its last sentence ends."""
        return self._boundaries[-1]

    @property
    def overhead(self) -> int:
        """Tokens of a prompt that are not text: bos, the needle and the question."""
        return len(self._prefix) + 2 * len(self._question) + self.answer_length + len(self._end)

    def hide(self, length: int, depth: float, seed: str) -> NeedlePrompt:
        """Makes a prompt.

        Args:
            length: tokens of the whole prompt: more than `overhead`, and at most that and the text.
            depth: from 0 (the needle comes first) to 1 (the question follows it); the boundary between sentences
                nearest to it is taken.
            seed: what text and words depend on; they are the same at every depth.

        Raises:
            UserError: if too few words are left that are not in the haystack.
        """
        # The depth is drawn from nothing: text, words and answer are the same wherever the needle lies.
        generator = random.Random(seed)
        num_tokens = length - self.overhead
        stop = generator.choice(self._boundaries[bisect_left(self._boundaries, num_tokens) :])
        text = self._tokens[stop - num_tokens : stop]
        candidates = self._draw_words(generator, text, length)
        answer = generator.randrange(NUM_CANDIDATES)
        place = self._nearest_boundary(stop - num_tokens, stop, depth)
        needle = [*self._question, *candidates[answer], *self._end]
        input_ids = [*self._prefix, *text[:place], *needle, *text[place:], *self._question]
        return NeedlePrompt(input_ids, len(self._question), candidates, answer)

    def _add(self, text: str) -> None:
        """Appends a document, and where its sentences end."""
        encoding = self._tokenizer(
            f"{text}\n",
            add_special_tokens=False,
            split_special_tokens=True,  # one that a text spells out is text
            return_offsets_mapping=True,
            verbose=False,
        )
        starts = np.array(encoding["offset_mapping"]).reshape(-1, 2)[:, 0]
        ends = [match.end() for match in _SENTENCE_END.finditer(f"{text}\n")]
        places = {len(self._tokens) + int(place) for place in np.searchsorted(starts, ends)}
        self._boundaries += sorted(places - {self._boundaries[-1]})
        self._tokens += encoding["input_ids"]

    def _encode_after(self, before: str, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text where it follows `before`: many tokenizers put something at the very beginning."""
        whole = [before, *(before + text for text in texts)]
        first, *others = self._tokenizer(whole, add_special_tokens=False)["input_ids"]
        return [token_ids[len(first) :] for token_ids in others]

    def _alike_words(self, words: list[str]) -> dict[str, tuple[int, ...]]:
        """Words with their tokens, all of the smallest number of tokens that enough of them have."""
        groups: defaultdict[int, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for word, tokens in zip(words, self._encode_after(_BEGINNING, [f" {word}" for word in words]), strict=True):
            groups[len(tokens)][word] = tuple(tokens)
        enough = [length for length, group in groups.items() if len(group) >= _ENOUGH_WORDS]
        chosen = groups[min(enough)] if enough else max(groups.values(), key=len, default={})
        if len(chosen) < NUM_CANDIDATES:
            raise UserError(
                f"{self._key_prefix}evals=needle: the validation text has {len(chosen)} words of equally many tokens "
                f"to choose among; allowed are {NUM_CANDIDATES} or more"
            )
        return chosen

    def _draw_words(self, generator: random.Random, text: list[int], length: int) -> list[tuple[int, ...]]:
        """Tokens of words that are nowhere in the text, not even in another word."""
        written = f"{self._tokenizer.decode(text)}{_BEGINNING}".lower()
        shuffled = generator.sample(list(self._words), len(self._words))
        absent = [word for word in shuffled if word not in written][:NUM_CANDIDATES]
        if len(absent) < NUM_CANDIDATES:
            raise UserError(
                f"{self._key_prefix}needle.lengths={length}: leaves {len(absent)} words of the validation text that "
                f"are not in the haystack; allowed are lengths that leave {NUM_CANDIDATES}, or give more text"
            )
        return [self._words[word] for word in absent]

    def _nearest_boundary(self, start: int, stop: int, depth: float) -> int:
        """The place between sentences, counted from `start`, that is nearest to `depth`."""
        first, last = bisect_left(self._boundaries, start), bisect_left(self._boundaries, stop)
        places = [0, *(boundary - start for boundary in self._boundaries[first : last + 1])]
        return min(places, key=lambda place: abs(place - depth * (stop - start)))
