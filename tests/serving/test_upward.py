"""Engines of vLLM answer as our own `generate` does where layers do not see their token's own key."""

import pytest

from lckv.errors import UserError
from tests.serving.models import assert_served_alike, engine, kv_tokens, prompts, save, tiny_model

pytest.importorskip("vllm")
pytestmark = pytest.mark.serving

LCKV = "0_4_4_4_4_5"
PATTERNS = {
    "lckv": LCKV,
    "sandwich-middle": "0_3_3_3_3_5",
    "lasagna-middle": "1_1_1_4_4_4",
    "pizza-middle": "0_3_3_3_3_3",
    "windows": "0_3s_3_3s_5s_5s",
    "windows alone": "0s_3s_3s_3s_5s_5s",
    "cycles that cross": "0_3_4s_3_4_4s",
}
EXPERIMENTAL: dict = {"hf_overrides": {"experimental": True}}


@pytest.mark.parametrize("layer_types", PATTERNS.values(), ids=PATTERNS)
def test_tokens_and_logprobs_are_those_of_generate(layer_types, tmp_path):
    """Some requests are prefilled, in chunks, while others decode."""
    # Smaller weights than the others have: a cycle adds up rounding errors.
    model = tiny_model(layer_types=layer_types, use_sequential=True, initializer_range=0.12)
    given = prompts()
    with engine(save(model, tmp_path), **EXPERIMENTAL) as llm:
        assert_served_alike(llm, model, given)
        # Texts whose beginnings are in the cache.
        assert_served_alike(llm, model, [given[2] + given[0], given[4] + given[0]])
        assert kv_tokens(llm) >= 0.999 * 2**30 / model.config.kv_layout.num_bytes(1, itemsize=4)  # of the one GiB


@pytest.mark.parametrize("layer_types", ["0_0_2s_2", "0_2_2_3"])
def test_no_layer_sees_its_own_key(layer_types, tmp_path):
    model = tiny_model(layer_types=layer_types, force_nodiag=True, use_sequential=True)
    with engine(save(model, tmp_path), **EXPERIMENTAL) as llm:
        assert_served_alike(llm, model, prompts())


def test_few_passes_are_those_of_generate(tmp_path):
    """They are not exact for long texts, and depend on what the first one reads: zeros, whoever was there before."""
    model = tiny_model(layer_types=LCKV, forward_passes=2)
    options = dict(max_num_batched_tokens=512, enable_prefix_caching=False, num_gpu_blocks_override=24)
    with engine(save(model, tmp_path), **options, **EXPERIMENTAL) as llm:
        for given in (prompts(), prompts()[::-1]):
            assert_served_alike(llm, model, given, forward_passes=2)


def test_few_passes_are_exact_for_chunks_as_short(tmp_path):
    model = tiny_model(layer_types=LCKV, forward_passes=2)
    with engine(save(model, tmp_path), long_prefill_token_threshold=4, **EXPERIMENTAL) as llm:
        model.config.use_sequential = True
        assert_served_alike(llm, model, prompts())


def test_compilation_is_refused(tmp_path):
    folder = save(tiny_model(layer_types=LCKV), tmp_path)
    with pytest.raises(UserError, match=r"^experimental=True: how often layers run .* add --enforce-eager$"):
        with engine(folder, enforce_eager=False, **EXPERIMENTAL):
            pass
