"""Perplexity by a sliding window, against figures worked out by hand and transformers' own recipe."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from lckv.cache import build_cache
from lckv.config import DataConfig, EvaluationConfig, PerplexityConfig
from lckv.data.dataset import build_dataset
from lckv.errors import UserError
from lckv.evaluation.evaluations import Subject, run_evaluations
from lckv.evaluation.perplexity import evaluate_perplexity
from lckv.evaluation.sliding import Window, cut_windows, evaluate_sliding, score_windows
from tests.contract.caches import MIXED, VARIANTS, exact_model, new_cache
from tests.reference import tiny_model
from tests.tiny import byte_tokenizer

TEXTS = ["In the beginning was the Word.", "a", "Götter, und\n ein Wort, das länger ist als die anderen Texte hier."]
VOCAB_SIZE = 257


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "training.txt").write_text("Something else, at least so long that it fills a block or two.")
    files = {name: str(next(tmp_path.glob(f"{name}.*"))) for name in ("training", "validation")}
    return DataConfig(name="files", files=files["training"], validation_files=files["validation"], block_size=32)


def evaluate(model, data: DataConfig, batch_size: int = 2, new_cache=None, tokenizer=None, **settings) -> dict:
    subject = Subject(model, tokenizer or byte_tokenizer(), data, new_cache)
    return evaluate_sliding(subject, EvaluationConfig(["perplexity"], batch_size, PerplexityConfig(**settings)))


def encode(text: str, tokenizer=None) -> torch.Tensor:
    tokenizer = tokenizer or byte_tokenizer()
    return torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])


def random_windows(lengths: list[int], context_length: int, stride: int, vocab_size: int = 61) -> list[Window]:
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, vocab_size, length) for length in lengths]
    return [window for document in documents for window in cut_windows(document, context_length, stride)]


# --- the windows ------------------------------------------------------------------------------------------------


@given(num_tokens=st.integers(0, 40), context_length=st.integers(1, 12), data=st.data())
def test_every_token_but_the_first_is_scored_once_with_all_the_context_of_its_window(num_tokens, context_length, data):
    stride = data.draw(st.integers(1, context_length))
    windows = list(cut_windows(np.arange(num_tokens), context_length, stride))
    scored = [token for window in windows for token in window.tokens[-window.num_scored :]]
    assert scored == list(range(1, num_tokens))
    for window in windows:
        first = window.tokens[0]
        assert window.tokens.tolist() == list(range(first, first + len(window.tokens)))
        assert 1 <= window.num_scored < len(window.tokens)
        assert len(window.tokens) - 1 <= context_length  # the model does not see the last one
        context = window.tokens[-window.num_scored] - first
        assert first == 0 or context >= max(1, context_length - stride)


def test_windows_are_those_of_the_recipe():
    windows = list(cut_windows(np.arange(10), context_length=6, stride=2))
    assert [(window.tokens[0], window.tokens[-1], window.num_scored) for window in windows] == [
        (0, 5, 5),
        (2, 7, 2),
        (4, 9, 2),
    ]


# --- against figures from elsewhere -----------------------------------------------------------------------------


class Unigram(torch.nn.Module):
    """Predicts every token with a probability of its own, whatever came before."""

    def __init__(self, probabilities: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(probabilities.log())
        self.config = PretrainedConfig(max_position_embeddings=16)

    def forward(self, input_ids, logits_to_keep, **kwargs):
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), logits_to_keep, -1))


@pytest.mark.parametrize("has_bos", [False, True])
def test_a_known_distribution_has_the_perplexity_worked_out_by_hand(data: DataConfig, has_bos: bool):
    probabilities = torch.rand(VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) + 0.1
    probabilities /= probabilities.sum()
    tokenizer = byte_tokenizer(bos_token="Ā") if has_bos else byte_tokenizer()
    figures = evaluate(Unigram(probabilities), data, tokenizer=tokenizer, context_length=8, stride=3)
    scored = [token for text in TEXTS for token in encode(text)[0 if has_bos else 1 :].tolist()]
    nll = -sum(math.log(probabilities[token]) for token in scored)
    num_bytes = sum(len(text.encode()) for text in TEXTS) - (0 if has_bos else len(TEXTS))
    num_words = 6 + 1 + 12
    assert figures["num_documents"] == 3
    assert (figures["num_tokens"], figures["num_words"], figures["num_bytes"]) == (len(scored), num_words, num_bytes)
    assert figures["loss"] == pytest.approx(nll / len(scored), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(nll / len(scored)), rel=1e-6)
    assert figures["word_perplexity"] == pytest.approx(math.exp(nll / num_words), rel=1e-5)
    assert figures["byte_perplexity"] == pytest.approx(math.exp(nll / num_bytes), rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(figures["byte_perplexity"]))


def transformers_recipe(model, input_ids: torch.Tensor, max_length: int, stride: int) -> tuple[float, int]:
    """The loop of transformers' "Perplexity of fixed-length models"; each window's mean counts for its tokens."""
    seq_len, prev_end_loc, nll_sum, n_tokens = input_ids.shape[1], 0, 0.0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        window, target_ids = input_ids[:, begin_loc:end_loc], input_ids[:, begin_loc:end_loc].clone()
        target_ids[:, :-trg_len] = -100
        num_predicted = int((target_ids[:, 1:] != -100).sum())
        if num_predicted:
            with torch.no_grad():
                nll_sum += model(window, labels=target_ids).loss.item() * num_predicted
        n_tokens += num_predicted
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return nll_sum, n_tokens


@pytest.mark.parametrize(("context_length", "stride"), [(12, 5), (12, 1), (12, 11), (100, 50)])
def test_figures_are_those_of_transformers_recipe_and_model(data: DataConfig, context_length: int, stride: int):
    ours = tiny_model("0_1_2_3", vocab_size=VOCAB_SIZE)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    sizes = {name: getattr(ours.config, name) for name in sizes}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=128, **sizes)).eval()
    llama.load_state_dict(ours.state_dict())
    figures = evaluate(ours, data, context_length=context_length, stride=stride)
    sums = [transformers_recipe(llama, encode(text)[None], context_length, stride) for text in TEXTS]
    nll, num_tokens = (sum(values) for values in zip(*sums, strict=True))
    assert figures["num_tokens"] == num_tokens
    assert figures["loss"] == pytest.approx(nll / num_tokens, rel=1e-6)
    assert evaluate(llama, data, context_length=context_length, stride=stride)["loss"] == pytest.approx(
        figures["loss"], rel=1e-6
    )


def test_a_window_that_holds_every_document_gives_the_training_s_own_figures(data: DataConfig):
    model = tiny_model("0_3_3_3_4", vocab_size=VOCAB_SIZE)
    data.block_size = 128  # longer than all documents together
    Path(data.files).write_text("more " * 40)
    blocks = build_dataset(data, byte_tokenizer())
    model.config.forward_passes = 128
    result = evaluate_perplexity(model, blocks.validation, batch_size=1, num_bytes=blocks.validation_num_bytes)
    figures = evaluate(model, data)
    assert figures["num_tokens"] == result.num_tokens
    assert figures["loss"] == pytest.approx(result.loss, rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(result.bits_per_byte, rel=1e-5)


# --- what must not matter ---------------------------------------------------------------------------------------

WINDOWS = random_windows([30, 5, 2, 17, 23, 9], context_length=12, stride=5)


@pytest.mark.parametrize("layer_types", [*MIXED, "0_1_2_3"])
def test_batches_and_padding_change_nothing(layer_types: str):
    model = tiny_model(layer_types)
    expected = score_windows(model, WINDOWS, batch_size=1)
    for batch_size in (3, 50):
        assert score_windows(model, WINDOWS, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("layer_types", MIXED)
def test_a_cache_changes_nothing(name: str, layer_types: str):
    model = exact_model(layer_types)
    expected = score_windows(model, WINDOWS, batch_size=1)
    for batch_size, chunk in (3, 4), (50, 64):
        made = []
        actual = score_windows(
            model,
            WINDOWS,
            batch_size=batch_size,
            new_cache=lambda made=made: made.append(new_cache(name, model)) or made[-1],
            cache_chunk=chunk,
        )
        assert actual == pytest.approx(expected, rel=1e-5)
        assert len(made) == -(-len(WINDOWS) // batch_size) and all(cache.get_seq_length() for cache in made)


def test_what_a_cache_loses_is_measured():
    model = exact_model("0_0_2_2")
    expected = score_windows(model, WINDOWS, batch_size=1)
    rounded = score_windows(
        model,
        WINDOWS,
        batch_size=1,
        new_cache=lambda: build_cache("quantized", model.config, bits=2, residual_length=2, group_size=4),
        cache_chunk=1,
    )
    assert abs(rounded - expected) > 1e-4 * expected


def test_mode_and_gradients_are_left_alone(data: DataConfig):
    model = tiny_model("0_0_2_2", vocab_size=VOCAB_SIZE, attention_dropout=0.5).train()
    subject, cfg = Subject(model, byte_tokenizer(), data), EvaluationConfig(["perplexity"])
    state = torch.get_rng_state()
    ((_, first),) = run_evaluations(subject, cfg, {})
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert dict(run_evaluations(subject, cfg, {})) == {"perplexity": first}
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()


# --- settings ---------------------------------------------------------------------------------------------------


def test_defaults_are_the_model_s_length_and_half_of_it(data: DataConfig):
    figures = evaluate(tiny_model("0_0", vocab_size=VOCAB_SIZE, max_position_embeddings=20), data)
    assert (figures["context_length"], figures["stride"]) == (20, 10)
    assert evaluate(tiny_model("0_0", vocab_size=VOCAB_SIZE), data, max_documents=2)["num_documents"] == 2


def test_settings_that_do_not_fit_are_named(data: DataConfig):
    model = tiny_model("0_0", vocab_size=VOCAB_SIZE)
    with pytest.raises(UserError, match="^perplexity.context_length=129: allowed is 128 or less"):
        evaluate(model, data, context_length=129)
    with pytest.raises(UserError, match="^perplexity.stride=200: allowed is perplexity.context_length=128 or less"):
        evaluate(model, data, stride=200)
    Path(data.validation_files).write_text('{"text": " "}\n')
    with pytest.raises(UserError, match="^data.validation_files=.*: holds no text"):
        evaluate(model, data)
