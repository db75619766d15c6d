"""Models of other families, read as ours: the same logits, from the same tensors."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from lckv.cache import build_cache
from lckv.config.names import LATENTS, XKV
from lckv.conversion.latent_models import to_latents
from lckv.errors import UserError
from lckv.families import FAMILIES, read_model
from lckv.loading.models import load_model
from lckv.models import LCKVLlamaForCausalLM
from lckv.sharing.costs import ModelSizes, count_parameters
from tests.tiny import byte_tokenizer

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
GPT2 = {
    "vocab_size": 300,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA3 = {
    **SIZES,
    "head_dim": 16,
    "sliding_window": 5,
    "query_pre_attn_scalar": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
CONFIGS = {
    "llama": (LlamaConfig(**SIZES), "0_1_2"),
    "llama 3": (LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE), "0_1_2"),
    "llama with biases": (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), "0_1_2"),
    "smollm2": (LlamaConfig(**SIZES, tie_word_embeddings=True), "0_1_2"),
    "mistral": (MistralConfig(**SIZES, sliding_window=5, head_dim=16), "0s_1s_2s"),
    "mistral without windows": (MistralConfig(**SIZES, sliding_window=None), "0_1_2"),
    "qwen2": (Qwen2Config(**SIZES, head_dim=16), "0_1_2"),  # which its class does not declare
    "qwen2 with windows": (
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=True),
        "0_1s_2s",
    ),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), "0_1_2"),
    "qwen3 with biases": (Qwen3Config(**SIZES, head_dim=16, attention_bias=True), "0_1_2"),
    "qwen3 with yarn": (Qwen3Config(**SIZES, head_dim=16, rope_parameters=YARN_ROPE), "0_1_2"),
    "gpt2": (GPT2Config(**GPT2), "0_1_2"),
    "gpt2 without scaling": (GPT2Config(**GPT2, n_inner=48, scale_attn_weights=False), "0_1_2"),
    "gemma 3": (Gemma3TextConfig(**GEMMA3), "0s_1_2s"),
    "gemma 3 with scaling": (
        Gemma3TextConfig(
            **GEMMA3,
            attention_bias=True,
            final_logit_softcapping=3.0,
            tie_word_embeddings=False,
            rope_parameters={"full_attention": YARN_ROPE, "sliding_attention": LLAMA3_ROPE},
        ),
        "0s_1_2s",
    ),
    "stablelm": (StableLmConfig(**SIZES), "0_1_2"),
    "stablelm with yarn": (
        StableLmConfig(**SIZES, use_qkv_bias=True, rope_parameters=YARN_ROPE | {"partial_rotary_factor": 0.5}),
        "0_1_2",
    ),
    "smollm3": (
        SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5, pad_token_id=0),
        "0_1s_2",
    ),
    "granite": (
        GraniteConfig(
            **SIZES,
            attention_multiplier=0.1,
            embedding_multiplier=12,
            residual_multiplier=0.22,
            logits_scaling=0.5,
            rope_parameters=LLAMA3_ROPE,
        ),
        "0_1_2",
    ),
}


def random_model(config):
    """A model of transformers' own whose norms and biases matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def read_in_memory(original):
    """The same model as one of ours."""
    reading = read_model(original.config.to_dict())
    ours = LCKVLlamaForCausalLM(reading.config).eval()
    ours.load_state_dict(dict(reading.tensors(original.state_dict())))
    return ours


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_same_logits_from_the_same_tensors(name):
    config, layer_types = CONFIGS[name]
    original = random_model(config)
    ours = read_in_memory(original)
    assert ours.config.kv_sharing == layer_types
    input_ids = torch.randint(300, (2, 12))
    expected = original(input_ids).logits
    torch.testing.assert_close(ours(input_ids).logits, expected, atol=2e-5, rtol=0)
    for cache in DynamicCache(config=ours.config), build_cache("static", ours.config, max_length=12):
        steps = [ours(token, past_key_values=cache).logits for token in input_ids.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=0)

    mask = torch.ones_like(input_ids)
    mask[1, :5] = 0
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    expected = original(input_ids, **padded).logits
    torch.testing.assert_close(ours(input_ids, **padded).logits[1, 5:], expected[1, 5:], atol=2e-5, rtol=0)
    steps = ours.generate(input_ids[:, :4], max_new_tokens=5, do_sample=False)
    assert steps.equal(original.generate(input_ids[:, :4], max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("kind", [kind for kind in LATENTS if kind != XKV])
@pytest.mark.parametrize("name", CONFIGS)
def test_latents_of_full_rank_give_the_original_logits(name, kind):
    original = random_model(CONFIGS[name][0])
    if kind == "decoupled_rope" and read_model(original.config.to_dict()).config.use_qk_norm:
        pytest.skip("normalised keys are no sum of two projections")
    if kind == "decoupled_rope" and name.startswith("gpt2"):
        pytest.skip("no plane of the keys turns")
    text = [torch.randint(300, (2, 24)) for _ in range(4)]
    ours, input_ids = to_latents(original, text, kind, ratio=1.0), torch.randint(300, (2, 12))
    with torch.no_grad():
        expected = original(input_ids).logits
        torch.testing.assert_close(ours(input_ids).logits, expected, atol=1e-4, rtol=0)
        cache = DynamicCache(config=ours.config)
        steps = [ours(token, past_key_values=cache).logits for token in input_ids.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted(name):
    config = read_model(CONFIGS[name][0].to_dict()).config
    model = LCKVLlamaForCausalLM(config)
    assert count_parameters(config.sharing_plan, ModelSizes.from_config(config)) == model.num_parameters()


STRANGE = {
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "use_qk_norm": True,
    "use_output_norms": True,
    "norm_type": "layer_norm",
    "gated_mlp": False,
    "learned_positions": True,
    "attention_multiplier": 0.7,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.3,
    "logits_scaling": 3.0,
    "final_logit_softcapping": 1.0,
    "force_nodiag": True,
    "kv_sharing": "0_0_0",
    "rope_layer_types": ["full_attention"] * 3,
    "kv_latents": [{"latent": 8}] * 3,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_settings_that_a_family_does_not_know_mean_nothing(name):
    config, layer_types = CONFIGS[name]
    known = config.to_dict()
    original = random_model(type(config).from_dict(known | {key: STRANGE[key] for key in STRANGE.keys() - known}))
    assert original.config.force_nodiag
    ours, input_ids = read_in_memory(original), torch.randint(300, (2, 12))
    assert ours.config.kv_sharing == layer_types
    torch.testing.assert_close(ours(input_ids).logits, original(input_ids).logits, atol=2e-5, rtol=0)


PARTLY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma 3", "stablelm"])
@torch.no_grad()
def test_a_part_of_each_head_is_rotated_where_the_family_does_so(name):
    values = CONFIGS[name][0].to_dict()
    kinds = [kind for kind in ("full_attention", "sliding_attention") if kind in values["rope_parameters"]]
    for rope_type in "default", "linear":
        rope = PARTLY | {"rope_type": rope_type, "factor": 2.0}
        values["rope_parameters"] = {kind: dict(rope) for kind in kinds} or rope
        original, input_ids = random_model(type(CONFIGS[name][0]).from_dict(values)), torch.randint(300, (2, 12))
        if rope_type == "default" or name == "stablelm":
            ours = read_in_memory(original)
            torch.testing.assert_close(ours(input_ids).logits, original(input_ids).logits, atol=2e-5, rtol=0)
        else:
            with pytest.raises(RuntimeError, match="must match the size"):
                original(input_ids)
            with pytest.raises(UserError, match=r"says partial_rotary_factor=0.5 with rope_type=linear.*allowed is"):
                read_model(values)


@torch.no_grad()
def test_the_class_that_transformers_makes_of_a_file_decides(tmp_path):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    values = MistralConfig(**SIZES, sliding_window=5, layer_types=kinds).to_dict() | {"architectures": None}
    original = random_model(AutoConfig.for_model(**values | {"model_type": "ministral"}))
    original.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    theirs, input_ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.randint(300, (1, 12))
    torch.testing.assert_close(model(input_ids).logits, theirs(input_ids).logits, atol=2e-5, rtol=0)
    assert model.config.kv_sharing == "0s_1_2s"
    # A model that was made of the one class stays what it is.
    assert read_model(MistralConfig.from_dict(values)).config.kv_sharing == "0s_1s_2s"


def test_every_family_is_tested():
    assert {config.model_type for config, _ in CONFIGS.values()} == set(FAMILIES)


def test_a_shared_model_of_a_family_keeps_what_is_its_own():
    config = read_model(CONFIGS["qwen3 with biases"][0].to_dict() | {"num_hidden_layers": 3}).config
    shared = type(config).from_dict(config.to_dict(), layer_types="0_0_2")
    model = LCKVLlamaForCausalLM(shared)
    assert not hasattr(model.model.layers[1].self_attn, "k_norm") and hasattr(
        model.model.layers[1].self_attn, "q_norm"
    )
    assert model.model.layers[0].self_attn.k_proj.bias is not None


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gpt2", "gemma 3 with scaling", "stablelm"])
@torch.no_grad()
def test_folders_of_other_families_can_be_generated_from(name, tmp_path):
    original = random_model(CONFIGS[name][0])
    original.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    input_ids = torch.randint(300, (1, 9))
    torch.testing.assert_close(model(input_ids).logits, original(input_ids).logits, atol=2e-5, rtol=0)
    model.save_pretrained(tmp_path / "ours")
    saved = LCKVLlamaForCausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(saved(input_ids).logits, model(input_ids).logits, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            BertConfig(),
            r"'bert'; allowed are lckv-llama, llama, .*, which this does not: bert.* is a tensor that ours",
        ),
        (
            MixtralConfig(),
            "'mixtral', which has experts in the place of its MLPs, as num_local_experts=8 says; allowed",
        ),
        (DeepseekV3Config(), r"'deepseek_v3', which keeps latents in the place of keys and values already \(MLA\)"),
    ],
    ids=["bert", "mixtral", "deepseek_v3"],
)
def test_others_are_refused_by_name(config, reason):
    with pytest.raises(UserError, match=f"is of model_type {reason}"):
        read_model(config.to_dict())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma3TextConfig(**GEMMA3, attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0"),
        (StableLmConfig(**SIZES, use_parallel_residual=True), "use_parallel_residual=True"),
        (StableLmConfig(**SIZES, qk_layernorm=True), "qk_layernorm=True"),
        (GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    ],
    ids=["softcap", "parallel", "qk-layernorm", "by-layer"],
)
def test_settings_that_our_models_lack_are_refused_by_name(config, reason):
    with pytest.raises(UserError, match=f"says {reason}, which the models here do not have; allowed is none"):
        read_model(config.to_dict())


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "smollm3", "gemma 3"])
def test_windows_of_no_length_are_refused(name):
    values = CONFIGS[name][0].to_dict() | {"layer_types": ["sliding_attention"] * 3, "sliding_window": None}
    with pytest.raises(UserError, match=r"has layers with windows \(sliding_attention in layer_types\), but no slid"):
        read_model(values)


def test_attention_that_looks_ahead_is_refused():
    with pytest.raises(UserError, match="says is_causal=False, which the models here do not have; allowed is True"):
        read_model(LlamaConfig(**SIZES, is_causal=False).to_dict())


def test_quantised_weights_are_refused():
    values = LlamaConfig(**SIZES).to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(UserError, match=r"its weights are quantised \(gptq\)"):
        read_model(values)
