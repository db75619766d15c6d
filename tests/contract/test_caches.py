"""What every cache keeps to, in every pattern: a new entry of the registry is tested without being named here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv.cache import CACHES, build_cache
from lckv.cache.layers import KVLayer, ReaderLayer
from lckv.errors import UserError
from tests.contract.caches import (
    LENGTH,
    LOSSY,
    MIXED,
    VARIANTS,
    WINDOWED,
    addresses,
    assert_close,
    exact_model,
    feed,
    in_patterns,
    live_bytes,
    new_cache,
    with_lossy,
)
from tests.reference import PATTERNS, SHAPES, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")


# --- one store per layer that computes KV -----------------------------------------------------------------------


@in_patterns(PATTERNS, 2, (*VARIANTS, *LOSSY))
def test_readers_resolve_to_their_owners_storage_and_never_write(name, layer_types):
    model = exact_model(layer_types)
    cache = new_cache(name, model)
    plan = model.config.sharing_plan
    feed(model, cache, token_ids(2, 5), [3, 1, 1])
    assert tuple(cache.owners()) == plan.kv_owners and len(cache) == plan.num_hidden_layers
    assert len({id(layer) for layer in cache.owners().values()}) == len(plan.kv_owners)
    for layer_plan, layer in zip(plan.layers, cache.layers, strict=True):
        store = cache.storage(layer_plan.layer_idx)
        assert store is cache.owners()[layer_plan.key_source]
        assert isinstance(store, KVLayer) and isinstance(layer, KVLayer if layer_plan.computes_kv else ReaderLayer)
        if not layer_plan.computes_kv:
            before = addresses(store)
            assert before and addresses(layer.owner) == before
            if layer.keys is not None:
                assert layer.keys.data_ptr() == store.keys.data_ptr()
                assert layer.values.data_ptr() == cache.owners()[layer_plan.value_source].values.data_ptr()
            states = torch.ones(2, 2, 1, 8)
            with pytest.raises(RuntimeError, match=f"layer {layer_plan.layer_idx} reads the KV of layer"):
                cache.update(states, states, layer_plan.layer_idx)
            assert addresses(store) == before


@in_patterns(PATTERNS, 3, (*VARIANTS, *LOSSY), first=1)
def test_reported_bytes_are_those_of_live_tensors_and_of_the_plan(name, layer_types):
    model, batch_size = exact_model(layer_types), 3
    cache, empty = new_cache(name, model), new_cache(name, model)
    assert cache.num_bytes() == 0
    seq_length = 0
    for chunk in (2, 1, 1, 6, 1, 3):  # windows of 3 fill up by single tokens and by a longer chunk
        seq_length += chunk
        model(token_ids(batch_size, chunk, seed=seq_length), past_key_values=cache)
        assert cache.num_bytes() == live_bytes(cache)
        assert cache.num_bytes() == empty.planned_bytes(seq_length, batch_size, torch.float32)
        assert cache.batch_size == batch_size


@with_lossy
def test_reported_bytes_in_half_precision(name):
    model = exact_model("0s_1s_2_2").to(torch.bfloat16)
    cache = new_cache(name, model)
    feed(model, cache, token_ids(2, 6), [5, 1])
    assert cache.num_bytes() == live_bytes(cache) == new_cache(name, model).planned_bytes(6, 2, torch.bfloat16)


# --- windows and exactness -----------------------------------------------------------------------------------


def check_step_by_step(name, layer_types, chunks, batch_size=2, **config):
    model = exact_model(layer_types, **config)
    input_ids = token_ids(batch_size, sum(chunks))
    assert_close(feed(model, new_cache(name, model), input_ids, chunks), model(input_ids, use_cache=False).logits)


@in_patterns(PATTERNS, 4)
def test_token_by_token_equals_one_forward_pass(name, layer_types):
    check_step_by_step(name, layer_types, [1] * LENGTH)


@in_patterns(WINDOWED, 2)
@pytest.mark.parametrize("window", [1, 5])
def test_windows_of_other_sizes(name, layer_types, window):
    check_step_by_step(name, layer_types, [4, 1, 1, 3, 1, 1], sliding_window=window)


def test_no_layer_may_see_its_own_token(name):
    check_step_by_step(name, "0s_1s_2_2", [4, 1, 2, 1], force_nodiag=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_other_families_add_to_llama(name, shape):
    if (name, shape) == ("sink", "gpt2"):
        pytest.skip("learned positions cannot be moved")
    check_step_by_step(name, "2_0s_2s_0", [4, 1, 1, 3], **SHAPES[shape])


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_any_chunks_in_any_pattern(data):
    with torch.no_grad():
        check_step_by_step(
            data.draw(st.sampled_from(list(VARIANTS)), label="name"),
            data.draw(st.sampled_from(PATTERNS), label="layer_types"),
            data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5), label="chunks"),
            batch_size=data.draw(st.integers(1, 3), label="batch_size"),
            sliding_window=data.draw(st.integers(1, 6), label="window"),
        )


@in_patterns(["0_0_2_2", *WINDOWED, "0_3_3_3_4"], 2)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_left_padding(name, layer_types, attn_implementation):
    model = exact_model(layer_types, attn_implementation=attn_implementation)
    rows = [token_ids(1, length, seed=length)[0] for length in (LENGTH, 7, 4)]
    input_ids = torch.stack([torch.nn.functional.pad(row, (LENGTH - len(row), 0)) for row in rows])
    attention_mask = torch.stack([torch.arange(LENGTH) >= LENGTH - len(row) for row in rows]).long()
    chunks = [8, 1, 1, 1] if attn_implementation == "sdpa" else [4, 4, 1, 2]
    cache, stop = new_cache(name, model), 0
    logits = []
    for size in chunks:
        stop += size
        logits.append(feed(model, cache, input_ids[:, stop - size : stop], None, attention_mask[:, :stop]))
    for row, tokens in enumerate(rows):
        expected = model(tokens[None], use_cache=False).logits[0]
        assert_close(torch.cat(logits, dim=1)[row, LENGTH - len(tokens) :], expected)


@in_patterns(MIXED)
@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_half_precision(name, layer_types, precision):
    model, input_ids = exact_model(layer_types), token_ids(2, LENGTH)
    expected = model(input_ids, use_cache=False).logits
    cache = new_cache(name, model)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        logits = feed(model, cache, input_ids, [5, 1, 1, 3, 1]).float()
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert cache.num_bytes() == live_bytes(cache)


@in_patterns(MIXED, first=1)
@pytest.mark.parametrize("filled_with", [torch.bfloat16, torch.float32])
def test_autocast_goes_on_in_the_types_that_the_cache_holds(name, layer_types, filled_with):
    model, input_ids = exact_model(layer_types), token_ids(2, LENGTH)
    expected = model(input_ids, use_cache=False).logits
    cache = new_cache(name, model)
    logits = [feed(model.to(filled_with), cache, input_ids[:, :5]).float()]
    with torch.autocast("cpu", torch.bfloat16):
        logits.append(feed(model.to(torch.float32), cache, input_ids[:, 5:], [1, 1, 3, 1]).float())
    difference = torch.cat(logits, dim=1) - expected
    assert difference.norm() < 0.05 * expected.norm()
    assert cache.num_bytes() == live_bytes(cache)
    assert cache.num_bytes() == new_cache(name, model).planned_bytes(LENGTH, 2, filled_with)


@with_lossy
def test_what_autocast_has_filled_is_not_promoted_outside(name):
    model, cache = exact_model("0s_1s_2_2"), new_cache(name, exact_model("0s_1s_2_2"))
    with torch.autocast("cpu", torch.bfloat16):
        feed(model, cache, token_ids(2, 5))
    before = cache.num_bytes()
    with pytest.raises(UserError, match="layer 0 of the cache holds bfloat16, and the model gives it float32"):
        feed(model, cache, token_ids(2, 1))
    assert cache.num_bytes() == before


@in_patterns(["0_0_2_2", "0s_1s_2_2", "0_2s_2_2s"], 2)
def test_announced_sizes_are_those_of_the_returned_keys(name, layer_types):
    model = exact_model(layer_types)
    cache = new_cache(name, model)
    seq_length = 0
    for num_new in (1, 5, 1, 1, 4):
        before = {owner: int(cache.get_seq_length(owner)) for owner in cache.owners()}
        sizes = {owner: cache.get_mask_sizes(num_new, owner) for owner in cache.owners()}
        cache.begin_forward(model.config, None, num_new)
        for owner in cache.owners():
            positions = cache.get_key_positions(num_new, owner)
            states = torch.randn(2, 2, num_new, 8)
            peeked = cache.peek((states, states + 1), owner)
            keys, values = cache.update(states, states + 1, owner)
            assert torch.equal(peeked[0], keys) and torch.equal(peeked[1], values)
            num_keys, offset = sizes[owner]
            assert keys.shape[2] == values.shape[2] == num_keys and before[owner] == seq_length
            places = torch.arange(offset, offset + num_keys) if positions is None else positions[0]
            for index in range(num_new):
                place = (places == seq_length + index).nonzero().item()
                assert torch.equal(keys[:, :, place], states[:, :, index])
        seq_length += num_new
        assert {int(cache.get_seq_length(layer)) for layer in range(len(cache))} == {seq_length}


# --- wrong use --------------------------------------------------------------------------------------------------


def test_a_cache_for_another_pattern_is_refused(name):
    model = exact_model("0_0_2_2")
    cache = new_cache(name, exact_model("0_1_2_3"))
    with pytest.raises(UserError, match="0_1_2_3.*0_0_2_2"):
        model(token_ids(1, 2), past_key_values=cache)
    assert cache.num_bytes() == 0


def test_a_cache_for_a_smaller_window_is_refused(name):
    model = exact_model("0s_0s_2_2", sliding_window=7)
    cache = new_cache(name, exact_model("0s_0s_2_2", sliding_window=4))
    with pytest.raises(UserError, match="for a sliding_window of 4 in a model with 7"):
        model(token_ids(1, 2), past_key_values=cache)
    assert cache.num_bytes() == 0


def test_a_model_without_a_pattern_is_refused(name):
    from transformers import LlamaConfig

    with pytest.raises(UserError, match="'llama'"):
        build_cache(VARIANTS[name][0], LlamaConfig(num_hidden_layers=2), **VARIANTS[name][1])


@pytest.mark.parametrize("name", list(CACHES), indirect=True)
def test_unknown_names_and_options_are_refused(name):
    config = exact_model("0_0_2_2").config
    with pytest.raises(UserError, match=f"did you mean '{name}'"):
        build_cache(name + "x", config)
    with pytest.raises(UserError, match="no option 'no_such_option'"):
        build_cache(name, config, no_such_option=1)


def test_options_make_an_equal_cache(name):
    model = exact_model("0s_1s_2_2")
    cache = new_cache(name, model)
    twin = build_cache(cache.name, model.config, **cache.options())
    assert type(twin) is type(cache) and twin.options() == cache.options()
    assert set(VARIANTS[name][1]) <= set(cache.options())
