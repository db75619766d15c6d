"""Models whose owners keep other streams than keys and values: every path of the model, and every cache, agrees."""

import copy
from itertools import cycle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from lckv.cache import build_cache
from tests.contract.caches import LOSSY, VARIANTS, assert_close, feed, live_bytes
from tests.layouts import KINDS, LATENTS, layout_model
from tests.reference import PATTERNS as ALL_PATTERNS
from tests.reference import SHAPES, exact_logits, token_ids
from tests.samples import pairwise

PATTERNS = ["0_1_1_3", "0s_0_2s_2", "0_2_2_3", "2s_1s_2_1"]
LENGTH = 9

over_kinds = pytest.mark.parametrize("kind", [*KINDS, *LATENTS])
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
    for layer_types in PATTERNS + ["0_2:0_2_1:2s"] * (kind == "separate"):
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


OPTIONS = {
    "plain": {},
    "biases": {"attention_bias": True},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
        }
    },
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "eager": {"attn_implementation": "eager"},
    "nodiag": {"force_nodiag": True},
    "norms": {"use_qk_norm": True},
    "window-of-one": {"sliding_window": 1},
    "wide-heads": {"head_dim": 24},
    **SHAPES,
}


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (kind, number)
        for kind in LATENTS
        for number, pattern in enumerate(ALL_PATTERNS)
        if kind == "separate" or ":" not in pattern  # a single latent makes both keys and values
    ],
)
@torch.no_grad()
def test_latents_are_what_the_plain_reading_says(kind, number):
    """Token by token with lists of keys and values, whole, padded, packed, and cached token by token."""
    plain = [
        name for name in OPTIONS if name not in ("llama3", "yarn", "dynamic", "norms", "gemma")
    ]  # which the plain reading has not
    options = OPTIONS[plain[number % len(plain)]]
    model, input_ids = layout_model(kind, ALL_PATTERNS[number], **options), token_ids(2, LENGTH)
    expected = torch.stack([exact_logits(model, row) for row in input_ids])
    assert_close(model(input_ids, use_cache=False).logits, expected)
    assert_close(feed(model, build_cache("dynamic", model.config), input_ids, [1] * LENGTH), expected)
    mask = torch.ones(2, LENGTH + 3, dtype=torch.long)
    mask[0, :3] = mask[1, :1] = 0
    padded = torch.zeros_like(mask)
    padded[mask.bool()] = torch.cat([input_ids[0], input_ids[1], input_ids[1, :2]])
    cache = build_cache("dynamic", model.config)
    logits = feed(model, cache, padded, [4, 1, 2, 1, 1, 1, 1, 1], attention_mask=mask)
    assert_close(logits[0, 3:], expected[0])
    assert_close(logits[1, 1 : LENGTH + 1], expected[1])
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH)])[None]
    packed = torch.cat([input_ids[:1, :5], input_ids[1:]], dim=1)
    for cache in (False, True):
        logits = model(packed, position_ids=positions, use_cache=cache).logits
        assert_close(logits[0, :5], expected[0, :5])
        assert_close(logits[0, 5:], expected[1])
    if "s" in ALL_PATTERNS[number]:
        return  # windows count padding
    right = torch.ones(2, LENGTH, dtype=torch.long)  # a row that is shorter, and goes on behind its padding
    right[0, 3:5] = 0
    shorter = torch.cat([input_ids[0, :3], torch.zeros(2, dtype=torch.long), input_ids[0, 3:7]])
    rows = torch.stack([shorter, input_ids[1]])
    logits = feed(model, build_cache("dynamic", model.config), rows, [5, 1, 1, 2], attention_mask=right)
    assert_close(torch.cat([logits[0, :3], logits[0, 5:]]), expected[0, :7])
    assert_close(logits[1], expected[1])


@pytest.mark.parametrize(("options", "kind", "half"), pairwise(list(OPTIONS), list(LATENTS), [0, 1]))
@torch.no_grad()
def test_cached_latents_equal_uncached_ones(options, kind, half):
    if kind == "decoupled" and OPTIONS[options].get("use_qk_norm"):
        pytest.skip("normalised keys are no sum of two projections")
    model, input_ids = layout_model(kind, "0_1s_1_3", **OPTIONS[options]), token_ids(2, 40)
    expected = model(input_ids, use_cache=False).logits
    for name, settings in list(VARIANTS.values())[half::2]:
        settings = settings | ({"max_length": 48} if "max_length" in settings else {})
        if name != "sink":  # whose text is cut
            cache = build_cache(name, model.config, **settings)
            assert_close(feed(model, cache, input_ids, [20, 1, 1, 7, 1, 10]), expected)


@pytest.mark.parametrize("kind", LATENTS)
@torch.no_grad()
def test_sinks_count_the_tokens_that_are_left(kind):
    """Behind dropped tokens, the next one sees what it would in a text without them."""
    model, input_ids = layout_model(kind, "0_1_1_3"), token_ids(1, 30)
    cache = build_cache("sink", model.config, num_sinks=2, window=6)
    logits = feed(model, cache, input_ids, [8] + [1] * 22)
    # Of one layer's attention alone, as layers above see latents that were made while other tokens were there.
    first = layout_model(kind, "0")
    cache = build_cache("sink", first.config, num_sinks=2, window=6)
    kept = torch.cat([input_ids[:, :2], input_ids[:, -6:]], dim=1)
    expected = first(kept, use_cache=False).logits[:, -1]
    assert_close(feed(first, cache, input_ids, [8] + [1] * 22)[:, -1], expected)
    assert logits.isfinite().all()


@pytest.mark.parametrize(("kind", "layer_types"), list(zip(LATENTS, cycle(["0_2_2", "0s_1s_1"]))))
@torch.no_grad()
def test_compiled_decoding_of_latents(kind, layer_types):
    torch._dynamo.reset()
    model, input_ids = layout_model(kind, layer_types), token_ids(2, 8)
    expected = model(input_ids, use_cache=False).logits
    step = torch.compile(model, backend="eager")
    for cache in (
        StaticCache(config=model.config, max_cache_len=9),
        build_cache("static", model.config, max_length=9),
    ):
        logits = [model(input_ids[:, :3], past_key_values=cache).logits]
        logits += [step(token, past_key_values=cache).logits for token in input_ids[:, 3:].split(1, dim=1)]
        assert_close(torch.cat(logits, dim=1), expected)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", LATENTS)
def test_latents_compiled_with_inductor_equal_eager(kind):
    torch._dynamo.reset()
    model, input_ids = layout_model(kind, "0_1_1_3"), token_ids(2, 8)
    trained = copy.deepcopy(model).train()
    losses = [each(input_ids, labels=input_ids, use_cache=False).loss for each in (trained, torch.compile(trained))]
    assert_close(losses[1], losses[0])
    losses[1].backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained.parameters() if parameter.grad is not None)
    with torch.no_grad():
        cache, step = build_cache("static", model.config, max_length=9), torch.compile(model)
        logits = [model(input_ids[:, :3], past_key_values=cache).logits]
        logits += [step(token, past_key_values=cache).logits for token in input_ids[:, 3:].split(1, dim=1)]
        assert_close(torch.cat(logits, dim=1), model(input_ids, use_cache=False).logits)


@torch.no_grad()
def test_tracing_leaves_nothing_behind():
    model, input_ids = layout_model("decoupled", "0_1_1_3"), token_ids(1, 6)
    model.config.use_cache = False
    torch.export.export(model, (input_ids,), strict=False)
    exported = torch.export.export(layout_model("decoupled", "0_1_1_3", use_cache=False), (input_ids,), strict=False)
    assert_close(exported.module()(input_ids).logits, model(input_ids).logits)
