"""What can be loaded for generation, and what is said in one line where something is missing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lckv.errors import UserError
from lckv.loading.models import find_device, load_model
from lckv.models import LCKVLlamaForCausalLM
from tests.reference import tiny_model, token_ids
from tests.tiny import byte_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of ours."""
    path = tmp_path / "models" / "mine"
    model = tiny_model("0_3_3_3_4", vocab_size=300, forward_passes=3)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.1, eos_token_id=[2, 5])
    model.config.use_cache = False
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def llama_folder(path: Path, **config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=300)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, **config)).eval()
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return model


def message_of(name: object, **options) -> str:
    with pytest.raises(UserError) as error:
        load_model(str(name), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_of_ours(folder):
    model, tokenizer = load_model(str(folder))
    assert model.config.sharing_plan.layer_types == "0_3_3_3_4" and model.config.forward_passes == 3
    expected = tiny_model("0_3_3_3_4", vocab_size=300, forward_passes=3)
    assert torch.equal(model(token_ids(1, 9)).logits, expected(token_ids(1, 9)).logits)
    assert not model.training and model.config.use_cache
    assert tokenizer.decode(tokenizer("a{b}, ü")["input_ids"]) == "a{b}, ü"
    # Nothing that came with the model decides how it samples; which tokens end a text, it does.
    assert model.generation_config.eos_token_id == [2, 5]
    assert not model.generation_config.do_sample and model.generation_config.temperature is None


def test_types_and_devices(folder):
    assert load_model(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_model(str(folder), device="cpu")[0].device.type == "cpu"
    assert "dtype='bfloat': allowed are auto, float32" in message_of(folder, dtype="bfloat")
    with pytest.raises(UserError, match="device='cuda:99': there is no such device here; allowed are auto, cpu"):
        find_device("cuda:99")
    assert find_device("cpu:0") == find_device("cpu")  # as it is called where processes share a machine
    with pytest.raises(UserError, match="device='gpu'"):
        find_device("gpu")


@pytest.mark.parametrize("tie", [False, True])
def test_a_llama_becomes_one_of_ours(tmp_path, tie):
    llama = llama_folder(tmp_path / "llama", tie_word_embeddings=tie, attention_bias=True, rope_theta=5000.0)
    model, _ = load_model(str(tmp_path / "llama"))
    assert model.config.model_type == "lckv-llama" and model.config.sharing_plan.layer_types == "0_1_2"
    torch.testing.assert_close(model(token_ids(2, 12)).logits, llama(token_ids(2, 12)).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "biases", [(), ("q_proj", "v_proj", "k_proj"), ("q_proj", "v_proj", "k_proj", "o_proj"), ("_proj",)]
)
def test_a_gguf_file(tmp_path, biases):
    gguf = pytest.importorskip("gguf")
    llama = llama_folder(tmp_path / "llama", attention_bias=True, mlp_bias=True)
    for name, module in llama.named_modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            module.bias.data.normal_()
            module.bias = module.bias if any(part in name for part in biases) else None
    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, path, llama, byte_tokenizer())
    model, tokenizer = load_model(str(path))
    assert model.config.sharing_plan.layer_types == "0_1_2"
    torch.testing.assert_close(model(token_ids(2, 12)).logits, llama(token_ids(2, 12)).logits, atol=1e-4, rtol=0)
    assert tokenizer.decode(tokenizer("abc", add_special_tokens=False)["input_ids"]) == "abc"
    whole = path.read_bytes()
    for size in (4, 200, len(whole) // 2, len(whole) - 4000):
        path.write_bytes(whole[:size])
        assert message_of(path) == f"model={path}: is damaged or cut off; get it once more"


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = [1.0, 1.5, 1.0, 3.0]
LISTED = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS, "attention_factor": 1.0}
UNIFORM = LISTED | {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}


@pytest.mark.parametrize(
    ("rope", "settings"),
    [
        (LLAMA3 | {"original_max_position_embeddings": 8192}, {}),
        (LLAMA3 | {"original_max_position_embeddings": 64}, {"rope.scaling.original_context_length": 64}),
        (LISTED, {}),
        (LISTED | {"attention_factor": 1.5}, {"rope.scaling.attn_factor": 1.5}),
        (LISTED, {"rope.scaling.type": "linear", "rope.scaling.factor": 0.5}),
        (UNIFORM | {"attention_factor": 1.5}, {"rope.scaling.attn_factor": 1.5}),
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        ({"rope_type": "linear", "factor": 2.0}, {"rope.scale_linear": 2.0}),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, YARN),
        ({"rope_type": "linear", "factor": 4.0}, YARN | {"rope.scaling.yarn_ext_factor": 0.0}),
        ({"rope_type": "default"}, {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}),
        (
            {"rope_type": "default"},
            {"attention.causal": True, "rope.scaling.type": "none", "rope.scaling.factor": 2.0},
        ),
        ({"rope_type": "default"}, {"rope.scaling.type": "none", "attention.key_length": 8, "expert_count": 0}),
    ],
)
def test_a_gguf_file_says_how_positions_are_scaled(tmp_path, rope, settings):
    """Scalings by frequency are a tensor, computed here by transformers' own functions; the others are settings."""
    gguf = pytest.importorskip("gguf")
    rope = {"rope_theta": 500.0, "original_max_position_embeddings": 256, **rope}
    llama = llama_folder(tmp_path / "llama", rope_parameters=rope, max_position_embeddings=256)
    tensors = {}
    if rope["rope_type"] in ("llama3", "longrope"):
        plain = 500.0 ** -(torch.arange(0, 8, 2) / 8)
        scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](llama.config, "cpu")
        stretched_already = settings.get("rope.scaling.factor", 1.0)
        tensors["rope_freqs.weight"] = plain / scaled / stretched_already
    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, path, llama, byte_tokenizer(), settings=settings, tensors=tensors)
    model, _ = load_model(str(path))
    assert model.config.rope_parameters["rope_type"] == rope["rope_type"]
    input_ids = token_ids(1, 200)
    torch.testing.assert_close(model(input_ids).logits, llama(input_ids).logits, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "saved")
    again = LCKVLlamaForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(input_ids).logits, llama(input_ids).logits, atol=1e-4, rtol=0)


def test_a_gguf_file_says_that_attention_has_a_window(tmp_path):
    gguf = pytest.importorskip("gguf")
    llama = llama_folder(tmp_path / "llama")
    path = tmp_path / "tiny.gguf"
    write_gguf(gguf, path, llama, byte_tokenizer(), settings={"attention.sliding_window": 5})
    model, _ = load_model(str(path))
    assert model.config.sharing_plan.layer_types == "0s_1s_2s" and model.config.sliding_window == 5
    mistral = MistralForCausalLM(MistralConfig.from_dict(llama.config.to_dict() | {"sliding_window": 5})).eval()
    mistral.load_state_dict(llama.state_dict())
    torch.testing.assert_close(model(token_ids(2, 24)).logits, mistral(token_ids(2, 24)).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("settings", "tensors", "answer"),
    [
        ({"attention.scale": 0.1}, {}, r"says llama\.attention\.scale=0\.1"),
        ({"attn_logit_softcapping": 50.0}, {}, "says llama.attn_logit_softcapping=50.0"),
        ({"rope.dimension_count": 4}, {}, "says llama.rope.dimension_count=4; allowed is the width of a head, 8"),
        ({"rope.scaling.type": "longrope"}, {}, "rope.scaling.type=longrope; allowed are none, linear, yarn"),
        ({"attention.causal": False}, {}, "says llama.attention.causal=False"),
        (
            YARN | {"rope.scaling.yarn_ext_factor": 0.5},
            {},
            "says rope.scaling.yarn_ext_factor=0.5; allowed are 0 and 1",
        ),
        (YARN, {"rope_freqs.weight": torch.ones(4)}, "says rope.scaling.type=yarn and holds rope_freqs.weight"),
        ({}, {"rope_factors_long.weight": torch.ones(4)}, "holds rope_factors_long.weight"),
        (
            {},
            {"blk.0.attn_q_norm.weight": torch.ones(8)},
            "holds blk.0.attn_q_norm.weight, which the models here do not",
        ),
    ],
)
def test_what_a_gguf_file_says_and_no_model_here_does_is_refused_by_name(tmp_path, settings, tensors, answer):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    llama = llama_folder(tmp_path / "llama")
    write_gguf(gguf, path, llama, byte_tokenizer(), settings=settings, tensors=tensors)
    with pytest.raises(UserError, match=answer):
        load_model(str(path))


def write_gguf(
    gguf: Any,
    path: Path,
    llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    settings: dict[str, float | str] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    config, writer = llama.config, gguf.GGUFWriter(path, "llama")
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in (settings or {}).items():
        add[type(value)](f"llama.{name}", value)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(
        [token for token, _ in vocab]
        + ["ab" if n == 0 else f"<unused{n}>" for n in range(config.vocab_size - len(vocab))]
    )
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in llama.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if num_heads := next((number for part, number in heads.items() if f"{part}." in name), None):
            # GGUF keeps the two halves that a rotation mixes side by side.
            tensor = tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_run_folder(folder, tmp_path, caplog):
    run = tmp_path / "runs" / "one"
    checkpoint = run / "checkpoints" / "checkpoint-40"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    assert "this training run has no checkpoint yet" in message_of(run)
    shutil.copytree(folder, checkpoint)
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    (checkpoint / "manifest.json").write_text(json.dumps(sizes))
    assert load_model(str(run))[0].config.sharing_plan.layer_types == "0_3_3_3_4"
    assert "is not finished: using checkpoint-40" in caplog.text
    shutil.copytree(folder, run / "model")
    tiny_model("0_0", vocab_size=300).save_pretrained(run / "model")
    assert load_model(str(run))[0].config.sharing_plan.layer_types == "0_0"


def test_names_that_lead_nowhere(folder, monkeypatch, tmp_path):
    assert message_of(folder.parent / "mien").endswith(
        f"there is no such folder (did you mean 'mine' in {folder.parent}?)"
    )
    assert "did you mean 'models'" in message_of(tmp_path / "modles" / "mine")
    assert f"did you mean '{folder}'?" in message_of(folder.parent)
    assert "is a file; allowed are folders and GGUF files" in message_of(folder / "config.json")
    monkeypatch.chdir(folder.parent)
    assert "did you mean 'mine' in ." in message_of("min")
    assert "a name on the Hub is OWNER/NAME" in message_of("xyzzy")
    # Tests run with HF_HUB_OFFLINE, and nothing is asked for.
    assert "was never downloaded, and the Hub cannot be reached" in message_of("nobody-at-all/nothing")
    assert "revision='main': has no effect on model=mine" in message_of("mine", revision="main")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json"], "holds no config.json"),
        (["model.safetensors"], "holds no weights (model.safetensors)"),
        (["tokenizer.json", "tokenizer_config.json"], "holds no tokenizer (tokenizer.json)"),
    ],
)
def test_missing_files(folder, files, message):
    for file in files:
        (folder / file).unlink()
    assert message in message_of(folder)


def test_broken_files(folder, tmp_path):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    assert "the weights cannot be read: " in message_of(folder)
    weights.write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text("{")
    assert "the configuration cannot be read: " in message_of(folder)
    (folder / "config.json").write_text(json.dumps(config | {"kv_sharing": "0_1_2_3_9"}))
    assert f"model={folder}: " in message_of(folder) and "there is no layer 9" in message_of(folder)
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64, "head_dim": 8}))
    assert "the weights do not fit config.json" in message_of(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    assert "the tokenizer cannot be read" in message_of(folder)


def test_weights_of_other_layers(folder):
    """A layer that computes KV in the configuration only would run on random weights."""
    tiny_model("0_0_0_0_0", vocab_size=300).save_pretrained(folder.parent / "fewer")
    shutil.copy(folder.parent / "fewer" / "model.safetensors", folder)
    assert "4 are missing or of another shape, such as model.layers.3.self_attn.k_proj.weight" in message_of(folder)


def test_other_architectures(tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    message = message_of(tmp_path / "bert")
    assert "is of model_type 'bert'; allowed are lckv-llama, llama, mistral, qwen2, qwen3" in message
    (tmp_path / "bert" / "config.json").write_text("{}")
    assert "is of model_type None" in message_of(tmp_path / "bert")
