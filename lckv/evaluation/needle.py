"""Needle in a haystack: whether a model finds a sentence again, by the length of the text and the sentence's place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch

from lckv.charts import save_chart
from lckv.config import EvaluationConfig, NeedleConfig
from lckv.console import track
from lckv.errors import UserError
from lckv.evaluation.evaluations import EVALUATIONS, Subject
from lckv.evaluation.haystack import NUM_CANDIDATES, Haystack, NeedlePrompt
from lckv.evaluation.heatmap import draw_needle
from lckv.evaluation.perplexity import in_eval_mode
from lckv.evaluation.sliding import validation_documents


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


@EVALUATIONS.register("needle")
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
    with in_eval_mode(subject.model):
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
