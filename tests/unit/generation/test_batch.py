"""Compiled decoding through transformers' generate()."""

import pytest
import torch

from lckv.cache import build_cache
from lckv.generation.batch import compile_config
from tests.reference import tiny_model, token_ids


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layer_types", ["0_3_3_3_4", "0s_1s_2_2"])
def test_generate_with_a_compiled_static_cache_equals_the_dynamic_one(layer_types):
    model = tiny_model(layer_types, sliding_window=4, forward_passes="converge", converge_tolerance=1e-9)
    options = {"max_new_tokens": 9, "do_sample": False}
    input_ids = token_ids(2, 6)
    expected = model.generate(input_ids, past_key_values=build_cache("dynamic", model.config), **options)
    cache = build_cache("static", model.config, max_length=16)
    config = compile_config(model.device)
    actual = model.generate(input_ids, past_key_values=cache, compile_config=config, **options)
    assert torch.equal(actual, expected)
    cache.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = model.generate(input_ids, past_key_values=cache, compile_config=config, **options)
    assert torch.equal(actual, expected)


def test_only_a_gpu_gets_cuda_graphs():
    assert compile_config(torch.device("cuda")).mode == "reduce-overhead"
    on_cpu = compile_config(torch.device("cpu"))
    assert (on_cpu.mode, on_cpu._compile_all_devices) == (None, True)
