"""Needles: what prompts are made of, and what models of known memory reach."""

import json
import random
import re
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lckv.cache import build_cache
from lckv.config import DataConfig, EvaluationConfig, NeedleConfig, TokenizerConfig
from lckv.data.sources import build_source
from lckv.data.tokenizer import build_tokenizer
from lckv.errors import UserError
from lckv.evaluation.evaluations import Subject, run_evaluations
from lckv.evaluation.needle import NUM_CANDIDATES, Haystack, needle
from tests.reference import tiny_model
from tests.tiny import byte_tokenizer
from tests.unit.evaluation.models import Bigram, InductionHead

QUESTION = " The secret word of the tower is"


@pytest.fixture(scope="module")
def text() -> str:
    documents = build_source(DataConfig()).validation_documents()
    return "\n".join(next(documents) for _ in range(7))


def bpe_tokenizer():
    """Words are tokens."""
    return build_tokenizer(TokenizerConfig(vocab_size=2048), DataConfig())


@pytest.fixture(scope="module", params=[byte_tokenizer, bpe_tokenizer])
def tokenizer(request: pytest.FixtureRequest, cache_dir: Path):
    return request.param()


@pytest.fixture(scope="module")
def haystack(tokenizer, text: str) -> Haystack:
    return Haystack(tokenizer, [text], 1000)


def data_of(text: str, folder: Path) -> DataConfig:
    for name in ("training", "validation"):
        (folder / f"{name}.txt").write_text(text if name == "validation" else "Something else.", encoding="utf-8")
    files = [str(folder / f"{name}.txt") for name in ("training", "validation")]
    return DataConfig(name="files", files=files[0], validation_files=files[1])


@pytest.fixture
def data(text: str, tmp_path: Path) -> DataConfig:
    return data_of(text, tmp_path)


def config(batch_size: int = 4, **options) -> EvaluationConfig:
    options = {"lengths": [90, 130], "depths": [0.0, 0.5, 1.0], "num_samples": 2} | options
    return EvaluationConfig(["needle"], batch_size, needle=NeedleConfig(**options))


@given(extra=st.integers(1, 600), depth=st.floats(0, 1), seed=st.text(max_size=4))
@example(extra=1, depth=0.0, seed="\x98\U000e4e85")  # where one word was the beginning of another
@settings(max_examples=20, deadline=None)
def test_prompts_are_as_long_as_asked_and_hold_the_needle_once(haystack, tokenizer, extra, depth, seed):
    length = haystack.overhead + extra
    prompt = haystack.hide(length, depth, seed)
    assert len(prompt.input_ids) == length
    assert prompt.input_ids[:1] == [tokenizer.bos_token_id] or tokenizer.bos_token_id is None

    written = tokenizer.decode(prompt.input_ids)
    words = [tokenizer.decode(word).strip() for word in prompt.candidates]
    answer = words[prompt.answer]
    assert written.count(f"{QUESTION} {answer}.") == 1
    assert written.lower().count(answer) == 1 and written.endswith(QUESTION)
    assert tokenizer.decode(prompt.input_ids[-prompt.question_length :]) == QUESTION
    assert len(set(words)) == NUM_CANDIDATES and len(set(map(len, prompt.candidates))) == 1
    assert not any(word in written.lower() for word in words if word != answer)


@st.composite
def documents(draw) -> list[str]:
    """Documents of sentences, each word of which is there once."""
    words = iter(["".join(letters) + "ing" for letters in product("bcdfg", "aeiou", "lmnprst", "aeo")])
    sizes = draw(st.lists(st.integers(1, 6), min_size=40, max_size=60))
    ends = draw(st.lists(st.sampled_from([".", "?", "!", '."', "\n"]), min_size=len(sizes), max_size=len(sizes)))
    sentences = [" ".join(islice(words, size)) + end for size, end in zip(sizes, ends, strict=True)]
    cut = draw(st.integers(1, len(sizes) - 1))
    return [" ".join(sentences[:cut]), " ".join(sentences[cut:])]


@given(texts=documents(), extra=st.integers(30, 200), depth=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_needle_lies_at_the_sentence_end_nearest_to_its_depth(texts: list[str], extra: int, depth: float):
    haystack = Haystack(byte_tokenizer(), texts, 1000)
    prompt = haystack.hide(haystack.overhead + extra, depth, "")
    written = byte_tokenizer().decode(prompt.input_ids).removesuffix(QUESTION)
    before, after = written.split(QUESTION)
    after = after[after.index(".") + 1 :]

    text = "".join(f"{each}\n" for each in texts)
    start = text.index(before + after)  # of the haystack, which the needle has left as it was
    stop = start + extra
    ends = [match.end() for match in re.finditer(r"[.?!]\"?(?=\s)|(?=\n)", text)]
    assert len(before + after) == extra and stop in ends
    assert len(before) in (0, *(end - start for end in ends))
    distances = [abs(place - depth * extra) for place in (0, *(end - start for end in ends if start <= end <= stop))]
    assert abs(len(before) - depth * extra) == min(distances)


def test_depths_move_nothing_but_the_needle(haystack: Haystack):
    prompts = [haystack.hide(300, depth, "") for depth in (0.0, 0.5, 1.0)]
    assert len({tuple(sorted(prompt.input_ids)) for prompt in prompts}) == 1
    assert len({tuple(prompt.input_ids) for prompt in prompts}) == 3
    assert all((each.candidates, each.answer) == (prompts[0].candidates, prompts[0].answer) for each in prompts)


def test_seeds_decide_everything(haystack: Haystack, tokenizer, text: str):
    seeds = [f"needle {seed} 300 {number}" for seed in range(3) for number in range(10)]
    prompts = [haystack.hide(300, 0.5, seed) for seed in seeds]
    assert len({tuple(prompt.input_ids) for prompt in prompts}) == len(seeds)
    assert len({prompt.answer for prompt in prompts}) > 5
    again = Haystack(tokenizer, [text], 1000)
    assert [again.hide(300, 0.5, seed) for seed in reversed(seeds)] == prompts[::-1]


def test_special_tokens_in_a_text_are_text():
    tokenizer = byte_tokenizer()
    text = " ".join(f"An <eos> is not {first}{second}read." for first in "abcdef" for second in "ghijk")
    haystack = Haystack(tokenizer, [text], 100)
    prompt = haystack.hide(haystack.overhead + 100, 0.5, "")
    assert tokenizer.eos_token_id not in prompt.input_ids and "<eos>" in tokenizer.decode(prompt.input_ids)


def test_no_more_text_is_read_than_is_of_use(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lckv.evaluation.needle._ENOUGH_TOKENS", 10)
    texts = iter([text[:2000]] * 10)
    assert 3000 < len(Haystack(byte_tokenizer(), texts, 3000)) <= 4002 and len(list(texts)) == 8


@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_model_that_looks_up_finds_every_needle(tokenizer, data: DataConfig, batch_size: int):
    figures = needle(Subject(InductionHead(len(tokenizer)), tokenizer, data), config(batch_size))
    assert figures["accuracy"] == figures["choice_accuracy"] == [[1.0, 1.0]] * 3
    assert figures["lengths"] == [90, 130] and figures["depths"] == [0.0, 0.5, 1.0]
    assert figures["chance"] == 0.1 and figures["num_samples"] == 2 and figures["seed"] == 0
    log_probability = torch.tensor([5.0, *[0.0] * (len(tokenizer) - 1)]).log_softmax(0)[0].item()
    num_tokens = Haystack(tokenizer, [Path(data.validation_files).read_text()], 200).answer_length
    assert sum(figures["log_probability"], []) == pytest.approx([num_tokens * log_probability] * 6, rel=1e-5)
    assert figures["mean_accuracy"] == figures["mean_choice_accuracy"] == 1.0
    assert figures["mean_log_probability"] == pytest.approx(num_tokens * log_probability, rel=1e-5)
    json.dumps(figures)


def test_a_model_without_memory_is_at_chance(data: DataConfig):
    tokenizer = bpe_tokenizer()
    subject = Subject(Bigram(len(tokenizer)), tokenizer, data)
    figures = needle(subject, config(100, lengths=[60], depths=[0.5], num_samples=600))
    assert figures["choice_accuracy"][0][0] == pytest.approx(0.1, abs=0.04)
    assert figures["accuracy"][0][0] < 0.03


@pytest.mark.parametrize(
    ("make_tokenizer", "layer_types"),
    [(byte_tokenizer, "0_0_2_2"), (bpe_tokenizer, "0s_1s_2_2"), (bpe_tokenizer, "0_2_2_3")],
)
def test_neither_batches_nor_caches_change_figures(make_tokenizer, data: DataConfig, layer_types: str):
    tokenizer = make_tokenizer()
    # Converged, as what reads upward depends on the other tokens of the call otherwise.
    model = tiny_model(
        layer_types, vocab_size=len(tokenizer), max_position_embeddings=256, forward_passes="converge",
        converge_tolerance=1e-7, sliding_window=20,
    )  # fmt: skip
    figures = [
        needle(Subject(model, tokenizer, data, new_cache), config(batch_size, depths=[0.3], num_samples=1))
        for new_cache in (None, lambda: build_cache("dynamic", model.config))
        for batch_size in (1, 64)
    ]
    for each in figures[1:]:
        assert each["accuracy"] == figures[0]["accuracy"]
        assert each["choice_accuracy"] == figures[0]["choice_accuracy"]
        assert each["log_probability"][0] == pytest.approx(figures[0]["log_probability"][0], rel=1e-4)


def test_figures_of_a_cell_do_not_depend_on_the_others(data: DataConfig):
    tokenizer = byte_tokenizer()
    subject = Subject(tiny_model("0_1", vocab_size=len(tokenizer), max_position_embeddings=256), tokenizer, data)
    grid, cell = needle(subject, config()), needle(subject, config(lengths=[130], depths=[0.5]))
    assert cell["log_probability"][0][0] == pytest.approx(grid["log_probability"][1][1], rel=1e-6)
    assert needle(subject, config())["log_probability"] == grid["log_probability"]
    other = needle(Subject(subject.model, tokenizer, data, seed=1), config())
    assert other["log_probability"] != grid["log_probability"] and other["seed"] == 1


def test_default_lengths_mode_random_state_and_picture(data: DataConfig, tmp_path: Path):
    tokenizer = byte_tokenizer()
    model = tiny_model("0_0", vocab_size=len(tokenizer), max_position_embeddings=400).train()
    states = random.getstate(), torch.get_rng_state()
    subject = Subject(model, tokenizer, data, folder=tmp_path)
    cfg = config(lengths=None, depths=[1.0], num_samples=1)
    ((_, figures),) = run_evaluations(subject, cfg, {})
    num_tokens = Haystack(tokenizer, [Path(data.validation_files).read_text()], 400).answer_length
    longest = 400 - (num_tokens - 1)
    assert figures["lengths"] == [longest // 4, longest // 2, longest * 3 // 4, longest]
    for trained_length, expected in ((200, [100, 150, 200]), (300, [75, 150, 225, 300])):  # 50 hold no text
        subject = Subject(model, tokenizer, data, trained_length=trained_length)
        assert needle(subject, cfg)["lengths"] == expected
    with pytest.raises(UserError, match=r"needle.lengths: give some; needle and question are 7\d tokens"):
        needle(Subject(model, tokenizer, data, trained_length=64), cfg)
    assert model.training and random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [60]}, r"x\.needle\.lengths=60: allowed is more than 7\d, the tokens of needle and question"),
        ({"lengths": [257]}, r"x\.needle\.lengths=257: allowed is at most 25\d, the positions"),
    ],
)
def test_settings_out_of_range(data: DataConfig, options, message):
    subject = Subject(InductionHead(257, 256), byte_tokenizer(), data, key_prefix="x.")
    with pytest.raises(UserError, match=message) as caught:
        needle(subject, config(**options))
    assert "\n" not in str(caught.value)


def test_text_too_short_and_too_poor(tmp_path: Path):
    words = [f"{first}{second}alk" for first in "bcdf" for second in "rst"]
    cases = [
        (". ".join(words) + ".", 250, r"needle\.lengths=250: allowed is at most 15\d, as there is no more"),
        (". ".join(words) + ".", 130, r"needle\.lengths=130: leaves \d words of the validation text that are not in"),
        ("Three words only.", 100, r"evals=needle: the validation text has \d words of equally many tokens"),
        (" \n ", 100, "holds no text"),
    ]
    for written, length, message in cases:
        subject = Subject(InductionHead(257), byte_tokenizer(), data_of(written, tmp_path))
        with pytest.raises(UserError, match=message):
            needle(subject, config(lengths=[length]))
