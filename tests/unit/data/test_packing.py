"""Documents to blocks: nothing is lost, nothing is predicted across documents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lckv.data.packing import IGNORE_INDEX, TOKEN, Packer, labels_of, mark_document, position_ids_of

documents_of = st.lists(st.integers(min_value=1, max_value=40), min_size=1, max_size=12)


def make_documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents of the given lengths whose token ids, all together, count up from 0; token i stands for i bytes."""
    ids = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    return [mark_document(document, document) for document in ids]


def pack(documents: list[np.ndarray], block_size: int, pad_token_id: int = 7) -> np.ndarray:
    packer = Packer(block_size)
    return np.concatenate([*map(packer.add, documents), packer.pad(pad_token_id)])


@given(documents_of, st.integers(2, 17))
def test_blocks_laid_end_to_end_are_the_documents(lengths: list[int], block_size: int) -> None:
    documents = make_documents(lengths)
    blocks = pack(documents, block_size, pad_token_id=7)
    num_tokens = sum(lengths)
    assert blocks.shape == (-(-num_tokens // block_size), block_size)
    np.testing.assert_array_equal(blocks.ravel()[:num_tokens], np.concatenate(documents))
    padding = blocks.ravel()[num_tokens:]
    assert (padding["id"] == 7).all() and padding["is_start"].all() and not padding["num_bytes"].any()


@given(documents_of, st.integers(2, 17))
def test_position_ids_restart_where_documents_and_blocks_start_and_nowhere_else(
    lengths: list[int], block_size: int
) -> None:
    position_ids = position_ids_of(pack(make_documents(lengths), block_size)["is_start"])
    num_tokens = sum(lengths)
    starts = {0, *np.cumsum(lengths).tolist()} | set(range(0, num_tokens, block_size))
    expected = []
    for index in range(num_tokens):
        expected.append(0 if index in starts else expected[-1] + 1)
    expected += [0] * (position_ids.size - num_tokens)
    assert position_ids.ravel().tolist() == expected


@given(documents_of, st.integers(2, 17))
def test_labels_are_the_tokens_and_cross_no_boundary(lengths: list[int], block_size: int) -> None:
    blocks = pack(make_documents(lengths), block_size)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    document_of = np.append(document_of, np.full(blocks.size - len(document_of), -1)).reshape(blocks.shape)
    labels = labels_of(blocks["id"], position_ids_of(blocks["is_start"]))
    # A model shifts labels by one: position i - 1 predicts label i.
    predicted = labels[:, 1:] != IGNORE_INDEX
    same_document = (document_of[:, 1:] == document_of[:, :-1]) & (document_of[:, 1:] >= 0)
    np.testing.assert_array_equal(predicted, same_document)
    np.testing.assert_array_equal(labels[:, 1:][predicted], blocks["id"][:, 1:][predicted])
    assert (labels[:, 0] == IGNORE_INDEX).all()


@given(documents_of, st.integers(2, 17), st.data())
def test_how_tokens_arrive_does_not_matter(lengths: list[int], block_size: int, data: st.DataObject) -> None:
    tokens = np.concatenate(make_documents(lengths))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5)))
    packer = Packer(block_size)
    blocks = np.concatenate([packer.add(part) for part in np.split(tokens, cuts)])
    np.testing.assert_array_equal(blocks, Packer(block_size).add(tokens))


def test_an_example() -> None:
    blocks = pack(make_documents([3, 6, 1]), block_size=4, pad_token_id=7)
    position_ids = position_ids_of(blocks["is_start"])
    assert blocks["id"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 7, 7]]
    assert position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert labels_of(blocks["id"], position_ids).tolist() == [
        [-100, 1, 2, -100],
        [-100, 5, 6, 7],
        [-100, -100, -100, -100],
    ]


@pytest.mark.parametrize("num_tokens", [0, 8])
def test_padding_whole_blocks_adds_none(num_tokens: int) -> None:
    packer = Packer(4)
    packer.add(np.zeros(num_tokens, TOKEN))
    assert packer.pad(0).shape == (0, 4)
