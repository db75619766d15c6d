"""What every cache inherits: readers, planned bytes, refusals, and which store is on the GPU when."""

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from lckv.cache import DynamicKVCache, build_cache, load_cache, save_cache
from lckv.cache.base import KVCache
from lckv.cache.layers import ReaderLayer
from lckv.errors import UserError
from lckv.sharing.costs import ModelSizes, count_kv_bytes
from tests.reference import tiny_config, tiny_model, token_ids
from tests.strategies import layer_types as any_layer_types


@given(any_layer_types(max_layers=5), st.integers(1, 5), st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_bytes_are_the_plans_for_any_pattern(layer_types, window, seq_length):
    model = tiny_model(layer_types, sliding_window=window)
    cache = DynamicKVCache(model.config)
    with torch.no_grad():
        model(token_ids(2, seq_length), past_key_values=cache)
        model(token_ids(2, 1), past_key_values=cache)
    sizes = ModelSizes.from_config(model.config)
    expected = 2 * count_kv_bytes(model.config.sharing_plan, sizes, seq_length + 1, "float32").resident_total
    assert cache.num_bytes() == cache.planned_bytes(seq_length + 1, 2, torch.float32) == expected


def test_sharing_saves_what_the_plan_says():
    def num_bytes(layer_types):
        model = tiny_model(layer_types)
        cache = DynamicKVCache(model.config)
        with torch.no_grad():
            model(token_ids(1, 12), past_key_values=cache)
        return cache.num_bytes()

    llama = num_bytes("0_1_2_3_4_5_6_7")
    assert num_bytes("0_0_2_2_4_4_6_6") == llama / 2
    assert num_bytes("0_6_6_6_6_6_6_7") == 3 * llama / 8
    assert num_bytes("0s_1s_2s_3s_4_4_4_4") == (4 * 3 + 12) * llama / (8 * 12)  # windows of 3


def test_an_empty_cache_is_planned_to_hold_nothing():
    cache = DynamicKVCache(tiny_config("0_0_2_2"))
    assert cache.num_bytes() == cache.planned_bytes(0, 4, torch.float32) == 0
    assert cache.batch_size == -1 and cache.get_seq_length() == 0


def test_a_reader_follows_its_owner_in_everything():
    model = tiny_model("0_1s_1s_0")
    cache = DynamicKVCache(model.config)
    reader, owner = cache.layers[2], cache.layers[1]
    assert isinstance(reader, ReaderLayer) and reader.owner is owner and reader.sources[0].owner == 1
    assert reader.is_sliding and not cache.layers[3].is_sliding and not reader.is_initialized
    with torch.no_grad():
        model(token_ids(2, 5), past_key_values=cache)
    assert reader.is_initialized and reader.keys is owner.keys and reader.values is owner.values
    assert reader.get_seq_length() == 5 and reader.get_max_length() == 3
    assert reader.get_mask_sizes(2) == owner.get_mask_sizes(2) == (4, 3)
    with pytest.raises(RuntimeError, match="layer 2 reads the KV of layer 1 and never writes any"):
        reader.lazy_initialization(owner.keys, owner.values)


def test_operations_touch_each_store_once():
    model = tiny_model("0_0_0_0")
    cache = DynamicKVCache(model.config)
    with torch.no_grad():
        model(token_ids(2, 6), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.crop(-1)
    assert cache.get_seq_length() == 5 and cache.layers[0].keys.shape[2] == 5


def test_early_initialization_leaves_readers_alone():
    cache = DynamicKVCache(tiny_config("0_0_2_2"))
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    assert cache.is_initialized and cache.num_bytes() == 0


def test_a_refused_crop_changes_no_layer():
    model = tiny_model("0_1s_1_0s")  # both owners have a full reader
    windowed = tiny_model("0_1s_1s_0")
    for tiny, is_refused in ((model, False), (windowed, True)):
        cache = DynamicKVCache(tiny.config)
        with torch.no_grad():
            tiny(token_ids(1, 8), past_key_values=cache)
        with pytest.raises(RuntimeError, match="window of 3") if is_refused else contextlib.nullcontext():
            cache.crop(-4)
        lengths = {cache.get_seq_length(layer) for layer in range(4)}
        assert lengths == ({8} if is_refused else {4})


def test_a_cache_has_to_say_what_its_layers_are():
    with pytest.raises(TypeError, match="make_layer"):
        KVCache(tiny_config("0_0_2_2"))


def test_refusals_of_build_cache():
    config = tiny_config("0_0_2_2")
    with pytest.raises(UserError, match="unknown cache 'dynamics'.*did you mean 'dynamic'"):
        build_cache("dynamics", config)
    with pytest.raises(UserError, match="no option 'offload'.*did you mean 'offloading'"):
        build_cache("dynamic", config, offload=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to offload from")
def test_offloading_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="cache.offloading=True.*no CUDA device"):
        build_cache("dynamic", tiny_config("0_0_2_2"), offloading=True)


class FakeStream:
    """Stands for a CUDA stream where there is none."""

    def wait_stream(self, stream):
        pass


@pytest.fixture
def fake_streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


@pytest.mark.usefixtures("fake_streams")
@torch.no_grad()
def test_an_offloaded_cache_that_was_loaded_to_the_cpu_goes_where_it_is_used(tmp_path):
    model = tiny_model("0_0_2_2")
    cache = DynamicKVCache(model.config, offloading=True)
    model(token_ids(2, 6), past_key_values=cache)
    save_cache(cache, tmp_path / "cache.safetensors")
    restored = load_cache(tmp_path / "cache.safetensors", model.config)
    states = torch.empty(2, 2, 1, 8, device="meta")
    keys, values = restored.peek((states, states), 0)
    assert keys.device == values.device == states.device and keys.shape[2] == values.shape[2] == 7


@pytest.mark.usefixtures("fake_streams")
@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0_3_3_3_4", "3_3_3_3", "0_1s_1s_0"])
@torch.no_grad()
def test_offloading_fetches_a_store_before_its_use_and_the_next_one_ahead(layer_types):
    model = tiny_model(layer_types)
    cache = DynamicKVCache(model.config, offloading=True)
    on_gpu, most = set(), 0

    def watch(owner, layer):
        nonlocal most
        write, peek = layer.write, layer.peek

        def prefetch():
            nonlocal most
            on_gpu.add(owner)
            most = max(most, len(on_gpu))

        def checked(call):
            def run(streams):
                assert owner in on_gpu
                return call(streams)

            return run

        layer.prefetch, layer.offload = prefetch, lambda: on_gpu.discard(owner)
        layer.write, layer.peek = checked(write), checked(peek)

    for owner, layer in cache.owners().items():
        watch(owner, layer)
    plain = DynamicKVCache(model.config)
    for tokens in token_ids(2, 6).split(2, dim=1):
        logits = [model(tokens, past_key_values=each).logits for each in (cache, plain)]
        assert torch.equal(*logits)
        assert len(on_gpu) <= 1  # the first of the next step is on its way
    assert most <= 2


def test_other_caches_of_transformers_still_work_beside_ours():
    model = tiny_model("0_0_2_2")
    with torch.no_grad():
        expected = model(token_ids(1, 5), past_key_values=DynamicCache(config=model.config)).logits
        actual = model(token_ids(1, 5), past_key_values=DynamicKVCache(model.config)).logits
    assert torch.equal(actual, expected)


def test_a_copied_cache_is_a_fork():
    model = tiny_model("0_1s_1s_0")
    cache = DynamicKVCache(model.config)
    with torch.no_grad():
        model(token_ids(1, 5), past_key_values=cache)
        copied = copy.deepcopy(cache)
        model(token_ids(1, 5), past_key_values=cache)
    assert copied.get_seq_length() == 5 and cache.get_seq_length() == 10
    assert copied.layers[2].owner is copied.layers[1]
