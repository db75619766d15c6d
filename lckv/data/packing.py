"""Packing: documents of any length become blocks of equal length. Numpy only.

Documents are laid end to end and cut every `block_size` tokens. The part of one document in one block is a *piece*. A
document that is longer than what is left of its block goes on in the next as a new piece: the tokens before the cut
cannot be seen from there, so position ids restart at 0 at every piece, not only at a document's first token. That is
how a model tells the pieces of a block apart (no attention from one to another).

Nothing is predicted across pieces: the label of each piece's first token is `IGNORE_INDEX`. (Models shift labels
themselves: label *i* is what position *i - 1* predicts.) So `position_id == 0` and "not predicted" are the same thing,
and only tokens and position ids are stored.
"""

from __future__ import annotations

import numpy as np

IGNORE_INDEX = -100

TOKEN = np.dtype([("id", np.uint32), ("is_start", np.bool_), ("num_bytes", np.uint32)])
"""One token: its id, whether a document starts with it, and how many UTF-8 bytes of the text it stands for."""


def mark_document(ids: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
    """The tokens of one document, `(num_tokens,)` of dtype [`TOKEN`], the first marked as its start."""
    tokens = np.zeros(len(ids), TOKEN)
    tokens["id"] = ids
    tokens["num_bytes"] = num_bytes
    tokens["is_start"][:1] = True
    return tokens


def position_ids_of(is_start: np.ndarray) -> np.ndarray:
    """Position of every token in its piece.

    Args:
        is_start: `(num_blocks, block_size)`, true where a document starts.

    Returns:
        `(num_blocks, block_size)`, 0 where a document or a block starts, else one more than to the left.
    """
    indices = np.arange(is_start.shape[1])
    start_of_piece = np.maximum.accumulate(np.where(is_start, indices, 0), axis=1)
    return indices - start_of_piece


def labels_of(input_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
    """What is to be predicted, of the shape of both: the tokens, and `IGNORE_INDEX` where a piece starts."""
    return np.where(position_ids == 0, IGNORE_INDEX, input_ids.astype(np.int64))


class Packer:
    """Lays tokens end to end and cuts them into blocks; what does not fill a block waits for more.

    Args:
        block_size: tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._rest = np.zeros(0, TOKEN)

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """Adds `tokens` `(num_tokens,)` and returns the blocks that are now full, `(num_blocks, block_size)`."""
        tokens = np.concatenate([self._rest, tokens])
        num_whole = len(tokens) - len(tokens) % self.block_size
        self._rest = tokens[num_whole:].copy()
        return tokens[:num_whole].reshape(-1, self.block_size)

    def pad(self, pad_token_id: int) -> np.ndarray:
        """Returns the tokens that wait as one padded block, `(1, block_size)`, or no block, `(0, block_size)`.

        Every padding token is a document of its own: it is predicted by nothing and seen by nothing.
        """
        padding = np.zeros(-len(self._rest) % self.block_size, TOKEN)
        padding["id"] = pad_token_id
        padding["is_start"] = True
        return self.add(padding)
