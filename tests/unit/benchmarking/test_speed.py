"""Speed as an evaluation."""

from functools import partial

import pytest

from lckv.benchmarking.speed import evaluate_speed
from lckv.cache import build_cache
from lckv.config import DataConfig, EvaluationConfig, SpeedConfig
from lckv.errors import UserError
from lckv.evaluation.evaluations import Subject
from lckv.sharing.costs import ModelSizes, count_kv_bytes
from tests.reference import tiny_model
from tests.tiny import byte_tokenizer

CONFIG = EvaluationConfig(["speed"], speed=SpeedConfig(prompt_length=12, new_tokens=4, batch_size=3, rounds=2))


@pytest.mark.parametrize(
    ("cache", "label"),
    [
        (None, "dynamic"),
        ({"name": "quantized", "layout": "paged", "bits": 4, "group_size": 4}, "quantized bits=4"),
    ],
)
def test_figures_of_the_chosen_cache(cache: dict | None, label: str):
    model = tiny_model("0_0_2_2")
    new_cache = None if cache is None else partial(build_cache, config=model.config, **cache)
    figures = evaluate_speed(Subject(model, byte_tokenizer(), DataConfig(), new_cache), CONFIG)
    assert figures["cache"].startswith(label)
    assert ("layout=paged" in figures["cache"]) == (cache is not None and "layout" in cache)
    assert min(figures["prefill_tokens_per_second"], figures["decode_tokens_per_second"]) > 0
    assert figures["first_token_seconds"] >= 12 / figures["prefill_tokens_per_second"] * 0.5
    if cache is None:
        counted = count_kv_bytes(model.config.sharing_plan, ModelSizes.from_config(model.config), 16, "float32")
        assert figures["kv_bytes_resident"] == counted.resident_total
        assert figures["kv_bytes_written"] == counted.written and figures["kv_bytes_read"] == counted.read


def test_what_cannot_be_done_is_said_in_one_line():
    model = tiny_model("0_0_2_2", max_position_embeddings=15)
    with pytest.raises(UserError, match="^speed.prompt_length=12 and speed.new_tokens=4: make 16 tokens"):
        evaluate_speed(Subject(model, byte_tokenizer(), DataConfig()), CONFIG)
    model = tiny_model("0_0_2_2")
    too_short = partial(build_cache, "static", model.config, max_length=13)
    with pytest.raises(UserError, match="cache.max_length=13"):
        evaluate_speed(Subject(model, byte_tokenizer(), DataConfig(), too_short), CONFIG)
