"""From files on disk to batches: what is in the blocks, and what is found again instead of made again."""

import dataclasses
import json
import math
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lckv.config import DataConfig, TokenizerConfig
from lckv.data import dataset as dataset_module
from lckv.data.dataset import build_dataset, collate
from lckv.data.sources import build_source
from lckv.data.tokenizer import build_tokenizer
from lckv.errors import UserError

TEXTS = [f"Text {index}: " + "many words " * (index % 7) + "— naïve café. 😀" for index in range(80)]


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return DataConfig(
        name="files",
        files=write(tmp_path / "a.jsonl", TEXTS),
        validation_fraction=0.3,
        block_size=32,
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.fixture
def tokenizer(config: DataConfig) -> PreTrainedTokenizerFast:
    return build_tokenizer(TokenizerConfig(vocab_size=300), config)


def split_texts(config: DataConfig) -> tuple[list[str], list[str]]:
    splits: tuple[list[str], list[str]] = ([], [])
    for document, is_validation in build_source(config).documents():
        splits[is_validation].append(document)
    return splits


def all_of(dataset: Any, name: str) -> torch.Tensor:
    return torch.stack([dataset[index][name] for index in range(len(dataset))])


def test_items(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    data = build_dataset(config, tokenizer)
    for dataset in (data.train, data.validation):
        item = dataset[0]
        assert list(item) == ["input_ids", "position_ids", "labels"]
        assert all(tensor.shape == (32,) and tensor.dtype == torch.int64 for tensor in item.values())
        assert dataset.block_size == 32
        assert len(list(dataset)) == len(dataset)  # iteration ends by itself
        input_ids, position_ids, labels = (all_of(dataset, name) for name in item)
        assert torch.equal(labels, torch.where(position_ids == 0, -100, input_ids))


def test_blocks_are_the_documents_of_their_split(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    data = build_dataset(config, tokenizer)
    for texts, dataset in zip(split_texts(config), (data.train, data.validation), strict=True):
        expected = [token_id for text in texts for token_id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        input_ids = all_of(dataset, "input_ids").ravel().tolist()
        num_tokens = dataset.statistics.num_tokens
        assert input_ids[:num_tokens] == expected[:num_tokens]
        assert dataset.statistics.num_documents == len(texts)
    # Training leaves out what fills no block; validation leaves out nothing.
    assert data.num_tokens == len(data.train) * 32
    assert data.validation.statistics.num_tokens == len(expected)
    assert input_ids[len(expected) :] == [tokenizer.eos_token_id] * (-len(expected) % 32)


def test_bytes_are_those_of_the_predicted_tokens(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    data = build_dataset(config, tokenizer)
    labels = all_of(data.validation, "labels")[:, 1:]
    predicted = labels[labels != -100].tolist()
    assert data.num_predicted_tokens == len(predicted)
    spelt = tokenizer.convert_ids_to_tokens(predicted)
    assert data.validation_num_bytes == sum(len(token) for token in spelt if token not in tokenizer.all_special_tokens)


def test_only_bytes_at_cuts_are_not_counted(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    data = build_dataset(config, tokenizer)
    at_block_start = tokenizer.convert_ids_to_tokens(all_of(data.validation, "input_ids")[:, 0].tolist())
    cut = sum(len(token) for token in at_block_start if token not in tokenizer.all_special_tokens)
    assert cut > 0
    assert data.validation_num_bytes == sum(len(text.encode()) for text in split_texts(config)[1]) - cut


def test_the_unigram_model_is_that_of_the_labels(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    data = build_dataset(config, tokenizer)
    train, validation = (all_of(dataset, "labels") for dataset in (data.train, data.validation))
    counts = torch.bincount(train[train != -100], minlength=len(tokenizer)).double() + 1
    loss = torch.nn.functional.nll_loss(
        (counts / counts.sum()).log()[None].expand(validation.numel(), -1), validation.ravel()
    )
    assert data.unigram_loss == pytest.approx(loss.item())
    assert data.unigram_perplexity == pytest.approx(math.exp(loss))
    assert data.train.label_counts.sum() == (train != -100).sum()


def test_without_document_mask_only_position_ids_change(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    masked = build_dataset(config, tokenizer)
    config.document_mask = False
    unmasked = build_dataset(config, tokenizer)
    assert masked.fingerprint == unmasked.fingerprint
    for dataset, other in ((masked.train, unmasked.train), (masked.validation, unmasked.validation)):
        assert torch.equal(all_of(dataset, "labels"), all_of(other, "labels"))
        assert torch.equal(all_of(dataset, "input_ids"), all_of(other, "input_ids"))
        assert torch.equal(all_of(other, "position_ids"), torch.arange(32).expand(len(other), -1))


def test_batches_and_workers(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    train = build_dataset(config, tokenizer).train
    batch = collate([train[0], train[1], train[2]])
    assert all(tensor.shape == (3, 32) for tensor in batch.values())
    loader = DataLoader(train, batch_size=4, collate_fn=collate, num_workers=1)
    loaded = torch.cat([batch["input_ids"] for batch in loader])
    assert torch.equal(loaded, all_of(train, "input_ids"))


def test_a_pickled_data_set_holds_no_tokens(config: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    config.files = write(Path(config.files), TEXTS * 30)
    train = build_dataset(config, tokenizer).train
    pickled = pickle.dumps(train)
    assert len(pickled) < 2000 < train.statistics.num_tokens
    assert torch.equal(all_of(pickle.loads(pickled), "labels"), all_of(train, "labels"))


@pytest.fixture
def num_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every time that text is tokenised."""
    builds: list[str] = []
    original = dataset_module._build_blocks

    def build(*arguments: Any) -> None:
        builds.append("built")
        original(*arguments)

    monkeypatch.setattr(dataset_module, "_build_blocks", build)
    return builds


def test_the_cache_goes_by_content(
    tmp_path: Path, config: DataConfig, tokenizer: PreTrainedTokenizerFast, num_builds: list[str]
) -> None:
    first = build_dataset(config, tokenizer)
    config.files = write(tmp_path / "renamed.jsonl", TEXTS)
    assert build_dataset(config, tokenizer).fingerprint == first.fingerprint
    assert len(num_builds) == 1
    config.block_size = 16
    build_dataset(config, tokenizer)
    assert len(num_builds) == 2
    build_dataset(config, build_tokenizer(TokenizerConfig(vocab_size=290), config))
    assert len(num_builds) == 3
    config.files = write(tmp_path / "renamed.jsonl", [*TEXTS, "more"])
    build_dataset(config, tokenizer)
    assert len(num_builds) == 4


def test_the_key_holds_all_that_makes_tokens_of_bytes(
    tmp_path: Path, config: DataConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    raw = Path(config.files).read_bytes()
    files = {name: tmp_path / name for name in ("b.txt", "c.md", "d.jsonl")}
    for path in files.values():
        path.write_bytes(raw)
    other = build_tokenizer(TokenizerConfig(vocab_size=300), config)
    other.add_special_tokens({"eos_token": "Text"})
    without_bos = build_tokenizer(TokenizerConfig(vocab_size=300), config)
    without_bos.bos_token = None
    config.files = str(files["d.jsonl"])

    def key(tokenizer: PreTrainedTokenizerFast = tokenizer, **settings: Any) -> str:
        return build_dataset(dataclasses.replace(config, **settings), tokenizer).fingerprint

    text = str(files["b.txt"])
    keys = [
        key(),
        key(files=text),
        key(files=text, document_separator="7"),
        key(validation_fraction=0.4),
        key(max_documents=70),
        key(block_size=16),
        key(validation_files=write(tmp_path / "v.jsonl", ["another"])),
        key(other),
        key(without_bos),
    ]
    assert len(set(keys)) == len(keys)
    assert key(files=str(files["c.md"])) == key(files=text)  # both are plain text


def test_a_single_document_is_cut_and_this_is_said(
    tmp_path: Path, config: DataConfig, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "one.txt"
    path.write_text("\n".join(TEXTS))
    config.files, config.validation_fraction = str(path), 0.1
    data = build_dataset(config, tokenizer)
    num_tokens = data.validation.statistics.num_tokens
    assert f"{num_tokens} tokens for validation, {data.num_tokens} for training" in caplog.text
    assert 0.05 < num_tokens / (num_tokens + data.num_tokens) < 0.15
    caplog.clear()
    assert build_dataset(config, tokenizer).fingerprint == data.fingerprint
    assert "the end of the text is held out" in caplog.text  # though it was in the cache
    path.write_text("\n".join(TEXTS) + "\nmore")
    assert build_dataset(config, tokenizer).fingerprint != data.fingerprint


def test_damaged_blocks_are_built_again(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, num_builds: list[str]
) -> None:
    first = build_dataset(config, tokenizer)
    expected = all_of(first.train, "input_ids")
    path = first.train.folder / "input_ids.npy"
    path.write_bytes(path.read_bytes()[:200])
    again = build_dataset(config, tokenizer)
    assert len(num_builds) == 2
    assert torch.equal(all_of(again.train, "input_ids"), expected)


def _build(config: DataConfig, results: Any) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=300), config)
    data = build_dataset(config, tokenizer)
    results.put((data.fingerprint, int(all_of(data.train, "labels").sum())))


def test_two_processes_at_once(config: DataConfig) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=_build, args=(config, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert found[0] == found[1]
    cache = Path(config.cache_dir or "")
    assert [
        len([path for path in (cache / kind).iterdir() if path.is_dir()]) for kind in ("tokenizers", "blocks")
    ] == [1, 1]


def test_small_batches_give_the_same_blocks(
    tmp_path: Path, config: DataConfig, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = build_dataset(config, tokenizer)
    monkeypatch.setattr(dataset_module, "_BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(dataset_module, "_BATCH_CHARACTERS", 90)
    config.cache_dir = str(tmp_path / "other")
    found = build_dataset(config, tokenizer)
    for dataset, other in ((expected.train, found.train), (expected.validation, found.validation)):
        assert dataset.statistics == other.statistics
        np.testing.assert_array_equal(dataset.label_counts, other.label_counts)
        assert torch.equal(all_of(dataset, "input_ids"), all_of(other, "input_ids"))
        assert torch.equal(all_of(dataset, "position_ids"), all_of(other, "position_ids"))


def test_validation_shorter_than_a_block(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config.validation_files = write(tmp_path / "v.jsonl", ["A short one."])
    validation = build_dataset(config, tokenizer).validation
    assert len(validation) == 1
    assert validation.statistics.num_bytes == len("A short one.")
    num_tokens = validation.statistics.num_tokens
    assert validation[0]["position_ids"].tolist() == [*range(num_tokens), *[0] * (32 - num_tokens)]


def test_mistakes(config: DataConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def fails(message: str, **settings: Any) -> None:
        values = {**vars(config), **settings}
        with pytest.raises(UserError) as error:
            build_dataset(DataConfig(**values), tokenizer)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    num_tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in split_texts(config)[0])
    fails(f"data.block_size=100000: longer than the training text, which has {num_tokens} tokens", block_size=100000)
    fails("data.block_size=1: allowed is a whole number, 2 or more", block_size=1)
    fails("data.validation_fraction=1: must lie between 0 and 1", validation_fraction=1)
    fails("data.files: is not set, the text to train on", files=None, validation_files=config.files)
    (tmp_path / "short.txt").write_text("x")
    fails("is too short to be split", files=str(tmp_path / "short.txt"))
    (tmp_path / "empty.txt").touch()
    fails("empty.txt': holds no text", files=str(tmp_path / "empty.txt"))
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    fails("blank.jsonl': holds no text", files=str(tmp_path / "blank.jsonl"))
    validation = str(tmp_path / "blank.jsonl")
    fails(f"data.validation_files={validation!r}: holds no text", validation_files=validation)
    texts = [*split_texts(config)[0], *split_texts(config)[1]]
    validation = str(write(tmp_path / "copy.jsonl", texts))
    fails(f"every document of it is in data.validation_files={validation!r} too", validation_files=validation)
    assert not [path for path in (tmp_path / "cache/blocks").iterdir() if path.is_dir()]
