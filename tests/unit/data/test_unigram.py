"""The unigram baseline, against the sum written out."""

import math

import numpy as np
import pytest

from lckv.data.dataset import unigram_loss


def test_add_one_smoothing_by_hand() -> None:
    train = np.array([3, 1, 0, 0])
    validation = np.array([1, 1, 0, 1])
    probabilities = [4 / 8, 2 / 8, 1 / 8]
    loss = -sum(map(math.log, probabilities)) / 3
    assert unigram_loss(train, validation) == pytest.approx(loss)


def test_uniform_counts_leave_all_of_the_vocabulary_open() -> None:
    assert unigram_loss(np.full(50, 9), np.arange(50)) == pytest.approx(math.log(50))
