import copy
import json

import pytest
from transformers import AutoConfig, DynamicCache, LlamaConfig, PreTrainedConfig

from lckv import LCKVLlamaConfig
from lckv.errors import UserError


def test_string_survives_saving_and_copying(tmp_path):
    config = LCKVLlamaConfig(layer_types="0_1s_1_3s", hidden_size=32, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["kv_sharing"] == "0_1s_1_3s"
    PreTrainedConfig.from_pretrained(tmp_path)  # so do tools that know nothing of this class
    assert AutoConfig.from_pretrained(tmp_path, layer_types="0_0_2_2").kv_sharing == "0_0_2_2"
    replaced = AutoConfig.from_pretrained(tmp_path, kv_sharing="0_1_2_3")
    assert replaced.layer_types == ["full_attention"] * 4
    with pytest.raises(UserError, match="backward_passes=1"):
        AutoConfig.from_pretrained(tmp_path, layer_types="3_3_3_3", backward_passes=1)
    for other in (AutoConfig.from_pretrained(tmp_path), copy.deepcopy(config), LCKVLlamaConfig(**config.to_dict())):
        assert type(other) is LCKVLlamaConfig
        assert (other.kv_sharing, other.layer_types) == (config.kv_sharing, config.layer_types)
        assert other.num_hidden_layers == 4


def test_reads_the_authors_config_json(tmp_path):
    old = {
        "architectures": ["LCKVLlamaForCausalLM"],
        "model_type": "lckv-llama",
        "layer_types": "0_2_2_3",
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "rope_theta": 5000.0,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "forward_passes": 7,
        "backward_passes": 2,
        "transformers_version": "4.40.0",
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.kv_sharing == "0_2_2_3"
    assert config.rope_parameters["rope_theta"] == 5000.0


def test_without_a_string_it_is_llama():
    assert LCKVLlamaConfig(num_hidden_layers=3).kv_sharing == "0_1_2"
    assert LCKVLlamaConfig().num_hidden_layers == LlamaConfig().num_hidden_layers
    assert LCKVLlamaConfig(layer_types="0_0").num_hidden_layers == 2


def test_caches_keep_what_the_widest_reader_needs():
    config = LCKVLlamaConfig(layer_types="0s_1s_1_3s_3s", sliding_window=8, hidden_size=32, num_attention_heads=4)
    cache = DynamicCache(config=config)
    assert [getattr(layer, "is_sliding", None) for layer in cache.layers][:2] == [True, False]
    assert getattr(cache.layers[3], "is_sliding", False)
    assert config.kv_sharing_modes == [None, None, "reuse", None, "reuse"]


BY_KIND = {name: {"rope_type": "default", "rope_theta": theta} for name, theta in (("a", 1e4), ("b", 10.0))}


def test_rotary_embeddings_by_kind_are_saved_as_they_are_given():
    config = LCKVLlamaConfig(layer_types="0_1_2", rope_layer_types=["a", "b", "a"], rope_parameters=BY_KIND)
    again = LCKVLlamaConfig.from_dict(config.to_dict(), layer_types="0_0_2")
    assert (again.rope_layer_types, again.rope_parameters) == (["a", "b", "a"], BY_KIND)
    only = LCKVLlamaConfig(layer_types="0_1", rope_layer_types=["b", "b"], rope_parameters=BY_KIND)
    assert list(only.rope_parameters) == ["b"] and [only.rope_label(layer) for layer in (0, 1)] == ["b", "b"]
    assert LCKVLlamaConfig(layer_types="0_1").rope_label(1) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_types": "0_1", "num_hidden_layers": 3}, "has 2 entries, but num_hidden_layers=3"),
        ({"layer_types": "0_4"}, "entry 1 is '4', but there is no layer 4"),
        ({"layer_types": "1_1", "backward_passes": 1}, "backward_passes=1"),
        ({"layer_types": "0_1", "forward_passes": "convert"}, "forward_passes='convert'"),
        ({"layer_types": "0_1", "forward_passes": -1}, "forward_passes=-1"),
        ({"layer_types": "0_1", "sliding_window": 0}, "sliding_window=0"),
        ({"layer_types": "0_1", "converge_tolerance": -1.0}, "converge_tolerance=-1.0"),
        ({"layer_types": ["full_attention"]}, "must be a string"),
        ({"layer_types": "0_1", "norm_type": "layer"}, "norm_type='layer': allowed are rms_norm, layer_norm"),
        ({"layer_types": "0_1", "rope_layer_types": ["a"], "rope_parameters": BY_KIND}, "has 1 entries for 2 layers"),
        ({"layer_types": "0_1", "rope_layer_types": ["a", "c"], "rope_parameters": BY_KIND}, "'c': allowed are a, b"),
        ({"layer_types": "0_1", "rope_layer_types": ["a", "b"]}, "rope_layer_types='a': allowed are"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        LCKVLlamaConfig(**options)
