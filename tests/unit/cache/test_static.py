"""The static cache: one compiled step for every token, fixed addresses, and what does not fit."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

from lckv.cache import StaticKVCache, build_cache
from lckv.cache.static import StaticLayer, StaticRingLayer
from lckv.errors import UserError
from tests.contract.caches import exact_model, plain_store
from tests.reference import tiny_model, token_ids


def buffer_addresses(cache):
    return [tensor.data_ptr() for layer in cache.owners().values() for tensor in (*layer.streams, layer.num_seen)]


@pytest.mark.parametrize("layer_types", ["0_2_2", "0s_1s_1", "1s_1s"])  # cycles, rings, both
@torch.no_grad()
def test_decoding_is_compiled_once_without_graph_breaks(layer_types):
    torch._dynamo.reset()
    model = exact_model(layer_types)
    counter = CompileCounter()
    step = torch.compile(model, backend=counter, fullgraph=True)
    cache, input_ids = StaticKVCache(model.config, 16), token_ids(2, 14)
    logits = [model(input_ids[:, :5], past_key_values=cache).logits]
    addresses = buffer_addresses(cache)
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits += [step(token, past_key_values=cache).logits for token in input_ids[:, 5:].split(1, dim=1)]
    assert counter.frame_count == 1 and buffer_addresses(cache) == addresses
    torch.testing.assert_close(torch.cat(logits, dim=1), model(input_ids, use_cache=False).logits, atol=1e-4, rtol=0)
    cache.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):  # the next text finds what was compiled for this one
        model(input_ids[:, :3], past_key_values=cache)
        again = step(input_ids[:, 3:4], past_key_values=cache).logits
    torch.testing.assert_close(again, model(input_ids[:, :4], use_cache=False).logits[:, -1:], atol=1e-4, rtol=0)
    assert buffer_addresses(cache) == addresses


@torch.no_grad()
def test_generate_compiles_the_step_of_a_padded_batch_once():
    """What `generate` does by itself on a GPU: the prompt eagerly, then one compiled step for all tokens."""
    torch._dynamo.reset()
    model, graphs = exact_model("0_2s_2_2s"), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    input_ids = token_ids(2, 6)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :3] = 0
    options = {"attention_mask": attention_mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids, use_cache=False, **options)
    compile_config = CompileConfig(backend=backend, fullgraph=True, dynamic=False, mode=None)
    compile_config._compile_all_devices = True
    actual = model.generate(
        input_ids, past_key_values=StaticKVCache(model.config, 16), compile_config=compile_config, **options
    )
    assert torch.equal(actual, expected)
    assert len(graphs) == 1


@torch.no_grad()
def test_windows_are_rings_unless_they_are_longer_than_the_cache():
    config = exact_model("0s_1s_2_2").config
    layers = StaticKVCache(config, 16).owners()
    assert [type(layers[owner]) for owner in (0, 1, 2)] == [StaticRingLayer, StaticRingLayer, StaticLayer]
    assert [layers[owner].num_slots for owner in (0, 1, 2)] == [3, 3, 16]
    assert {type(layer) for layer in StaticKVCache(config, 3).owners().values()} == {StaticLayer}
    assert StaticKVCache(config, 16).get_max_length() == 16


@pytest.mark.parametrize("max_length", [1, 3, 9])
@torch.no_grad()
def test_a_text_may_fill_the_cache_to_the_last_slot(max_length):
    model = exact_model("0s_1s_2_2")
    input_ids = token_ids(2, max_length)
    cache = StaticKVCache(model.config, max_length)
    logits = [model(token, past_key_values=cache).logits for token in input_ids.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(input_ids, use_cache=False).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_too_long_texts_are_refused_before_anything_is_written():
    model = exact_model("0s_1s_2_2")
    cache = StaticKVCache(model.config, 8)
    with pytest.raises(UserError, match="9 tokens for cache.max_length=8"):
        model(token_ids(1, 9), past_key_values=cache)
    assert cache.num_bytes() == 0
    model(token_ids(1, 6), past_key_values=cache)
    before = cache.fork()
    with pytest.raises(UserError, match="9 tokens for cache.max_length=8"):
        model(token_ids(1, 3), past_key_values=cache)
    for layer, old in zip(cache.owners().values(), before.owners().values(), strict=True):
        assert torch.equal(layer.keys, old.keys) and torch.equal(layer.num_seen, old.num_seen)
    with pytest.raises(UserError, match="9 tokens for cache.max_length=8"):
        model.generate(token_ids(1, 6), past_key_values=StaticKVCache(model.config, 8), max_new_tokens=9)


def test_a_compiled_step_beyond_the_end_is_refused_where_generate_prepares_it():
    model = exact_model("0_0_2_2")
    cache = StaticKVCache(model.config, 8)
    mask = model.create_masks_for_generate(attention_mask=torch.ones(2, 5), past_key_values=cache)
    assert mask.shape == (2, 8)
    with pytest.raises(UserError, match="9 tokens for cache.max_length=8"):
        model.create_masks_for_generate(attention_mask=torch.ones(2, 9), past_key_values=cache)


@pytest.mark.parametrize("max_length", [0, -1, 2.5, True, "8", None])
def test_wrong_lengths_are_refused(max_length):
    with pytest.raises(UserError, match="cache.max_length"):
        StaticKVCache(exact_model("0_0_2_2").config, max_length)


def test_a_missing_length_is_refused():
    with pytest.raises(UserError, match="needs 'max_length'"):
        build_cache("static", exact_model("0_0_2_2").config)


@torch.no_grad()
def test_rows_are_reordered_in_place():
    model = exact_model("0s_1s_2_2")
    cache = StaticKVCache(model.config, 16)
    model(token_ids(3, 6), past_key_values=cache)
    addresses = buffer_addresses(cache)
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert buffer_addresses(cache) == addresses


@torch.no_grad()
def test_another_batch_size_needs_a_reset():
    model = exact_model("0_0_2_2")
    cache = StaticKVCache(model.config, 16)
    model(token_ids(3, 6), past_key_values=cache)
    with pytest.raises(ValueError, match="2 sequences for a cache that holds 3"):
        model(token_ids(2, 1), past_key_values=cache)


@torch.no_grad()
def test_a_ring_takes_back_exactly_what_it_has_not_overwritten():
    ring = StaticRingLayer(plain_store(4), 4)
    states = torch.arange(12.0).view(1, 1, 12, 1).expand(-1, 2, -1, 8)

    def feed(first, stop):
        for index in range(first, stop):
            ring.update(states[:, :, index : index + 1], states[:, :, index : index + 1])

    feed(0, 4)
    ring.crop(-3)  # nothing has been overwritten
    feed(1, 6)
    ring.crop(-1)  # 5 tokens; the fifth but last was overwritten by the sixth, and no query will see it
    with pytest.raises(RuntimeError, match="window of 4 tokens has dropped"):
        ring.crop(-1)  # would need it
    assert int(ring.get_seq_length()) == 5
    positions = ring.key_positions(1)[0]
    keys, _ = ring.update(states[:, :, 5:6], states[:, :, 5:6])
    assert torch.equal(keys[0, 0, :, 0], positions.float()) and sorted(positions.tolist()) == [2, 3, 4, 5]


@torch.no_grad()
def test_what_is_taken_back_leaves_no_nan():
    model = exact_model("0s_1s_2_2", sliding_window=8)
    cache, rows = StaticKVCache(model.config, 16), token_ids(1, 5)
    model(rows, past_key_values=cache)
    poison = torch.full((1, 1, 32), float("nan"))
    model(inputs_embeds=poison, past_key_values=cache)
    cache.crop(-1)
    tokens = token_ids(1, 2, seed=1)
    logits = model(tokens[:, :1], past_key_values=cache).logits
    expected = model(torch.cat([rows, tokens[:, :1]], dim=1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_gradients_flow_through_one_call_over_several_passes():
    model = tiny_model("0_3_3_3_4", backward_passes=3, forward_passes=1)
    input_ids = token_ids(2, 9)
    gradients = []
    for cache in (None, StaticKVCache(model.config, 16)):
        model.zero_grad()
        model(input_ids, labels=input_ids, past_key_values=cache, use_cache=cache is not None).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)
