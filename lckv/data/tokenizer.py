"""Text to tokens: any tokenizer of the Hub or a local folder, or a byte-level BPE trained on the training text."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lckv.config.data import BPE, SPECIAL_TOKENS
from lckv.data.cache import find_cache_dir, fingerprint, load_or_build
from lckv.data.packing import mark_document
from lckv.data.sources import TextSource, build_source
from lckv.errors import UserError, near_miss
from lckv.utils.console import track
from lckv.utils.hub import hub_answers

if TYPE_CHECKING:
    from lckv.config import DataConfig, TokenizerConfig

logger = logging.getLogger(__name__)

_BPE_VERSION = 1  # part of the cache's key: raise it when the training below changes
_BOS, _EOS, _PAD = SPECIAL_TOKENS

# Merges hardly change with more text, but the memory for its distinct words keeps growing.
_MAX_BPE_TRAINING_CHARACTERS = 200_000_000


def build_tokenizer(config: TokenizerConfig, data_config: DataConfig) -> PreTrainedTokenizerFast:
    """Loads the tokenizer that `config.name` chooses, or trains one on the training documents of `data_config`.

    Raises:
        UserError: if there is no such tokenizer, it cannot be used here, or `vocab_size` is too small for `"bpe"`.
    """
    config.validate("tokenizer.")
    if config.name != BPE:
        return _load_tokenizer(config)
    data_config.check_trains("data.")
    source = build_source(data_config)
    key = fingerprint(_BPE_VERSION, source.fingerprint, config.vocab_size, _MAX_BPE_TRAINING_CHARACTERS)
    tokenizer = load_or_build(
        find_cache_dir(data_config.cache_dir) / "tokenizers" / key,
        build=lambda folder: _train_bpe(source, config.vocab_size).save_pretrained(folder),
        load=PreTrainedTokenizerFast.from_pretrained,
    )
    if len(tokenizer) < config.vocab_size:
        logger.warning("the training text yields only %d tokens, not %d", len(tokenizer), config.vocab_size)
    return tokenizer


def _load_tokenizer(config: TokenizerConfig) -> PreTrainedTokenizerFast:
    name = os.path.expanduser(config.name)
    # Without the Hub, a downloaded tokenizer still loads; asking in vain takes more than a minute.
    offline = not os.path.isdir(name) and not hub_answers()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=config.revision, local_files_only=offline)
    except (OSError, ValueError, KeyError) as error:
        hint = near_miss(config.name, [BPE])
        raise UserError(
            f"tokenizer.name={config.name!r}: cannot be loaded, neither as a local folder nor from the Hub "
            f"(offline, or misspelt?); tokenizer.name={BPE} needs neither{hint}"
        ) from error
    return check_tokenizer(tokenizer, f"tokenizer.name={config.name!r}")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, given: str) -> PreTrainedTokenizerFast:
    """Checks that a tokenizer can make blocks of documents, and returns it.

    Raises:
        UserError: if it has no fast version, or no token that ends a document; the message begins with `given`.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{given}: has no fast version (tokenizer.json), which is needed here")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{given}: has no eos token, which is to end every document")
    frame_texts(tokenizer)
    return tokenizer


def frame_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Has every text begin with bos, if the tokenizer has one, and nothing follow it: the one place that says so.

    Documents are such texts with eos behind them. Many tokenizers have a bos that they do not add, others add eos to
    every prompt; a model would then be asked for something else than what it has learned. A chat template writes out
    what it wants: what it made gets no bos, in generation and LM-Harness alike.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    if tokenizer("a")["input_ids"] != [*text_prefix(tokenizer), *plain]:
        tokenizer.add_eos_token = False
        tokenizer.add_bos_token = tokenizer.bos_token_id is not None


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that every text begins with."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def vocab_size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids a model needs: one more than the largest, which may be more than there are tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def _train_bpe(source: TextSource, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE, which encodes every text and decodes to exactly that text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    logger.info("training a byte-level BPE of %d tokens on %s", vocab_size, source.description)
    tokenizer.train_from_iterator(_texts(source), trainer)
    # A prompt then starts as the documents do; packing adds both tokens itself.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        clean_up_tokenization_spaces=False,
    )


def _texts(source: TextSource) -> Iterator[str]:
    num_characters = 0
    for document in track(source.training_documents(), "training the tokenizer", source.num_documents):
        num_characters += len(document)
        yield document
        if num_characters >= _MAX_BPE_TRAINING_CHARACTERS:
            return
    if num_characters == 0:
        raise source.missing(is_validation=False)


class DocumentEncoder:
    """Turns documents into tokens that end with eos and, if the tokenizer has one, start with bos.

    A special token that is spelt out in a text is encoded as the text that it is.

    Args:
        tokenizer: a fast tokenizer; it is not changed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._prefix = text_prefix(tokenizer)
        self.eos_token_id: int = tokenizer.eos_token_id
        self.vocab_size = vocab_size_of(tokenizer)
        self._token_bytes = _count_token_bytes(self._backend)

    @property
    def fingerprint(self) -> str:
        """A short name for everything that the tokens depend on."""
        return fingerprint(self._backend.to_str(), self._prefix, self.eos_token_id)

    def encode(self, texts: Sequence[str], *, with_bytes: bool) -> np.ndarray:
        """Encodes documents and lays them end to end.

        Args:
            texts: one text per document.
            with_bytes: whether to find out how many bytes of text each token stands for (else 0).

        Returns:
            `(num_tokens,)` of dtype [`lckv.data.packing.TOKEN`]. The bytes of a document's tokens add up to its length
            in UTF-8. Where the tokenizer's tokens are bytes, each token's number is its own length; else it is what
            lies between the end of the token before and its end, so text that yields no token counts for the next.
        """
        if with_bytes:
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        else:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        documents = []
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.array([*self._prefix, *encoding.ids, self.eos_token_id], dtype=np.uint32)
            num_bytes = np.zeros(len(ids), np.uint32)
            if with_bytes:
                num_bytes[len(self._prefix) :] = self._num_bytes(text, encoding)
            documents.append(mark_document(ids, num_bytes))
        return np.concatenate(documents)

    def _num_bytes(self, text: str, encoding: Encoding) -> np.ndarray:
        """Bytes of each token of `encoding`, and of the eos behind them: `(num_tokens + 1,)`."""
        if self._token_bytes is not None:
            num_bytes = self._token_bytes[encoding.ids]
            # False if the tokenizer changes the text, for instance by composing accents or adding a space in front.
            if num_bytes.sum() == len(text.encode("utf-8")):
                return np.append(num_bytes, 0)
        return _num_bytes_by_offsets(text, encoding)


def _num_bytes_by_offsets(text: str, encoding: Encoding) -> np.ndarray:
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    character_bytes = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    byte_ends = np.concatenate([[0], np.cumsum(character_bytes)])
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    ends = np.append(offsets[:, 1], len(text))  # eos takes what follows the last token
    return np.diff(byte_ends[np.maximum.accumulate(ends)], prepend=0)


def _count_token_bytes(backend: Tokenizer) -> np.ndarray | None:
    """How many bytes every token decodes to, `(vocab_size,)`, or None if its tokens are not spelt in bytes."""
    decoder = json.loads(backend.to_str())["decoder"]
    if decoder is None or decoder["type"] != "ByteLevel":
        return None
    vocab = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    num_bytes = np.zeros(max(vocab.values()) + 1, np.uint32)
    for token, token_id in vocab.items():
        # The alphabet of byte-level tokens has one character per byte; added tokens are plain text.
        num_bytes[token_id] = len(token.encode("utf-8")) if token_id in added else len(token)
    return num_bytes
