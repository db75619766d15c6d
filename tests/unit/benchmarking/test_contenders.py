"""Which models and caches are compared, and what they are called."""

import pytest
import torch

from lckv.benchmark import load_models
from lckv.benchmarking.measuring import CacheChoice, choose_caches, combine
from lckv.benchmarking.settings import checkpoint_labels
from lckv.benchmarking.traffic import RecordsTraffic
from lckv.cache import DynamicKVCache, StaticKVCache
from lckv.config import BenchmarkConfig
from lckv.errors import UserError
from tests.reference import tiny_model


def test_caches_by_name_and_with_options():
    assert choose_caches(["dynamic"], {}) == [CacheChoice("dynamic")]
    chosen = choose_caches(["dynamic", "sink", {"name": "sink", "num_sinks": 2}], {"window": 8, "num_sinks": 3})
    assert [choice.options for choice in chosen] == [
        {},
        {"window": 8, "num_sinks": 3},
        {"window": 8, "num_sinks": 2},
    ]
    assert chosen[2].label == "sink window=8 num_sinks=2"


def test_the_same_cache_twice_is_refused():
    with pytest.raises(UserError, match="caches: 'dynamic' is there twice"):
        choose_caches(["dynamic", {"name": "dynamic"}], {})


def test_every_model_meets_every_cache():
    models = {"a": tiny_model("0_1"), "b": tiny_model("0_0")}
    assert [each.label for each in combine(models, choose_caches(["dynamic"], {}))] == ["a", "b"]
    both = combine(models, choose_caches(["dynamic", "static"], {}))
    assert [each.label for each in both] == ["a, dynamic", "a, static", "b, dynamic", "b, static"]
    assert both[0].model is both[1].model
    assert both[2].model.config.sharing_plan.layer_types == "0_0"


def test_a_cache_of_fixed_length_gets_the_length_unless_told():
    model = tiny_model("0_0")
    default, given = combine({"m": model}, choose_caches(["static", {"name": "static", "max_length": 7}], {}))
    assert default.new_cache(30).options()["max_length"] == 30
    assert given.new_cache(30).options()["max_length"] == 7
    recording = default.new_cache(30, RecordsTraffic)
    assert isinstance(recording, RecordsTraffic) and isinstance(recording, StaticKVCache)
    assert type(combine({"m": model}, choose_caches(["dynamic"], {}))[0].new_cache(30)) is DynamicKVCache


def test_checkpoints_are_called_by_what_tells_them_apart():
    labels = checkpoint_labels(["runs/a/model", "runs/b/model/", "c", "yoco"], taken=["yoco"])
    assert labels == {"model": "runs/a/model", "b/model": "runs/b/model/", "c": "c", "yoco ": "yoco"}


def test_random_weights_depend_on_the_seed_alone():
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2)
    arguments = dict.fromkeys(("a", "b"), {"layer_types": "0_0", **sizes})
    models = load_models(BenchmarkConfig(device="cpu", dtype="bfloat16", seed=1), arguments)
    first, again = models.values()
    (other,) = load_models(BenchmarkConfig(device="cpu", seed=2), {"a": arguments["a"]}).values()
    assert (first.dtype, other.dtype) == (torch.bfloat16, torch.float32) and not first.training
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight.bfloat16())
