"""Text to tokens: lossless, learned from training text only, and with exact byte counts."""

import json
import logging
import ssl
import urllib.error
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lckv.config import DataConfig, TokenizerConfig
from lckv.data.sources import build_source
from lckv.data.tokenizer import (
    DocumentEncoder,
    _num_bytes_by_offsets,
    build_tokenizer,
    check_tokenizer,
    vocab_size_of,
)
from lckv.errors import UserError
from lckv.utils.hub import hub_answers

any_text = st.text(st.characters(exclude_categories=["Cs"]))


def files_config(folder: Path, texts: list[str], cache_dir: Path) -> DataConfig:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(name="files", files=str(path), cache_dir=str(cache_dir), validation_fraction=0.3)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("bpe")
    texts = [f"The {word} of number {index}, naïve façade." for index in range(50) for word in ("house", "horse")]
    return build_tokenizer(TokenizerConfig(vocab_size=320), files_config(folder, texts, folder))


@pytest.fixture(scope="module")
def word_level() -> PreTrainedTokenizerFast:
    """A tokenizer that lowercases, drops spaces and knows few words: its tokens do not spell the text."""
    vocab = {"[UNK]": 0, "[END]": 1, "the": 2, "café": 3, "house": 4}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[END]")


@pytest.fixture(scope="module")
def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer in SentencePiece's manner: a space in front, and bytes for characters that it does not know."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": byte + 3 for byte in range(256)}}
    vocab |= {"▁": 259, "a": 260, "b": 261, "▁a": 262}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


# The byte-level BPE


@given(any_text)
def test_bpe_is_lossless(bpe: PreTrainedTokenizerFast, text: str) -> None:
    assert bpe.decode(bpe(text, add_special_tokens=False)["input_ids"]) == text


@given(st.lists(any_text, min_size=1, max_size=4))
def test_encoded_documents_decode_to_the_texts(bpe: PreTrainedTokenizerFast, texts: list[str]) -> None:
    tokens = DocumentEncoder(bpe).encode(texts, with_bytes=True)
    documents = np.split(tokens, np.flatnonzero(tokens["is_start"])[1:])
    for document, text in zip(documents, texts, strict=True):
        assert document["id"][0] == bpe.bos_token_id and document["id"][-1] == bpe.eos_token_id
        assert bpe.decode(document["id"][1:-1]) == text


@given(any_text)
def test_every_byte_level_token_counts_its_own_bytes(bpe: PreTrainedTokenizerFast, text: str) -> None:
    tokens = DocumentEncoder(bpe).encode([text], with_bytes=True)
    encoded, end = text.encode(), 0
    for token in tokens[1:-1]:
        spelt = bpe.convert_ids_to_tokens(int(token["id"]))
        end += int(token["num_bytes"])
        assert len(spelt) == token["num_bytes"]
        if text.isascii():
            assert encoded[end - token["num_bytes"] : end].decode() == bpe.decode([token["id"]])
    assert end == len(encoded)
    assert tokens["num_bytes"][[0, -1]].tolist() == [0, 0]


def test_special_tokens_spelt_out_in_a_text_are_text(bpe: PreTrainedTokenizerFast) -> None:
    text = "before <|eos|> behind"
    ids = DocumentEncoder(bpe).encode([text], with_bytes=False)["id"]
    assert np.flatnonzero(ids == bpe.eos_token_id).tolist() == [len(ids) - 1]
    assert bpe.decode(ids[1:-1]) == text
    assert bpe(text)["input_ids"].count(bpe.eos_token_id) == 1, "the encoder changed the tokenizer that it was given"


def test_prompts_start_as_documents_do(bpe: PreTrainedTokenizerFast) -> None:
    prompt = bpe("The house")["input_ids"]
    assert prompt == DocumentEncoder(bpe).encode(["The house"], with_bytes=False)["id"][:-1].tolist()
    assert len({bpe.bos_token_id, bpe.eos_token_id, bpe.pad_token_id}) == 3


def test_bpe_learns_from_training_documents_only(tmp_path: Path) -> None:
    texts = [f"{word} {index}" for index in range(40) for word in ("aaaa", "bbbb")]
    config = files_config(tmp_path, texts, tmp_path)
    held_out = [document for document, is_validation in build_source(config).documents() if is_validation]
    train = [text for text in texts if text not in held_out]
    assert held_out
    first = build_tokenizer(TokenizerConfig(vocab_size=300), config)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/train.txt").write_text("\n\n".join(train))
    (tmp_path / "train/validation.txt").write_text("zzzz zzzz")
    again = DataConfig(
        name="files",
        files=str(tmp_path / "train/train.txt"),
        validation_files=str(tmp_path / "train/validation.txt"),
        document_separator="\n\n",
        cache_dir=str(tmp_path / "other"),
    )
    second = build_tokenizer(TokenizerConfig(vocab_size=300), again)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_bpe_is_cached_by_text_and_size(tmp_path: Path) -> None:
    texts = [f"some text {index}" for index in range(30)]
    config = files_config(tmp_path, texts, tmp_path / "cache")
    folder = tmp_path / "cache/tokenizers"

    def build(vocab_size: int) -> set[str]:
        build_tokenizer(TokenizerConfig(vocab_size=vocab_size), config)
        return {path.name for path in folder.iterdir() if path.is_dir()}

    first = build(270)
    stamp = next(folder.glob("*/tokenizer.json")).stat().st_mtime_ns
    assert build(270) == first
    assert next(folder.glob("*/tokenizer.json")).stat().st_mtime_ns == stamp
    assert len(build(275)) == 2
    files_config(tmp_path, [*texts, "more text"], tmp_path / "cache")
    assert len(build(270)) == 3


def test_a_cached_bpe_is_the_one_that_was_trained(tmp_path: Path) -> None:
    config = files_config(tmp_path, ["some text", "some more", "and more"] * 9, tmp_path)
    first, second = (build_tokenizer(TokenizerConfig(vocab_size=265), config) for _ in range(2))
    (tmp_path / "elsewhere").mkdir()
    fresh = build_tokenizer(
        TokenizerConfig(vocab_size=265),
        files_config(tmp_path, ["some text", "some more", "and more"] * 9, tmp_path / "elsewhere"),
    )
    for other in (second, fresh):
        assert first.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
        assert first("some text") == other("some text")
        assert (first.bos_token, first.eos_token, first.pad_token) == (
            other.bos_token,
            other.eos_token,
            other.pad_token,
        )


def test_a_text_too_small_for_the_vocabulary_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = build_tokenizer(TokenizerConfig(), files_config(tmp_path, ["a", "b", "c", "d"] * 9, tmp_path))
    assert f"only {len(tokenizer)} tokens, not 4096" in caplog.text


# Other tokenizers


def test_bytes_of_a_tokenizer_whose_tokens_do_not_spell_the_text(word_level: PreTrainedTokenizerFast) -> None:
    text = "The  CAFÉ of the house "
    tokens = DocumentEncoder(word_level).encode([text], with_bytes=True)
    assert tokens["id"].tolist() == [2, 3, 0, 2, 4, 1]
    parts = ["The", "  CAFÉ", " of", " the", " house", " "]
    assert tokens["num_bytes"].tolist() == [len(part.encode()) for part in parts]


def test_a_token_whose_offsets_lie_behind_stands_for_no_bytes() -> None:
    """Some tokenizers give what they insert the offsets (0, 0), wherever it stands."""
    encoding = SimpleNamespace(offsets=[(0, 2), (0, 0), (2, 3)])
    assert _num_bytes_by_offsets("aé😀!", encoding).tolist() == [3, 0, 4, 1]


@given(text=any_text)
@pytest.mark.parametrize("name", ["word_level", "byte_fallback", "bpe"])
def test_bytes_add_up_to_the_text(request: pytest.FixtureRequest, name: str, text: str) -> None:
    tokenizer = request.getfixturevalue(name)
    tokens = DocumentEncoder(tokenizer).encode([text, "a b"], with_bytes=True)
    assert tokens["num_bytes"].sum() == len(text.encode()) + 3
    without = DocumentEncoder(tokenizer).encode([text, "a b"], with_bytes=False)
    assert not without["num_bytes"].any()
    np.testing.assert_array_equal(tokens[["id", "is_start"]], without[["id", "is_start"]])


def test_a_byte_level_tokenizer_that_changes_the_text(bpe: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(bpe.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")
    text = "cafe\u0301"  # six bytes, of which NFC makes five
    assert DocumentEncoder(tokenizer).encode([text], with_bytes=True)["num_bytes"].sum() == 6


def test_a_tokenizer_in_a_local_folder(word_level: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    word_level.save_pretrained(tmp_path)
    tokenizer = build_tokenizer(TokenizerConfig(name=str(tmp_path)), DataConfig())
    assert tokenizer("the house")["input_ids"] == [2, 4]


def test_padding_and_truncation_set_on_a_tokenizer_change_nothing(word_level: PreTrainedTokenizerFast) -> None:
    encoder = DocumentEncoder(word_level)
    word_level.backend_tokenizer.enable_truncation(2)
    try:
        limited = DocumentEncoder(word_level)
        assert limited.fingerprint == encoder.fingerprint
        assert len(limited.encode(["the house the house"], with_bytes=False)) == 5
    finally:
        word_level.backend_tokenizer.no_truncation()


# Mistakes


def fails(message: str, config: TokenizerConfig, data_config: DataConfig | None = None) -> None:
    with pytest.raises(UserError) as error:
        build_tokenizer(config, data_config or DataConfig())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes(tmp_path: Path) -> None:
    fails("tokenizer.vocab_size=258: allowed is 259 or more", TokenizerConfig(vocab_size=258))
    fails("tokenizer.name='bep': cannot be loaded", TokenizerConfig(name="bep"))
    fails("did you mean 'bpe'?", TokenizerConfig(name="bep"))
    fails("cannot be loaded", TokenizerConfig(name=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    fails("cannot be loaded", TokenizerConfig(name=str(tmp_path)))
    fails("texts.jsonl': holds no text", TokenizerConfig(), files_config(tmp_path, ["", " "], tmp_path))


@pytest.mark.parametrize(
    ("error", "answers"),
    [
        (urllib.error.URLError(OSError("Name or service not known")), False),
        (TimeoutError("timed out"), False),
        (urllib.error.URLError(ssl.SSLError("unknown authority")), True),
        (urllib.error.HTTPError("https://hub", 429, "Too Many Requests", Message(), None), True),
    ],
)
def test_only_a_hub_that_says_nothing_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, error: OSError, answers: bool
) -> None:
    def urlopen(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert hub_answers() is False  # tests run with HF_HUB_OFFLINE
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert hub_answers() is answers


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path)
    fails("has no eos token", TokenizerConfig(name=str(tmp_path)))


@pytest.mark.parametrize("template", [None, "$A", "<bos> $A", "<bos> $A <eos>", "$A <eos>"])
@pytest.mark.parametrize("bos", ["<bos>", None])
def test_texts_begin_alike_and_end_with_nothing_whatever_the_tokenizer_adds(tmp_path, template, bos):
    """A prompt then begins as a document does, for whoever encodes it, and for whoever loads the saved tokenizer."""
    special = {"<bos>": 3, "<eos>": 4}
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2, **special}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(special))
    if template is not None:
        used = [(token, index) for token, index in special.items() if token in template]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token=bos)
    check_tokenizer(tokenizer, "this").save_pretrained(tmp_path)
    prompt = [0, 1] if bos is None else [3, 0, 1]
    for each in (tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert each("a b")["input_ids"] == prompt
        assert each("a b", add_special_tokens=False)["input_ids"] == [0, 1]
        assert DocumentEncoder(each).encode(["a b"], with_bytes=False)["id"].tolist() == [*prompt, 4]


def test_ids_with_gaps_are_counted_by_the_largest():
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab | {"<eos>": 1000}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert len(tokenizer) == 257 and vocab_size_of(tokenizer) == DocumentEncoder(tokenizer).vocab_size == 1001
