"""Needle in a haystack: whether a model finds a sentence again, by the length of the text and the sentence's place."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from lckv.config import EvaluationConfig, NeedleConfig
from lckv.data.tokenizer import text_prefix
from lckv.errors import UserError
from lckv.evaluation.evaluations import Subject
from lckv.evaluation.text import validation_documents
from lckv.utils.charts import draw_cells, new_chart, save_chart
from lckv.utils.console import track

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
        self._prefix = text_prefix(tokenizer)
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
        """Tokens of words that are nowhere in the text, not even in another word, nor in each other."""
        written = f"{self._tokenizer.decode(text)}{_BEGINNING}".lower()
        absent: list[str] = []
        for word in generator.sample(list(self._words), len(self._words)):
            if len(absent) == NUM_CANDIDATES:
                break
            if word not in written and not any(word in other or other in word for other in absent):
                absent.append(word)
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


class Scores(NamedTuple):
    """How prompts of one length and depth are answered, as means over them.

    Attributes:
        accuracy: how often greedy decoding says the word.
        choice_accuracy: how often the word is the likeliest of the candidates.
        log_probability: of the word, in nats.
    """

    accuracy: float
    choice_accuracy: float
    log_probability: float


def needle(subject: Subject, cfg: EvaluationConfig) -> dict[str, Any]:
    """Hides a word in held-out text and asks for it at the end (Kamradt 2023, "Needle in a haystack").

    The needle, "The secret word of the tower is WORD.", and the question, its beginning, are in the words of the
    tokenizer; the candidates are words of the text that are not in the haystack. Text and words depend on the seed,
    the length and the number of the sample, so they are the same at every depth, and for every model with the same
    tokenizer.

    Returns:
        `accuracy`, `choice_accuracy` and `log_probability` (see [`Scores`]), one row per depth with a number for each
        length, and their means as `mean_accuracy` and so on, beside `lengths`, `depths`, the `chance` of the choice,
        `num_samples` and `seed`. Their picture is `needle.png` in the subject's folder.

    Raises:
        UserError: for settings out of range, and for text too short or too poor in words.
    """
    settings = cfg.needle
    texts = validation_documents(subject.data)
    haystack = Haystack(
        subject.tokenizer, texts, max(settings.lengths or [subject.default_context_length]), subject.key_prefix
    )
    lengths = _lengths(settings, haystack, subject)
    grid = [(depth, length) for depth in settings.depths for length in lengths]
    scores = []
    for depth, length in track(grid, "needle in a haystack", len(grid)):
        seeds = [f"needle {subject.seed} {length} {number}" for number in range(settings.num_samples)]
        prompts = [haystack.hide(length, depth, seed) for seed in seeds]
        scores.append(_score_prompts(subject, prompts, cfg.batch_size))
    means = Scores(*(fmean(values) for values in zip(*scores, strict=True)))
    rows = [scores[start : start + len(lengths)] for start in range(0, len(scores), len(lengths))]
    figures = {
        "lengths": lengths,
        "depths": list(settings.depths),
        **{name: [[getattr(cell, name) for cell in row] for row in rows] for name in Scores._fields},
        **{f"mean_{name}": value for name, value in means._asdict().items()},
        "chance": 1 / NUM_CANDIDATES,
        "num_samples": settings.num_samples,
        "seed": subject.seed,
    }
    if subject.folder is not None:
        save_chart(draw_needle(figures), subject.folder / "needle.png")
    return figures


def _lengths(settings: NeedleConfig, haystack: Haystack, subject: Subject) -> list[int]:
    """The lengths asked for, checked; or quarters of the longest, as far as they hold text and there is as much."""
    # The tokens of the answer but its last one stand behind the prompt.
    longest = subject.model.config.max_position_embeddings - (haystack.answer_length - 1)
    overhead, key = haystack.overhead, f"{subject.key_prefix}needle.lengths"
    most = len(haystack) + overhead
    for length in settings.lengths or ():
        given = f"{key}={length}: allowed is"
        if length <= overhead:
            raise UserError(f"{given} more than {overhead}, the tokens of needle and question")
        if length > longest:
            raise UserError(f"{given} at most {longest}, the positions that the model was made for")
        if length > most:
            raise UserError(f"{given} at most {most}, as there is no more validation text")
    if settings.lengths is not None:
        return list(settings.lengths)
    longest = min(longest, subject.default_context_length)
    lengths = [length for part in (1, 2, 3, 4) if overhead < (length := longest * part // 4) <= most]
    if not lengths:
        raise UserError(
            f"{key}: give some; needle and question are {overhead} tokens, the validation text is {len(haystack)}, "
            f"and the model was made for, or trained on, {longest} at once"
        )
    return lengths


def _score_prompts(subject: Subject, prompts: Sequence[NeedlePrompt], batch_size: int) -> Scores:
    """Answers prompts of one length."""
    scores = torch.zeros(len(prompts), NUM_CANDIDATES, dtype=torch.float64)
    num_exact = 0
    for (number, begun), log_probabilities in _score_rows(subject, prompts, batch_size):
        prompt = prompts[number]
        for place, word in enumerate(prompt.candidates):
            if word[:-1] == begun:
                scores[number, place] = log_probabilities.gather(1, torch.tensor(word)[:, None]).sum()
        if prompt.answer_ids[:-1] == begun:
            num_exact += tuple(log_probabilities.argmax(dim=1).tolist()) == prompt.answer_ids
    answers = torch.tensor([prompt.answer for prompt in prompts])
    num_chosen = int((scores.argmax(dim=1) == answers).sum())
    of_answers = scores.gather(1, answers[:, None])
    return Scores(num_exact / len(prompts), num_chosen / len(prompts), of_answers.mean().item())


def _score_rows(
    subject: Subject, prompts: Sequence[NeedlePrompt], batch_size: int
) -> Iterator[tuple[tuple[int, tuple[int, ...]], torch.Tensor]]:
    """Runs the model on each prompt with each beginning of a word behind it.

    For words of one token, that is the prompt alone; longer words share a row if they differ in their last token only.

    Yields:
        The prompt's number and the beginning, all tokens of a word but the last; and what the model expects for each
        token of the word, `(answer_length, vocab_size)`.
    """
    rows = [
        (number, begun)
        for number, prompt in enumerate(prompts)
        for begun in dict.fromkeys(word[:-1] for word in prompt.candidates)
    ]
    num_kept = len(prompts[0].answer_ids)
    num_cached = len(prompts[0].input_ids) - prompts[0].question_length
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        input_ids = torch.tensor([[*prompts[number].input_ids, *begun] for number, begun in batch])
        yield from zip(
            batch,
            subject.last_log_probabilities(input_ids, num_kept=num_kept, num_cached=num_cached),
            strict=True,
        )


def draw_needle(figures: Mapping[str, Any]) -> Figure:
    """Draws both accuracies over the length of the prompt and the depth of the needle, in colours from 0 to 1."""
    panels = {
        "accuracy": "greedy decoding says the word",
        "choice_accuracy": f"likeliest of {1 / figures['chance']:.0f} words (chance: {figures['chance']:.2g})",
    }
    lengths, depths = [f"{length:,}" for length in figures["lengths"]], [f"{depth:.0%}" for depth in figures["depths"]]
    size = 2 * (1.6 + 0.62 * max(4, len(lengths))), 1.5 + 0.42 * max(4, len(depths))
    figure, all_axes = new_chart(size, num_columns=len(panels), sharey=True)
    for axes, (name, subtitle) in zip(all_axes, panels.items(), strict=True):
        cells = draw_cells(axes, np.array(figures[name]), lengths, depths)
        axes.set_title(subtitle, loc="left", fontsize=10)
        axes.set_xlabel("prompt (tokens)")
    all_axes[0].set_ylabel("depth of the needle")
    figure.colorbar(cells, ax=all_axes, label=f"part of {figures['num_samples']} prompts")
    figure.suptitle("needle in a haystack", x=0.01, ha="left", fontsize=11)
    return figure
