"""Rows of different lengths in one tensor."""

import torch

from lckv.utils.padding import pad_left, positions


def test_rows_are_padded_to_the_longest_or_as_told():
    tokens, mask = pad_left([[5, 6, 7], [8]], 9)
    assert tokens.tolist() == [[5, 6, 7], [9, 9, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert pad_left([[5], [6]], 9)[1] is None
    tokens, mask = pad_left([[5], [6]], 9, 2)
    assert tokens.tolist() == [[9, 5], [9, 6]] and mask.tolist() == [[0, 1], [0, 1]]


def test_padding_has_no_positions_of_its_own():
    assert positions(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
