"""The simplest language model, as the baseline that a trained one is printed beside."""

from __future__ import annotations

import math

import numpy as np


def count_tokens(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often every token occurs in `token_ids`: `(vocab_size,)`."""
    return np.bincount(token_ids.ravel(), minlength=vocab_size)


def unigram_loss(train_counts: np.ndarray, validation_counts: np.ndarray) -> float:
    """Mean negative log-likelihood, in nats per token, of the validation tokens under a unigram model.

    The model knows how often each token occurs in the training text, and nothing of the tokens before. One is added
    to every count, so that no token is impossible.

    Args:
        train_counts: `(vocab_size,)`, how often each token is predicted in training.
        validation_counts: `(vocab_size,)`, the same in validation.
    """
    smoothed = train_counts.astype(np.float64) + 1
    log_probabilities = np.log(smoothed / smoothed.sum())
    return float(-(validation_counts * log_probabilities).sum() / validation_counts.sum())


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """Turns nats per token into bits per byte of text, which does not depend on the tokenizer."""
    return loss * num_tokens / (num_bytes * math.log(2))
