"""What can be configured of text, and of what makes tokens of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lckv.config.keys import Group, at_least, key, one_of, such_that
from lckv.config.names import SOURCES
from lckv.errors import UserError

BPE = "bpe"
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
SMALLEST_BPE = 256 + len(SPECIAL_TOKENS)

_OF_FILES: dict[str, Any] = {"only_with": {"name": ("files",)}}
NO_FRACTION = "must lie between 0 and 1"
_OF_HUB: dict[str, Any] = {"only_with": {"name": ("hub",)}}


@dataclass
class SourceConfig(Group):
    """Where documents or conversations come from.

    Attributes:
        name: the source: "bible" (embedded), "files" or "hub".
        files: source "files": a path, a glob or a list of these; jsonl (also compressed) and parquet.
        validation_files: source "files": the same for the validation split.
        dataset: source "hub": name of the data set on the Hub, or a local folder of one.
        subset: source "hub": its configuration, such as "en".
        revision: source "hub": branch, tag or commit; a commit makes certain what is read.
        split: source "hub": the split to train on.
        validation_split: source "hub": the split for validation (None: a part of `split`).
        validation_fraction: sources "files" and "hub", where nothing is named for validation: the part that is held
            out, chosen by a hash of each conversation.
        cache_dir: where what is tokenised is kept (None: $LCKV_CACHE, or ~/.cache/lckv).
    """

    name: str = key("files", one_of(SOURCES))
    files: Any = key(None, **_OF_FILES)
    validation_files: Any = key(None, **_OF_FILES)
    dataset: str | None = key(None, **_OF_HUB)
    subset: str | None = key(None, **_OF_HUB)
    revision: str | None = key(None, **_OF_HUB)
    split: str = "train"
    validation_split: str | None = key(None, **_OF_HUB)
    validation_fraction: float = key(0.05, such_that(lambda value: 0 < value <= 1, NO_FRACTION))
    cache_dir: str | None = None

    def check_hub(self, prefix: str, example: str) -> None:
        """Refuses a data set of the Hub that is not named, and one split for both; `example` is the name of one."""
        if self.name == "hub" and not self.dataset:
            raise UserError(
                f"{prefix}dataset: is not set; give the name of a data set, such as {prefix}dataset={example}"
            )
        if self.name == "hub" and self.split == self.validation_split:
            given = f"{prefix}validation_split={self.split!r}"
            raise UserError(f"{given}: is the training split too; name another, or null")


@dataclass
class DataConfig(SourceConfig):
    """Where the text comes from and how it becomes blocks of tokens.

    Attributes:
        files: source "files": a path, a glob or a list of these; text, jsonl (also compressed) and parquet.
        validation_files: source "files": the same for the validation split; `files` is then training text only (but
            for documents that are in both), which evaluation does without.
        document_separator: source "files": what stands between the documents of one txt file (None: one document).
        streaming: source "hub": read without downloading everything first; needs `max_documents`.
        text_field: sources "files" (jsonl, parquet) and "hub": the field that holds the text.
        validation_fraction: sources "files" and "hub", where no validation text is named: the part of the documents
            that is held out, chosen by a hash of each document's text; of too few documents, the end of the text.
            Evaluation takes all of it (1), but of the text of the model's own training what that held out.
        max_documents: read at most so many documents of each split (None: all).
        block_size: tokens per block.
        document_mask: whether position ids restart at each document, so that no token attends to another document;
            else each block is one sequence (the predicted tokens stay the same).
    """

    name: str = key("bible", one_of(SOURCES))
    document_separator: str | None = key(None, **_OF_FILES)
    streaming: bool = key(False, **_OF_HUB)
    text_field: str = "text"
    max_documents: int | None = key(None, at_least(or_null=True))
    block_size: int = key(256, at_least(2))
    document_mask: bool = True

    def check(self, prefix: str) -> None:
        """Refuses a source that lacks what it needs."""
        if self.name == "files" and not self.files and not self.validation_files:
            example = f"such as {prefix}files='texts/*.jsonl'"
            raise UserError(f"{prefix}files: is not set; give a path, a glob or a list, {example}")
        self.check_hub(prefix, "roneneldan/TinyStories")
        if self.name == "hub" and self.streaming and self.max_documents is None:
            number = "the number of documents to read from the stream"
            raise UserError(f"{prefix}streaming=true: needs {prefix}max_documents, {number}")

    def check_trains(self, prefix: str) -> None:
        """Refuses text of which none is left to train on, which is enough for evaluation.

        Raises:
            UserError: naming the key.
        """
        if self.name == "files" and not self.files:
            only = f"{prefix}validation_files alone is enough for lckv.evaluate only"
            raise UserError(f"{prefix}files: is not set, the text to train on; {only}")
        if self.validation_fraction == 1:
            raise UserError(f"{prefix}validation_fraction={self.validation_fraction!r}: {NO_FRACTION}")


@dataclass
class TokenizerConfig(Group):
    """What turns text into tokens.

    Attributes:
        name: "bpe" (a byte-level BPE trained on the training documents, cached), a tokenizer's name on the Hub, or
            a local folder: of a tokenizer, a model or a run of `lckv.train`; or a GGUF file.
        vocab_size: only for "bpe": number of tokens, the 256 bytes and the special tokens included.
        revision: only for the Hub: branch, tag or commit.
    """

    name: str = BPE
    vocab_size: int = 4096
    revision: str | None = None

    def check(self, prefix: str) -> None:
        """Refuses fewer tokens than a byte-level BPE begins with."""
        if self.name == BPE and self.vocab_size < SMALLEST_BPE:
            begins_with = f"256 bytes and {len(SPECIAL_TOKENS)} special tokens"
            raise UserError(f"{prefix}vocab_size={self.vocab_size}: allowed is {SMALLEST_BPE} or more ({begins_with})")
