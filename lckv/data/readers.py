"""Reading documents from local files: txt, jsonl and parquet, the first two also compressed.

Not by `datasets`: it takes the byte order mark of a compressed file for text, refuses JSON with half a surrogate pair,
reads a missing field as an empty one and a whole row group of Parquet at once, writes lines of its own to stderr,
names no line of a broken file, and leaves files in the home folder.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from lckv.errors import UserError, near_file, near_miss

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class FileFacts(NamedTuple):
    """What one pass over a file finds: a hash of its text and, where it is cheap, the number of documents.

    The hash is one of the bytes and of how they are read: the same bytes are one text as txt and another as jsonl.
    """

    digest: str
    num_documents: int | None


def find_files(given: Any, key: str, kinds: Collection[str] | None = None) -> list[Path]:
    """Turns a path, a glob, or a list of these, into the files they mean, each once.

    Args:
        given: what the user gave.
        key: under which key.
        kinds: which suffixes are allowed, that of a compression aside; by default those of [`READERS`].

    Raises:
        UserError: if one of them means no file, or a file of no known kind; the message names `key`.
    """
    patterns = [given] if isinstance(given, (str, Path)) else given
    if (
        not isinstance(patterns, Sequence)
        or not patterns
        or not all(isinstance(item, (str, Path)) for item in patterns)
    ):
        raise UserError(f"{key}={given!r}: must be a path, a glob such as 'texts/*.jsonl', or a list of these")
    paths = [path for pattern in patterns for path in _match(str(pattern), key)]
    for path in paths:
        if kind_of(path) not in (allowed := READERS if kinds is None else kinds):
            raise UserError(
                f"{key}: {str(path)!r} is of no known kind: allowed are {', '.join(allowed)}, also with .gz"
            )
    return list(dict.fromkeys(path.resolve() for path in paths))


def _match(pattern: str, key: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise UserError(f"{key}={pattern!r}: is a folder; name the files in it, such as '{pattern.rstrip('/')}/*.txt'")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
    if matches:
        return matches
    if glob.has_magic(str(path)):
        raise UserError(f"{key}={pattern!r}: matches no file (looked from {str(Path.cwd())!r})")
    if not path.parent.is_dir():
        raise UserError(f"{key}={pattern!r}: there is no folder {str(path.parent)!r}")
    raise UserError(f"{key}={pattern!r}: there is no such file{near_file(path)}")


def kind_of(path: Path) -> str:
    """The suffix that says how to read `path`, that of the compression aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _compression_of(path: Path) -> str:
    """The suffix that says how `path` is compressed, or an empty text."""
    suffix = path.suffix.lower()
    return suffix if suffix in _OPENERS else ""


def read_documents(path: Path, text_field: str, document_separator: str | None) -> Iterator[str]:
    """Yields the documents of one file: texts that are never cut between training and validation.

    Args:
        path: the file; its suffix says how to read it.
        text_field: the field or column with the text, in jsonl and parquet.
        document_separator: what stands between two documents of a txt file; None: the file is one document.

    Raises:
        UserError: if the file cannot be read as what its suffix says, naming the file and, in jsonl, the line.
    """
    with _explain_read_errors(path):
        yield from READERS[kind_of(path)](path, text_field, document_separator)


@contextmanager
def _explain_read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start} is {error.object[error.start]:#x})") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def inspect_file(path: Path, document_separator: str | None) -> FileFacts:
    """Reads the bytes of `path` once.

    Raises:
        UserError: if the file cannot be read.
    """
    digest = hashlib.blake2b(f"{READERS[kind_of(path)].__name__} {_compression_of(path)}\n".encode(), digest_size=16)
    num_lines, last = 0, b"\n"
    with _explain_read_errors(path), path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
            num_lines += chunk.count(b"\n")
            last = chunk[-1:]
    num_lines += last != b"\n"
    kind = kind_of(path)
    if kind in TEXT_SUFFIXES:
        num_documents = int(path.stat().st_size > 0) if document_separator is None else None
    elif kind in _JSONL_SUFFIXES:
        num_documents = None if _compression_of(path) else num_lines
    else:
        num_documents = _open_parquet(path).metadata.num_rows
    return FileFacts(digest.hexdigest(), num_documents)


def join_line_ends(text: str) -> str:
    """The text with one character at every line's end, as Python reads it from a file that is opened as text."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _open_text(path: Path) -> IO[str]:
    opener = _OPENERS.get(_compression_of(path), open)
    return opener(path, "rt", encoding="utf-8-sig")  # -sig: a byte order mark is not part of the text


def _read_txt(path: Path, text_field: str, document_separator: str | None) -> Iterator[str]:
    with _open_text(path) as file:
        text = file.read()
    yield from [text] if document_separator is None else text.split(document_separator)


def read_rows(path: Path, field: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a file of [`ROW_READERS`], each behind where it is, for messages.

    Args:
        path: the file.
        field: all of a row that counts; `None` if all of it does.

    Raises:
        UserError: if the file cannot be read as what its suffix says, naming the file and, in jsonl, the line.
    """
    with _explain_read_errors(path):
        yield from ROW_READERS[kind_of(path)](path, field)


def _read_jsonl(path: Path, text_field: str, document_separator: str | None) -> Iterator[str]:
    yield from (pick_text(row, text_field, where) for where, row in _jsonl_rows(path, text_field))


def _jsonl_rows(path: Path, field: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: is not a line of JSON ({error.msg} at column {error.colno})") from error
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
                raise UserError(f"{where}: is no JSON that can be read ({error})") from error
            if not isinstance(row, dict):
                with_field = "" if field is None else f" with a field {field!r}"
                raise UserError(f"{where}: must be a JSON object{with_field}, but is {row!r:.40}")
            yield where, row


def _read_parquet(path: Path, text_field: str, document_separator: str | None) -> Iterator[str]:
    check_field(text_field, _open_parquet(path).schema_arrow.names, str(path))
    yield from (pick_text(row, text_field, where) for where, row in _parquet_rows(path, text_field))


def _parquet_rows(path: Path, field: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    # Where the column is not there, whole rows, so that whoever asks for it can say what there is.
    file = _open_parquet(path)
    columns = [field] if field in file.schema_arrow.names else None
    batches = file.iter_batches(columns=columns, batch_size=1024)
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        yield f"{path}, row {number}", row


def _open_parquet(path: Path) -> Any:
    import pyarrow  # with `datasets`; slow to import, so only where it is needed
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: is not a whole parquet file ({str(error).splitlines()[0]})") from error


def check_field(text_field: str, fields: Sequence[str], where: str, key: str = "data.text_field") -> None:
    """Raises a UserError that names the `fields` there are, unless `text_field` is one of them."""
    if text_field not in fields:
        raise UserError(
            f"{key}={text_field!r}: {where} has no such field; it has {', '.join(fields) or 'none'}"
            f"{near_miss(text_field, fields)}"
        )


def pick_text(row: dict[str, Any], text_field: str, where: str) -> str:
    """The text of `row`; an empty one where the field is null.

    Raises:
        UserError: if there is no such field, or it holds something else than text.
    """
    check_field(text_field, list(row), where)
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: field {text_field!r} must be text, but is a {type(text).__name__}")
    return text


TEXT_SUFFIXES = (".txt", ".md", ".raw", ".tokens")  # the latter two of WikiText's files
_JSONL_SUFFIXES = (".jsonl", ".ndjson")

READERS: dict[str, Callable[[Path, str, str | None], Iterator[str]]] = {
    **dict.fromkeys(TEXT_SUFFIXES, _read_txt),
    **dict.fromkeys(_JSONL_SUFFIXES, _read_jsonl),
    ".parquet": _read_parquet,
}
"""How to read a file, by its suffix."""

ROW_READERS: dict[str, Callable[[Path, str | None], Iterator[tuple[str, dict[str, Any]]]]] = {
    **dict.fromkeys(_JSONL_SUFFIXES, _jsonl_rows),
    ".parquet": _parquet_rows,
}
"""The same for files of rows."""
