"""Associative recall: what sequences are made of, and what models of known memory reach."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv.cache import build_cache
from lckv.config import DataConfig, EvaluationConfig, RecallConfig
from lckv.errors import UserError
from lckv.evaluation.evaluations import Subject
from lckv.evaluation.recall import ordinary_tokens, recall, recall_sequence
from tests.reference import tiny_model
from tests.tiny import byte_tokenizer
from tests.unit.evaluation.models import Bigram, InductionHead

VOCAB_SIZE = 257


def config(batch_size: int = 8, **options) -> EvaluationConfig:
    options = {"num_pairs": [4, 8], "num_queries": 3, "num_samples": 10} | options
    return EvaluationConfig(["recall"], batch_size, recall=RecallConfig(**options))


def subject(model, seed: int = 0, **options) -> Subject:
    return Subject(model, byte_tokenizer(), DataConfig(), seed=seed, **options)


@given(num_pairs=st.integers(1, 30), data=st.data(), seed=st.text(max_size=4), has_prefix=st.booleans())
@settings(max_examples=50, deadline=None)
def test_every_query_is_a_key_and_its_answer_follows(num_pairs, data, seed, has_prefix):
    num_queries = data.draw(st.integers(1, num_pairs))
    prefix = [500] if has_prefix else []
    sequence = recall_sequence(list(range(100, 160)), num_pairs, num_queries, seed, prefix)
    assert len(sequence.input_ids) == len(prefix) + 2 * num_pairs + 2 * num_queries - 1
    assert sequence.input_ids[: len(prefix)] == prefix
    pairs = sequence.input_ids[len(prefix) :][: 2 * num_pairs]
    assert len(set(pairs)) == 2 * num_pairs and set(pairs) <= set(range(100, 160))
    value_of = dict(zip(pairs[::2], pairs[1::2], strict=True))
    asked = [*sequence.input_ids[len(prefix) + 2 * num_pairs :], sequence.answers[-1]]
    assert len(set(asked[::2])) == num_queries
    assert [value_of[key] for key in asked[::2]] == asked[1::2] == sequence.answers
    assert sequence == recall_sequence(list(range(100, 160)), num_pairs, num_queries, seed, prefix)


def test_special_tokens_and_those_beyond_the_model_are_left_out():
    tokenizer = byte_tokenizer(additional_special_tokens=["<mark>"])
    tokenizer.add_tokens(["added"])
    assert ordinary_tokens(tokenizer, 300) == list(range(256))
    assert ordinary_tokens(tokenizer, 100) == list(range(100))


@pytest.mark.parametrize("batch_size", [7, 100])
def test_a_model_that_looks_up_recalls_everything(batch_size: int):
    figures = recall(subject(InductionHead(VOCAB_SIZE)), config(batch_size))
    assert figures == {
        "accuracy": 1.0,
        "choice_accuracy": 1.0,
        "by_num_pairs": {"4": 1.0, "8": 1.0},
        "choice_by_num_pairs": {"4": 1.0, "8": 1.0},
        "chance_by_num_pairs": {"4": 0.25, "8": 0.125},
        "num_queries": 3,
        "num_samples": 10,
        "seed": 0,
    }
    json.dumps(figures)


def test_a_model_without_memory_is_at_chance():
    figures = recall(subject(Bigram(VOCAB_SIZE)), config(100, num_samples=300, num_queries=1))
    assert figures["by_num_pairs"]["4"] < 0.03
    for num_pairs, chance in figures["chance_by_num_pairs"].items():
        assert figures["choice_by_num_pairs"][num_pairs] == pytest.approx(chance, abs=0.07)


@pytest.mark.parametrize("layer_types", ["0_1", "0_0_2_2", "0s_1s_2_2", "0_2_2_3"])
def test_neither_batches_nor_caches_change_figures(layer_types: str):
    model = tiny_model(layer_types, vocab_size=VOCAB_SIZE, forward_passes="converge", converge_tolerance=1e-7)
    figures = [
        recall(subject(model, new_cache=new_cache), config(batch_size))
        for new_cache in (None, lambda: build_cache("dynamic", model.config))
        for batch_size in (4, 64)
    ]
    assert figures[0]["choice_accuracy"] > 0 and all(each == figures[0] for each in figures)


def test_figures_depend_on_the_seed_and_not_on_what_else_is_asked_for():
    model = tiny_model("0_1", vocab_size=VOCAB_SIZE)
    both, one = (
        recall(subject(model), config(num_samples=40)),
        recall(subject(model), config(num_pairs=[8], num_samples=40)),
    )
    assert both["choice_by_num_pairs"]["8"] == one["choice_by_num_pairs"]["8"] == one["choice_accuracy"]
    other = recall(subject(model, seed=1), config(num_samples=40))
    assert other["choice_by_num_pairs"] != both["choice_by_num_pairs"] and other["seed"] == 1


def train_on_recall(model, max_steps: int = 1000) -> None:
    """Until four pairs are recalled."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0)
    for step in range(max_steps):
        sequences = [
            recall_sequence(range(model.vocab_size), 4, 4, f"training {step} {number}", []) for number in range(32)
        ]
        input_ids = torch.tensor([sequence.input_ids for sequence in sequences])
        answers = torch.tensor([sequence.answers for sequence in sequences])
        logits = model(input_ids, use_cache=False, logits_to_keep=7).logits[:, ::2]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.3:
            return


@pytest.mark.slow
def test_a_model_can_learn_it():
    model = tiny_model("0_1", vocab_size=32, hidden_size=64, intermediate_size=64, initializer_range=0.05)
    cfg = config(100, num_pairs=[4], num_queries=4, num_samples=100)
    untrained = recall(subject(model), cfg)
    train_on_recall(model.train())
    trained = recall(subject(model), cfg)
    assert untrained["accuracy"] < 0.15 and untrained["choice_accuracy"] < 0.4
    assert trained["accuracy"] > 0.8 and trained["choice_accuracy"] >= trained["accuracy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pairs": [129]}, r"x\.recall\.num_pairs=129: allowed is at most 128, half of the vocabulary's tokens"),
        ({"num_pairs": [30]}, r"x\.recall\.num_pairs=30: allowed with 3 queries is at most 29, by the positions"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        recall(subject(InductionHead(VOCAB_SIZE, max_position_embeddings=64), key_prefix="x."), config(**options))


def test_the_longest_sequence_fills_the_models_positions():
    model = InductionHead(VOCAB_SIZE, max_position_embeddings=64)
    lengths = []
    model.register_forward_pre_hook(lambda _, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True)
    recall(subject(model), config(num_pairs=[29], num_samples=1))
    assert lengths == [63]
