"""Tokenised text as torch data sets: documents packed into blocks, kept in a cache on disk and mapped into memory."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from lckv.data.cache import NpyWriter, find_cache_dir, fingerprint, load_or_build
from lckv.data.packing import TOKEN, Packer, labels_of, position_ids_of
from lckv.data.sources import TextSource, build_source
from lckv.data.tokenizer import DocumentEncoder
from lckv.errors import UserError
from lckv.utils.console import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lckv.config import DataConfig

logger = logging.getLogger(__name__)

_VERSION = 1  # part of the cache's key: raise it when what is stored, or how text becomes blocks, changes

TRAIN, VALIDATION = "train", "validation"

# One call of the tokenizer gets about so much text: enough for all cores, little enough for its memory.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class SplitStatistics:
    """What is in the blocks of one split.

    Attributes:
        num_documents: number of documents.
        num_tokens: tokens in the documents, bos and eos included; a training block that is not full is left out.
        num_predicted_tokens: labels that are not ignored.
        num_bytes: UTF-8 bytes of the text that these labels stand for; only counted for validation.
    """

    num_documents: int
    num_tokens: int
    num_predicted_tokens: int
    num_bytes: int


class BlockDataset(Dataset[dict[str, torch.Tensor]]):
    """Blocks of packed documents: a map-style data set that reads its files on demand.

    Item: `input_ids`, `position_ids` and `labels`, each `(block_size,)` int64. Position ids restart where a document
    (or its continuation from the block before) starts, and the label there is -100.

    Args:
        folder: where the split's files are.
        document_mask: if false, `position_ids` count through the block, so that documents see the ones before; the
            labels stay the same.
    """

    def __init__(self, folder: Path, *, document_mask: bool = True) -> None:
        self.folder = folder
        self.document_mask = document_mask
        self.statistics = SplitStatistics(**json.loads((folder / "statistics.json").read_text(encoding="utf-8")))
        self._input_ids = np.load(folder / "input_ids.npy", mmap_mode="r")  # (num_blocks, block_size)
        self._position_ids = np.load(folder / "position_ids.npy", mmap_mode="r")  # (num_blocks, block_size)

    def __reduce__(self) -> tuple[Callable[[Path], BlockDataset], tuple[Path]]:
        """Pickles where the files are, which every worker maps anew: as arrays, they would be copied whole."""
        return partial(BlockDataset, document_mask=self.document_mask), (self.folder,)

    def __len__(self) -> int:
        return len(self._input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_ids = self._input_ids[index].astype(np.int64)
        position_ids = self._position_ids[index].astype(np.int64)
        labels = labels_of(input_ids, position_ids)
        if not self.document_mask:
            position_ids = np.arange(len(position_ids))
        arrays = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._input_ids.shape[1]

    @property
    def label_counts(self) -> np.ndarray:
        """How often each token is predicted: `(vocab_size,)`."""
        return np.load(self.folder / "label_counts.npy")


class RunData:
    """What a run has to know of its data: blocks for training and for validation, and figures of both.

    Attributes:
        train: the training blocks.
        validation: the validation blocks.
        fingerprint: a short name for all that the blocks depend on.
        block_size: tokens for which a block has room.
        num_tokens: tokens in the training blocks.
        num_predicted_tokens: validation labels that are not ignored.
        validation_num_bytes: UTF-8 bytes of the text that these labels stand for; 0 where it is not known.
        label_counts: how often each token is predicted, in training and in validation: `(vocab_size,)` each.
    """

    train: Sized
    validation: Sized
    fingerprint: str
    block_size: int
    num_tokens: int
    num_predicted_tokens: int
    validation_num_bytes: int
    label_counts: tuple[np.ndarray, np.ndarray]

    @property
    def tokens_per_block(self) -> float:
        """Tokens in a training block, on average."""
        return self.num_tokens / len(self.train)

    @property
    def unigram_loss(self) -> float:
        """Validation loss, in nats per predicted token, of a unigram model of the training labels."""
        return unigram_loss(*self.label_counts)

    @property
    def unigram_perplexity(self) -> float:
        """Validation perplexity, per predicted token, of a unigram model of the training labels."""
        return math.exp(self.unigram_loss)


class TokenizedData(RunData):
    """Blocks of text, in a folder: the tokens behind the last full block of the training text are left out.

    The last validation block is padded with tokens that are neither predicted nor seen.
    """

    def __init__(self, folder: Path, key: str, *, document_mask: bool) -> None:
        self.train: BlockDataset = BlockDataset(folder / TRAIN, document_mask=document_mask)
        self.validation: BlockDataset = BlockDataset(folder / VALIDATION, document_mask=document_mask)
        self.fingerprint, self.block_size = key, self.train.block_size
        self.num_tokens = self.train.statistics.num_tokens
        self.num_predicted_tokens = self.validation.statistics.num_predicted_tokens
        self.validation_num_bytes = self.validation.statistics.num_bytes
        self.label_counts = self.train.label_counts, self.validation.label_counts


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


def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stacks blocks into a batch: `(block_size,)` each to `(batch, block_size)`."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def build_dataset(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> TokenizedData:
    """Tokenises and packs the text that `config` chooses, or finds it done in the cache.

    Of several processes that ask at once, one does the work and the others wait for it.

    Raises:
        UserError: if the text cannot be read, is empty, has no validation documents or fills no block, or the cache
            cannot be written.
    """
    config.check_trains("data.")
    source = build_source(config)
    encoder = DocumentEncoder(tokenizer)
    key = fingerprint(_VERSION, source.fingerprint, encoder.fingerprint, config.block_size)
    folder = find_cache_dir(config.cache_dir) / "blocks" / key

    def build(folder: Path) -> None:
        _build_blocks(folder, source, encoder, config.block_size)

    data = load_or_build(folder, build, lambda folder: TokenizedData(folder, key, document_mask=config.document_mask))
    if source.cut is not None:
        logger.warning(
            "%s: has too few documents to hold out whole ones, so that the end of the text is held out: "
            "%d tokens for validation, %d for training",
            *(source.description, data.validation.statistics.num_tokens, data.num_tokens),
        )
    return data


def _build_blocks(folder: Path, source: TextSource, encoder: DocumentEncoder, block_size: int) -> None:
    logger.info("tokenising %s into blocks of %d tokens", source.description, block_size)
    with (
        closing(_SplitWriter(folder / TRAIN, encoder.vocab_size, block_size)) as train,
        closing(_SplitWriter(folder / VALIDATION, encoder.vocab_size, block_size)) as validation,
    ):
        for texts, is_validation in _batches(source):
            tokens = encoder.encode(texts, with_bytes=is_validation)
            (validation if is_validation else train).add(tokens)
        validation.pad(encoder.eos_token_id)
    _check_not_empty(source, train, validation)
    train.write_statistics()
    validation.write_statistics()


def _batches(source: TextSource) -> Iterator[tuple[list[str], bool]]:
    """Yields texts of one split each, in the order in which that split's documents come."""
    pending: dict[bool, list[str]] = {False: [], True: []}
    num_characters = {False: 0, True: 0}
    for document, is_validation in track(source.documents(), "tokenising", source.num_documents):
        texts = pending[is_validation]
        texts.append(document)
        num_characters[is_validation] += len(document)
        if len(texts) >= _BATCH_DOCUMENTS or num_characters[is_validation] >= _BATCH_CHARACTERS:
            yield texts, is_validation
            pending[is_validation], num_characters[is_validation] = [], 0
    yield from ((texts, is_validation) for is_validation, texts in pending.items() if texts)


def _check_not_empty(source: TextSource, train: _SplitWriter, validation: _SplitWriter) -> None:
    for split in (train, validation):
        if split.num_documents == 0:
            raise source.missing(is_validation=split is validation)
    if train.num_blocks == 0:
        raise UserError(
            f"data.block_size={train.block_size}: longer than the training text, which has {train.num_added} tokens; "
            "give a smaller block_size or more text"
        )


class _SplitWriter:
    """Packs the tokens of one split and writes its files."""

    def __init__(self, folder: Path, vocab_size: int, block_size: int) -> None:
        folder.mkdir()
        self._folder = folder
        self._packer = Packer(block_size)
        self._vocab_size = vocab_size
        self._input_ids = NpyWriter(folder / "input_ids.npy", block_size, _smallest_dtype(vocab_size - 1))
        self._position_ids = NpyWriter(folder / "position_ids.npy", block_size, _smallest_dtype(block_size - 1))
        self._label_counts = np.zeros(vocab_size, np.int64)
        self._num_bytes = 0
        self._num_padding = 0
        self.block_size = block_size
        self.num_documents = 0
        self.num_added = 0

    @property
    def num_blocks(self) -> int:
        return self._input_ids.num_rows

    def add(self, tokens: np.ndarray) -> None:
        """Adds whole documents, `(num_tokens,)` of dtype `TOKEN`."""
        assert tokens.dtype == TOKEN
        self.num_added += len(tokens)
        self.num_documents += int(tokens["is_start"].sum())
        self._write(self._packer.add(tokens))

    def pad(self, pad_token_id: int) -> None:
        """Fills up the last block."""
        self._num_padding = -self.num_added % self.block_size
        self._write(self._packer.pad(pad_token_id))

    def _write(self, blocks: np.ndarray) -> None:
        position_ids = position_ids_of(blocks["is_start"])
        is_predicted = position_ids > 0
        self._label_counts += np.bincount(blocks["id"][is_predicted], minlength=self._vocab_size)
        self._num_bytes += int(blocks["num_bytes"][is_predicted].sum(dtype=np.int64))
        self._input_ids.append(blocks["id"])
        self._position_ids.append(position_ids)

    def write_statistics(self) -> None:
        statistics = SplitStatistics(
            num_documents=self.num_documents,
            num_tokens=self.num_blocks * self.block_size - self._num_padding,
            num_predicted_tokens=int(self._label_counts.sum()),
            num_bytes=self._num_bytes,
        )
        (self._folder / "statistics.json").write_text(json.dumps(asdict(statistics)), encoding="utf-8")
        np.save(self._folder / "label_counts.npy", self._label_counts)

    def close(self) -> None:
        self._input_ids.close()
        self._position_ids.close()


def _smallest_dtype(maximum: int) -> np.dtype:
    return np.dtype(np.uint16 if maximum <= np.iinfo(np.uint16).max else np.uint32)
