"""Caches on a CUDA device: offloading, half precision, and compiled decoding with CUDA graphs."""

import pytest
import torch

from lckv.cache import CACHES, DynamicKVCache, StaticKVCache, build_cache
from tests.contract.caches import OPTIONS, exact_model, live_bytes
from tests.reference import PATTERNS, token_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIXED = ["0_0_2_2", "0_3_3_3_4", "0s_1s_2_2", "0_2s_2_2s", "3_3_3_3"]


def feed(model, cache, input_ids, chunks, step=None):
    logits = []
    for chunk in input_ids.split(chunks, dim=1):
        run = model if step is None or chunk.shape[1] > 1 else step
        logits.append(run(chunk, past_key_values=cache).logits.clone())
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("layer_types", PATTERNS)
@torch.no_grad()
def test_offloading_changes_nothing(layer_types):
    model, input_ids = exact_model(layer_types).cuda(), token_ids(2, 40).cuda()
    plain, offloaded = DynamicKVCache(model.config), DynamicKVCache(model.config, offloading=True)
    chunks = [20, 1, 1, 5] + [1] * 13
    torch.testing.assert_close(
        feed(model, offloaded, input_ids, chunks), feed(model, plain, input_ids, chunks), atol=1e-5, rtol=1e-5
    )
    assert offloaded.num_bytes() == plain.num_bytes()
    torch.cuda.synchronize()
    on_gpu = [layer for layer in offloaded.owners().values() if layer.keys.is_cuda]
    assert len(on_gpu) <= 1  # the first one of the next step is on its way


@torch.no_grad()
def test_offloading_in_generate():
    model, input_ids = exact_model("0_3_3_3_4").cuda(), token_ids(2, 12).cuda()
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(input_ids, past_key_values=DynamicKVCache(model.config), **options)
    offloaded = DynamicKVCache(model.config, offloading=True)
    assert torch.equal(model.generate(input_ids, past_key_values=offloaded, **options), expected)


@pytest.mark.parametrize("layer_types", MIXED)
@pytest.mark.parametrize("name", list(CACHES))
@torch.no_grad()
def test_half_precision(name, layer_types):
    model, input_ids = exact_model(layer_types).cuda(), token_ids(2, 24).cuda()
    expected = model(input_ids, use_cache=False).logits
    model = model.to(torch.bfloat16)
    cache = build_cache(name, model.config, **OPTIONS.get(name, {}))
    logits = feed(model, cache, input_ids, [11] + [1] * 8 + [4, 1]).float()
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert cache.num_bytes() == live_bytes(cache) == cache.planned_bytes(24, 2, torch.bfloat16)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layer_types", MIXED)
@torch.no_grad()
def test_decoding_as_a_cuda_graph(layer_types):
    torch._dynamo.reset()
    model, input_ids = exact_model(layer_types).cuda(), token_ids(2, 40).cuda()
    expected = model(input_ids, use_cache=False).logits
    cache = StaticKVCache(model.config, 48)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits = feed(model, cache, input_ids, [9] + [1] * 31, step)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    cache.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):  # the next text uses the same graph
        logits = feed(model, cache, input_ids, [4] + [1] * 36, step)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layer_types", ["0_0_2_2", "0_3_3_3_4", "0s_1s_2_2"])
@torch.no_grad()
def test_generate_compiles_by_itself(layer_types):
    torch._dynamo.reset()
    model, input_ids = exact_model(layer_types).cuda(), token_ids(2, 12).cuda()
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :5] = 0
    options = {"attention_mask": attention_mask, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(input_ids, use_cache=False, **options)
    actual = model.generate(input_ids, past_key_values=StaticKVCache(model.config, 48), **options)
    assert torch.equal(actual, expected)
