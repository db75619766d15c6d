"""Engines of vLLM answer as our own `generate` does, and hold as many tokens more as a pattern promises."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lckv import LCKVLlamaForCausalLM
from lckv.config.hints import GroupConfig
from lckv.errors import UserError
from lckv.families import read_model
from lckv.serving.hints import emit_hint
from lckv.sharing.costs import ModelSizes, count_costs
from lckv.sharing.patterns import parse_layer_types
from tests.serving.models import SIZES, answer, assert_served_alike, engine, kv_tokens, prompts, save, tiny_model

pytest.importorskip("vllm")
pytestmark = pytest.mark.serving

PATTERNS = {
    "llama": "0_1_2_3_4_5",
    "cla3": "0_0_0_3_3_3",
    "yoco": "0s_1s_2s_3_3_3",
    "mix": "0_1s_1s_0_4s_4s",
    "windows": "0s_0_2s_3_2s_3s",  # full readers of layers with windows, and the other way round
    "owners that read others": "0_0_1_1s_2_4",
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SETTINGS = {
    "like Qwen": dict(attention_bias=True, attention_output_bias=False, use_qk_norm=True, tie_word_embeddings=True),
    "like GPT-2": dict(
        norm_type="layer_norm",
        gated_mlp=False,
        hidden_act="gelu_new",
        attention_bias=True,
        mlp_bias=True,
        learned_positions=True,
    ),
    "like Gemma": dict(
        hidden_act="gelu_pytorch_tanh",
        use_output_norms=True,
        embedding_multiplier=8.0,
        attention_multiplier=0.2,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    ),
    "like Granite": dict(residual_multiplier=0.4, logits_scaling=3.0, final_logit_softcapping=5.0),
    "yarn": dict(rope_parameters=YARN | {"partial_rotary_factor": 0.5}),
    "llama3": dict(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 64}),
}


@pytest.mark.parametrize("layer_types", PATTERNS.values(), ids=PATTERNS)
def test_tokens_and_logprobs_are_those_of_generate(layer_types, tmp_path):
    model = tiny_model(layer_types=layer_types)
    given = prompts()
    with engine(save(model, tmp_path)) as llm:
        assert_served_alike(llm, model, given)
        # Once more, with beginnings that are in the cache, and others' ends behind them.
        assert_served_alike(llm, model, [prompt + given[0] for prompt in given])
        plan, fit = parse_layer_types(layer_types), tokens_that_fit(layer_types)
        if any(plan.owner_is_sliding(owner) for owner in plan.kv_owners):  # which keep less than all tokens
            assert kv_tokens(llm) > 1.2 * fit
        else:
            assert kv_tokens(llm) == pytest.approx(fit, rel=1e-3)


def tokens_that_fit(layer_types: str) -> float:
    """Tokens in the cache of 1 GiB, where every owner keeps all of them."""
    costs = count_costs(parse_layer_types(layer_types), ModelSizes.from_config(SIZES), 512, dtype="float32")
    return 2**30 / costs.kv_bytes.written


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_other_families_have_is_served(settings, tmp_path):
    model = tiny_model(layer_types="0_0s_2_2", **settings)
    with engine(save(model, tmp_path)) as llm:
        assert_served_alike(llm, model, prompts())


@pytest.mark.parametrize("layer_types", ["0s_1s_2_2", "0_0_2_2"])
def test_fast_prefill(layer_types, tmp_path):
    model = tiny_model(layer_types=layer_types)
    with engine(save(model, tmp_path), kv_sharing_fast_prefill=True) as llm:
        assert_served_alike(llm, model, prompts())


def test_recycled_blocks_hold_nothing_that_a_reader_still_needs(tmp_path):
    """Blocks behind a window are given to others; a full reader of the layer with the window needs them."""
    model = tiny_model(layer_types="0s_0_0s_3s")
    given = [prompt[:60] for prompt in prompts()] * 3
    with engine(save(model, tmp_path), num_gpu_blocks_override=24, max_model_len=128) as llm:
        assert_served_alike(llm, model, given)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs with g++")
def test_compiled(tmp_path):
    model = tiny_model(layer_types="0s_0_1_1")
    with engine(save(model, tmp_path), enforce_eager=False) as llm:
        assert_served_alike(llm, model, prompts())


@pytest.mark.parametrize(
    ("family", "key"), [((LlamaConfig, LlamaForCausalLM), "layer_types"), ((Qwen3Config, Qwen3ForCausalLM), "hint")]
)
def test_a_model_of_another_family_is_served_with_a_pattern(family, key, tmp_path):
    sizes = {name: value for name, value in SIZES.items() if name != "sliding_window"} | {"num_hidden_layers": 4}
    torch.manual_seed(0)
    plain = family[1](family[0](**sizes)).eval()
    folder = save(plain, tmp_path / "plain")
    overrides = {"architectures": ["LCKVLlamaForCausalLM"], "layer_types": "0_0_2s_2"}
    if key == "hint":
        hint = tmp_path / "hint.json"
        group = GroupConfig(layer_types="0_0_2s_2")
        asked = emit_hint("router", 4, group, sliding_window=16, context_length=64)
        hint.write_text(json.dumps(asked.as_dict()), encoding="utf-8")
        overrides = {"architectures": ["LCKVLlamaForCausalLM"], "sharing_hint": str(hint)}
    config = read_model(plain.config).config.to_dict() | {"layer_types": "0_0_2s_2"}
    if key == "hint":
        config["sliding_window"] = 16
    shared = LCKVLlamaForCausalLM(type(read_model(plain.config).config).from_dict(config)).eval()
    shared.load_state_dict(plain.state_dict(), strict=False)  # without what readers do not need
    assert answer(shared, prompts()[2]) != answer(plain, prompts()[2])
    with engine(folder, hf_overrides=overrides) as llm:
        assert_served_alike(llm, shared, prompts())


def test_a_cache_smaller_than_the_longest_request_is_refused(tmp_path):
    folder = save(tiny_model(layer_types="0_0"), tmp_path)
    with pytest.raises(ValueError, match="KV cache"):
        with engine(folder, num_gpu_blocks_override=2):
            pass


def test_heads_that_the_kernel_has_not_are_refused(tmp_path):
    folder = save(tiny_model(layer_types="0_0", head_dim=24), tmp_path)
    with pytest.raises(UserError, match=r"^head_dim=24: CPU_ATTN of vLLM has no such size; allowed are 32, 64, "):
        with engine(folder):
            pass


def test_weights_of_another_pattern_are_refused(tmp_path):
    folder = save(tiny_model(layer_types="0_0_2_2"), tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for layer_types, wrong in (
        ("0_1_2_2", "has model.layers.1.self_attn.k_proj"),
        ("0_0_0_0", "has no model.layers.2"),
    ):
        changed = json.dumps(config | {"kv_sharing": layer_types})
        (folder / "config.json").write_text(changed, encoding="utf-8")
        with pytest.raises(UserError, match=f"^layer_types={layer_types!r}: a model of this pattern {wrong}"):
            with engine(folder):
                pass
