"""Quantised pages: what is read from them, against the quantised cache without pages."""

import pytest
import torch

from lckv.cache import build_cache, load_cache, save_cache
from lckv.cache.paged.quantized import QuantizedPagedKVCache
from lckv.engine.continuous import ContinuousBatcher
from lckv.errors import UserError
from tests.contract.caches import exact_model, feed, live_bytes
from tests.reference import tiny_config, token_ids

pytestmark = pytest.mark.usefixtures("no_grad")
OPTIONS = {"layout": "paged", "group_size": 4}


def pair(model, **options):
    """A cache in pages and one without, else alike."""
    options = {"bits": 4, "residual_length": 5, "group_size": 4} | options
    return [build_cache("quantized", model.config, **options, layout=layout) for layout in ("paged", "dynamic")]


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0s_1s_2_2", "0_2s_2_2s", "0_3_3_3_4"])
def test_pages_hold_what_groups_hold(layer_types, bits):
    model = exact_model(layer_types, sliding_window=9)
    paged, dynamic = pair(model, bits=bits)
    assert isinstance(paged, QuantizedPagedKVCache)
    seq_length = 0
    for chunk in (6, 1, 9, 1, 1, 4, 12, 1, 5, 1, 1, 1):
        tokens = token_ids(2, chunk, seed=seq_length)
        seq_length += chunk
        logits = [model(tokens, past_key_values=cache).logits for cache in (paged, dynamic)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
        assert paged.num_bytes() == live_bytes(paged) == paged.planned_bytes(seq_length, 2, torch.float32)
        assert 0 < paged.num_used_bytes() <= paged.num_bytes()


@pytest.mark.parametrize("num_removed", [2, 5, 7, 13])
def test_taking_tokens_back_opens_an_encoded_page(num_removed):
    model = exact_model("0_0_2_2")
    caches = pair(model)
    for cache in caches:
        feed(model, cache, token_ids(2, 27), [20, 1, 6])
        cache.crop(-num_removed)
    logits = [feed(model, cache, token_ids(2, 15, seed=1), [1, 1, 1, 1, 11]) for cache in caches]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_beams_share_pages_until_they_write():
    model = exact_model("0_2s_2_2s", sliding_window=9)
    caches = pair(model)
    for cache in caches:
        feed(model, cache, token_ids(2, 22), [22])
        cache.batch_repeat_interleave(3)
    order = torch.tensor([2, 2, 1, 4, 3, 3])
    for step in range(12):
        tokens = token_ids(6, 1, seed=step)
        logits = [model(tokens, past_key_values=cache).logits for cache in caches]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
        for cache in caches:
            cache.reorder_cache(order)
    layer = caches[0].owners()[0]
    assert len(layer.exact) < 6 * 4


def test_layers_of_a_group_encode_the_same_pages():
    model = exact_model("1s_1s_3s_3s", sliding_window=9)
    cache = build_cache("quantized", model.config, residual_length=12, **OPTIONS)
    cache.add("a")
    for step, num_new in enumerate((8, 7, 1)):  # the fork goes on to hold what leaves the window
        mask, positions = cache.select(["a"], [num_new])
        tokens = token_ids(1, num_new, seed=step)
        model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        if step == 0:
            cache.fork_sequence("a", "b")
        first, last = cache.owners().values()
        assert first.exact == last.exact
    assert len(first.exact) < cache.num_used_pages() / 2


def test_saved_pages_are_restored_bit_by_bit(tmp_path):
    model = exact_model("0s_1s_2_2", sliding_window=9)
    cache, _ = pair(model, bits=2)
    feed(model, cache, token_ids(3, 30), [21, 1, 8])
    save_cache(cache, tmp_path / "cache.safetensors")
    restored = load_cache(tmp_path / "cache.safetensors", model.config)
    assert isinstance(restored, QuantizedPagedKVCache) and restored.options() == cache.options()
    twins = [cache.fork(), restored, cache]
    logits = [feed(model, twin, token_ids(3, 15, seed=1), [1] * 9 + [6]) for twin in twins]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_a_beginning_that_was_computed_before_is_found_after_it_is_encoded():
    model = exact_model("0_0_2_2")
    cache = build_cache("quantized", model.config, residual_length=5, num_pages=16, **OPTIONS)
    text = token_ids(1, 30)
    cache.add("first")
    mask, positions = cache.select(["first"], [30])
    model(text, attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.record_tokens("first", text[0].tolist())
    cache.remove("first")
    num_known = cache.add("second", text[0].tolist())
    assert num_known == 28
    mask, positions = cache.select(["second"], [2])
    logits = model(text[:, 28:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    expected = model(text, use_cache=False).logits[:, 28:]
    assert float((logits - expected).abs().max() / expected.std()) < 0.05


def test_wrong_options_are_refused():
    config = tiny_config("0_0_2_2")
    with pytest.raises(UserError, match=r"cache\.layout='pagd': allowed are .*; did you mean 'paged'\?"):
        build_cache("quantized", config, layout="pagd")
    with pytest.raises(UserError, match=r"cache\.bits=5"):
        build_cache("quantized", config, bits=5, layout="paged")
    with pytest.raises(UserError, match=r"cache\.num_pages=4 with cache\.layout='dynamic'"):
        build_cache("quantized", config, num_pages=4)
    with pytest.raises(UserError, match=r"cache\.num_pages=0"):
        build_cache("quantized", config, num_pages=0, layout="paged")


def test_continuous_batching_gives_pages_back():
    model = exact_model("0_2s_2_2s", sliding_window=9)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    cache = build_cache("quantized", model.config, residual_length=3, bits=8, num_pages=24, **OPTIONS)
    batcher = ContinuousBatcher(model, cache, max_rows=2)
    for request, length in enumerate((20, 9, 14)):
        prompt = token_ids(1, length, seed=request)[0].tolist()
        batcher.add_request(prompt, str(request), max_new_tokens=10 + request)
    outputs = batcher.run()
    assert [len(outputs[str(request)].generated_tokens) for request in range(3)] == [10, 11, 12]
    assert cache.num_used_pages() == 0 and cache.num_used_bytes() == 0
