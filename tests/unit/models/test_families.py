"""Models of other families, read as ours: the same logits, from the same tensors."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from lckv.costs import ModelSizes, count_parameters
from lckv.errors import UserError
from lckv.loading import load_model
from lckv.models import LCKVLlamaForCausalLM
from lckv.models.families import FAMILIES, read_config
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
CONFIGS = {
    "llama": (LlamaConfig(**SIZES), "0_1_2"),
    "llama 3": (LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE), "0_1_2"),
    "llama with biases": (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), "0_1_2"),
    "smollm2": (LlamaConfig(**SIZES, tie_word_embeddings=True), "0_1_2"),
    "mistral": (MistralConfig(**SIZES, sliding_window=5, head_dim=16), "0s_1s_2s"),
    "mistral without windows": (MistralConfig(**SIZES, sliding_window=None), "0_1_2"),
    "qwen2": (Qwen2Config(**SIZES), "0_1_2"),
    "qwen2 with windows": (
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=True),
        "0_1s_2s",
    ),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), "0_1_2"),
    "qwen3 with biases": (Qwen3Config(**SIZES, head_dim=16, attention_bias=True), "0_1_2"),
}


def random_model(config):
    """A model of transformers' own whose norms and biases matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_same_logits_from_the_same_tensors(name):
    config, layer_types = CONFIGS[name]
    original = random_model(config)
    ours = LCKVLlamaForCausalLM(read_config(config.to_dict())).eval()
    assert ours.config.kv_sharing == layer_types
    ours.load_state_dict(original.state_dict())
    input_ids = torch.randint(300, (2, 12))
    expected = original(input_ids).logits
    torch.testing.assert_close(ours(input_ids).logits, expected, atol=2e-5, rtol=0)

    steps = ours.generate(input_ids[:, :4], max_new_tokens=5, do_sample=False)
    assert steps.equal(original.generate(input_ids[:, :4], max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted(name):
    config = read_config(CONFIGS[name][0].to_dict())
    model = LCKVLlamaForCausalLM(config)
    assert count_parameters(config.sharing_plan, ModelSizes.from_config(config)) == model.num_parameters()


def test_every_family_is_tested():
    assert {config.model_type for config, _ in CONFIGS.values()} == set(FAMILIES)


def test_a_shared_model_of_a_family_keeps_what_is_its_own():
    config = read_config(CONFIGS["qwen3 with biases"][0].to_dict() | {"num_hidden_layers": 3})
    shared = type(config).from_dict(config.to_dict(), layer_types="0_0_2")
    model = LCKVLlamaForCausalLM(shared)
    assert not hasattr(model.model.layers[1].self_attn, "k_norm") and hasattr(
        model.model.layers[1].self_attn, "q_norm"
    )
    assert model.model.layers[0].self_attn.k_proj.bias is not None


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_folders_of_other_families_can_be_generated_from(name, tmp_path):
    original = random_model(CONFIGS[name][0])
    original.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    input_ids = torch.randint(300, (1, 9))
    torch.testing.assert_close(model(input_ids).logits, original(input_ids).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("config", [BertConfig(), MixtralConfig()], ids=lambda config: config.model_type)
def test_others_are_refused_by_name(config):
    with pytest.raises(UserError, match=f"is of model_type '{config.model_type}'; allowed are lckv-llama, llama, "):
        read_config(config.to_dict())


def test_quantised_weights_are_refused():
    values = LlamaConfig(**SIZES).to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(UserError, match=r"its weights are quantised \(gptq\)"):
        read_config(values)
