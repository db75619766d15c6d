"""Models whose owners keep other streams than keys and values: every path of the model, and every cache, agrees."""

import copy

import pytest
import torch
from transformers import DynamicCache

from lckv.cache import build_cache
from tests.contract.caches import LOSSY, VARIANTS, assert_close, feed, live_bytes
from tests.layouts import KINDS, layout_model
from tests.reference import token_ids

PATTERNS = ["0_1_1_3", "0s_0_2s_2", "0_2_2_3", "2s_1s_2_1"]
LENGTH = 9

over_kinds = pytest.mark.parametrize("kind", KINDS)
over_patterns = pytest.mark.parametrize("layer_types", PATTERNS)


@over_kinds
@over_patterns
def test_parallel_sequential_checkpointed_and_cached_agree(kind, layer_types):
    model, input_ids = layout_model(kind, layer_types), token_ids(2, LENGTH)
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    expected = model(input_ids, use_cache=False).logits
    padded = model(input_ids, attention_mask=mask, use_cache=False).logits
    with torch.no_grad():
        assert_close(padded[1], expected[1])
        assert_close(feed(model, DynamicCache(config=model.config), input_ids, [4, 1, 1, 3]), expected)
        sequential = copy.deepcopy(model)
        sequential.model.config.use_sequential = True
        assert_close(sequential(input_ids, use_cache=False).logits, expected)
    grads = []
    for checkpoints in (False, True):
        trained = layout_model(kind, layer_types, forward_passes=2).train()
        if checkpoints:
            trained.gradient_checkpointing_enable()
        trained(input_ids, labels=input_ids, use_cache=False).loss.backward()
        grads.append([parameter.grad for parameter in trained.parameters() if parameter.grad is not None])
    for one, other in zip(*grads, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("name", VARIANTS)
@over_kinds
def test_every_cache_is_exact_and_holds_what_the_layout_says(name, kind):
    for layer_types in PATTERNS:
        model, input_ids = layout_model(kind, layer_types), token_ids(2, LENGTH)
        cache_name, options = VARIANTS[name]
        cache = build_cache(cache_name, model.config, **options)
        with torch.no_grad():
            expected = model(input_ids, use_cache=False).logits
            assert_close(feed(model, cache, input_ids, [4, 1, 1, 3]), expected)
        assert cache.num_bytes() == live_bytes(cache)
        empty = build_cache(cache_name, model.config, **options)
        assert cache.num_bytes() == empty.planned_bytes(LENGTH, 2, torch.float32)


@pytest.mark.parametrize("name", LOSSY)
@over_kinds
def test_lossy_caches_report_the_bytes_that_they_hold(name, kind):
    model, input_ids = layout_model(kind, "0_2_2_3"), token_ids(2, LENGTH)
    cache_name, options = LOSSY[name]
    cache = build_cache(cache_name, model.config, **options)
    with torch.no_grad():
        feed(model, cache, input_ids, [4, 1, 1, 3])
    empty = build_cache(cache_name, model.config, **options)
    assert cache.num_bytes() == live_bytes(cache) == empty.planned_bytes(LENGTH, 2, torch.float32)


@over_kinds
def test_generation_with_transformers_own_cache_equals_ours(kind):
    model, input_ids = layout_model(kind, "0_1_1_3"), token_ids(1, 5)
    texts = [model.generate(input_ids, max_new_tokens=12, do_sample=False)]
    cache = build_cache("dynamic", model.config)
    texts.append(model.generate(input_ids, max_new_tokens=12, do_sample=False, past_key_values=cache))
    assert torch.equal(*texts)
