"""The unigram baseline, against the sum written out."""

import math

import numpy as np
import pytest

from lckv.data.unigram import bits_per_byte, count_tokens, unigram_loss


def test_add_one_smoothing_by_hand() -> None:
    train = count_tokens(np.array([[0, 0], [0, 1]]), vocab_size=4)
    validation = count_tokens(np.array([0, 1, 3]), vocab_size=4)
    probabilities = [4 / 8, 2 / 8, 1 / 8]
    loss = -sum(map(math.log, probabilities)) / 3
    assert unigram_loss(train, validation) == pytest.approx(loss)


def test_uniform_counts_leave_all_of_the_vocabulary_open() -> None:
    assert unigram_loss(np.full(50, 9), np.arange(50)) == pytest.approx(math.log(50))


def test_bits_per_byte() -> None:
    # 8 tokens of 2 bits each over 16 bytes of text.
    assert bits_per_byte(2 * math.log(2), num_tokens=8, num_bytes=16) == pytest.approx(1.0)
