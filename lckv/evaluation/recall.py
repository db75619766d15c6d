"""Multi-query associative recall: which value came with a key, for several keys of one sequence."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lckv.config import EvaluationConfig, RecallConfig
from lckv.data.tokenizer import text_prefix
from lckv.errors import UserError
from lckv.evaluation.evaluations import Subject
from lckv.utils.console import track


@dataclass(frozen=True)
class RecallSequence:
    """Pairs, then some of them again: `k1 v1 k2 v2 k3 v3 k2 v2 k1`, where `v1` is to come next.

    Attributes:
        input_ids: bos where the tokenizer has one, the pairs, and the queries with their answers but the last.
        values: the values of all pairs, in their order.
        asked: for each query, which pair it asks for.
    """

    input_ids: list[int]
    values: list[int]
    asked: list[int]

    @property
    def answers(self) -> list[int]:
        """The value that each query asks for."""
        return [self.values[pair] for pair in self.asked]


def recall_sequence(
    tokens: Sequence[int], num_pairs: int, num_queries: int, seed: str, prefix: list[int]
) -> RecallSequence:
    """Draws a sequence in which all keys and values differ.

    Args:
        tokens: what to draw from, at least twice as many as pairs.
        num_pairs: pairs of a key and a value.
        num_queries: how many of the pairs are asked for, each at most once.
        seed: what the sequence depends on.
        prefix: tokens before the pairs.
    """
    generator = random.Random(seed)
    drawn = generator.sample(tokens, 2 * num_pairs)
    asked = generator.sample(range(num_pairs), num_queries)
    queries = [token for pair in asked for token in drawn[2 * pair : 2 * pair + 2]]
    return RecallSequence([*prefix, *drawn, *queries[:-1]], drawn[1::2], asked)


def recall(subject: Subject, cfg: EvaluationConfig) -> dict[str, Any]:
    """Asks for the values of keys in random tokens (MQAR; Arora et al. 2023, "Zoology", arXiv 2312.04927).

    Other than there, queries follow each other without filling, and each has its answer behind it, as the pairs have:
    a model that was not trained on the task can take it up from them.

    Returns:
        `accuracy`, how often the value is the likeliest of all tokens, and `choice_accuracy`, how often it is the
        likeliest of the sequence's values, as means over `by_num_pairs` and `choice_by_num_pairs`; beside
        `chance_by_num_pairs` of the choice, `num_queries`, `num_samples` and `seed`.

    Raises:
        UserError: for settings out of range, of the model or the vocabulary.
    """
    settings = cfg.recall
    batches = [
        (num_pairs, sequences[start : start + cfg.batch_size])
        for num_pairs, sequences in _sequences(subject, settings).items()
        for start in range(0, len(sequences), cfg.batch_size)
    ]
    hits: defaultdict[int, list[tuple[bool, bool]]] = defaultdict(list)
    for num_pairs, batch in track(batches, "associative recall", len(batches)):
        hits[num_pairs] += _answer(subject, batch)
    exact, chosen = (  # by the number of pairs, which JSON wants as text
        {str(num_pairs): fmean(hit[which] for hit in of_these) for num_pairs, of_these in hits.items()}
        for which in (0, 1)
    )
    return {
        "accuracy": fmean(exact.values()),
        "choice_accuracy": fmean(chosen.values()),
        "by_num_pairs": exact,
        "choice_by_num_pairs": chosen,
        "chance_by_num_pairs": {str(num_pairs): 1 / num_pairs for num_pairs in hits},
        "num_queries": settings.num_queries,
        "num_samples": settings.num_samples,
        "seed": subject.seed,
    }


def _sequences(subject: Subject, settings: RecallConfig) -> dict[int, list[RecallSequence]]:
    """Sequences by the number of their pairs, which is checked; none depends on what else is asked for."""
    tokenizer, config = subject.tokenizer, subject.model.config
    tokens = ordinary_tokens(tokenizer, config.vocab_size)
    prefix = text_prefix(tokenizer)
    most_pairs = max(settings.num_pairs)
    given = f"{subject.key_prefix}recall.num_pairs={most_pairs}: allowed"
    if 2 * most_pairs > len(tokens):
        raise UserError(f"{given} is at most {len(tokens) // 2}, half of the vocabulary's tokens")
    longest = (config.max_position_embeddings - len(prefix) + 1) // 2 - settings.num_queries
    if most_pairs > longest:
        raise UserError(
            f"{given} with {settings.num_queries} queries is at most {longest}, "
            "by the positions that the model was made for"
        )
    return {
        num_pairs: [
            recall_sequence(tokens, num_pairs, settings.num_queries, f"recall {subject.seed} {num_pairs} {n}", prefix)
            for n in range(settings.num_samples)
        ]
        for num_pairs in settings.num_pairs
    }


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Tokens that stand for text and that a model of `vocab_size` tokens has, in order."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted(token for token in set(tokenizer.get_vocab().values()) - special if token < vocab_size)


def _answer(subject: Subject, sequences: list[RecallSequence]) -> list[tuple[bool, bool]]:
    """Whether each query of each sequence gets its value as the likeliest of all tokens, and of the values."""
    input_ids = torch.tensor([sequence.input_ids for sequence in sequences])
    num_kept = 2 * len(sequences[0].asked) - 1
    log_probabilities = subject.last_log_probabilities(
        input_ids, num_kept=num_kept, num_cached=input_ids.shape[1] - num_kept
    )[:, ::2]  # (batch, num_queries, vocab_size): the tokens between two queries are answers
    values = torch.tensor([sequence.values for sequence in sequences])[:, None]
    of_values = log_probabilities.gather(2, values.expand(-1, log_probabilities.shape[1], -1))
    asked = torch.tensor([sequence.asked for sequence in sequences])
    answers = torch.tensor([sequence.answers for sequence in sequences])
    is_exact, is_chosen = log_probabilities.argmax(dim=2) == answers, of_values.argmax(dim=2) == asked
    return list(zip(is_exact.flatten().tolist(), is_chosen.flatten().tolist(), strict=True))
