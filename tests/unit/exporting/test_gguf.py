"""Files for llama.cpp, against transformers' Gemma 4, our reader and llama.cpp itself, and what is refused."""

import re
import resource
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AddedToken, Gemma4ForCausalLM, Gemma4TextConfig

from lckv.config import ExportConfig
from lckv.errors import UserError
from lckv.exporting import gguf_verification
from lckv.exporting.formats import FORMATS
from lckv.exporting.gguf_description import describe
from lckv.exporting.gguf_gemma4 import Inflated
from lckv.exporting.gguf_plain import plain_weights
from lckv.exporting.gguf_reuse import find_reuse
from lckv.exporting.gguf_silu import approximate_silu
from lckv.exporting.gguf_tokenizer import _LLAMA3, tokenizer_settings
from lckv.exporting.gguf_verification import run_llama_cpp
from lckv.loading.models import load_model
from lckv.models import LCKVLlamaForCausalLM
from lckv.sharing.patterns import parse_layer_types
from tests.layouts import latent_config
from tests.reference import SHAPES, tiny_config, tiny_model, token_ids
from tests.tiny import byte_tokenizer, merging_tokenizer

pytest.importorskip("gguf")

GELU = "gelu_pytorch_tanh"
ROPE = {"rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMAS = {
    "plain": {},
    "granite": SHAPES["granite"],
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"use_qk_norm": True, "attention_multiplier": 0.3},
    "llama3": {"rope_parameters": ROPE | LLAMA3 | {"original_max_position_embeddings": 64}},
    "yarn": {"rope_parameters": ROPE | YARN},
    "partial": {"rope_parameters": ROPE | {"rope_type": "default", "partial_rotary_factor": 0.5}},
}
GEMMAS = {
    "yoco": ("0s_1s_2_2", {}),
    "tied": ("0s_1s_2_2", {"tie_word_embeddings": True}),
    "mixed": ("0_1s_2_2_1s_2", {}),
    "two-owners": ("0_1_1_1", {}),
    "unshared": ("0s_1_2s_3", {}),
    "granite": ("0s_1s_2_2", SHAPES["granite"]),
    "normalised": ("0s_1s_2_2", {"use_qk_norm": True}),
    "capped": ("0s_1s_2_2", {"final_logit_softcapping": 2.0}),
    "bases": (
        "0s_1s_2_2",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            }
        },
    ),
}


def lively_model(layer_types, **settings):
    """A tiny model of which no norm or bias is trivial."""
    model = tiny_model(layer_types, **{"vocab_size": 304, "initializer_range": 0.3, **settings})
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def nmse(found, expected):
    return (found - expected).square().mean() / expected.var()


def saved(path: Path, model, tokenizer=None) -> str:
    model.save_pretrained(path)
    (tokenizer or merging_tokenizer()).save_pretrained(path)
    return str(path)


def export(model: str, out: Path, **settings) -> str:
    form = FORMATS["gguf"](ExportConfig(format="gguf", model=model, out=str(out), **settings))
    form.check(parse_layer_types("0_1") if Path(model).is_file() else None)
    return form.write()


@pytest.mark.parametrize("settings", LLAMAS.values(), ids=LLAMAS)
def test_a_model_that_shares_nothing_is_read_back(tmp_path, settings):
    model = lively_model("0_1_2", **settings)
    out = tmp_path / "tiny.gguf"
    export(saved(tmp_path / "model", model), out, verify=False)
    read, tokenizer = load_model(str(out))
    torch.testing.assert_close(read(token_ids(2, 40)).logits, model(token_ids(2, 40)).logits, atol=1e-4, rtol=1e-4)
    assert tokenizer("that they said")["input_ids"] == [0, *merging_tokenizer()("that they said")["input_ids"]]


@pytest.mark.parametrize(("layer_types", "settings"), GEMMAS.values(), ids=GEMMAS)
def test_a_gemma_4_of_transformers_computes_the_same(layer_types, settings):
    compare_with_gemma_4(lively_model(layer_types, hidden_act=GELU, **settings))


def test_matrices_of_zeros_are_matrices_of_a_gemma_4():
    model = lively_model("0s_1s_2_2", hidden_act=GELU)
    layer = model.model.layers[1]  # which then does nothing, as at the beginning of some trainings
    for part in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
        part.weight.data.zero_()
    compare_with_gemma_4(model)


def compare_with_gemma_4(model):
    gemma = _gemma(model, describe(model))
    tensors = Inflated(model.config, plain_weights(model)).tensors()
    missing, unexpected = gemma.load_state_dict(tensors, strict=False)
    assert not unexpected and all("layer_scalar" in name or name == "lm_head.weight" for name in missing)
    ids = token_ids(2, 20)
    # Places in a tensor: where it may cut hidden states, transformers misses the embeddings that it does not have.
    assert nmse(gemma(ids, logits_to_keep=torch.arange(20)).logits, model(ids).logits) < 1e-8


def test_three_gelus_are_nearly_a_silu():
    model = lively_model("0s_1s_2_2")
    config, weights = approximate_silu(model.config, plain_weights(model))
    wider = LCKVLlamaForCausalLM(config).eval()
    wider.load_state_dict(weights)
    assert nmse(wider(token_ids(2, 20)).logits, model(token_ids(2, 20)).logits) < 3e-7


@pytest.mark.parametrize(
    ("layer_types", "window", "reason"),
    [
        ("1_1_2", 8, "layer 0 reads layer 1, above it, which llama.cpp cannot; "),
        ("0_0_0", 8, "only layer 0 computes keys and values; "),
        ("0_0_2_2", 8, "layer 2 computes keys and values behind a layer that does not; "),
        ("0_1_0", 8, "layer 2 reads layer 0 without a window, where only layer 1 can be read so; "),
        ("0s_1_0", 8, "layer 2 reads layer 0 without a window, where only layer 1 can be read so; "),
        ("0s_1s_1s", 8, "layer 2 reads layer 1 through a window, where only layer 0 can be read so; "),
        ("0_1s_1", 8, "layer 2 reads layer 1 without a window, which reads its own through one; "),
        ("0_1_0s", 8, "layer 2 reads layer 0 through a window, which reads its own without one; "),
        ("0s_1_0s_1", 8, None),
        ("0_1s_1s_1", 16, None),  # a window as wide as the context is none
    ],
)
def test_patterns_that_llama_cpp_cannot_say_are_refused_by_layer(layer_types, window, reason):
    if reason is None:
        assert find_reuse(parse_layer_types(layer_types), window, 16).num_owners == 2
        return
    with pytest.raises(UserError) as error:
        find_reuse(parse_layer_types(layer_types), window, 16)
    assert str(error.value).startswith(reason)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tiny_config("0s_1_1"), "layer 0 has a window, which llama.cpp has only with hidden_act=gelu_pytorch_tanh"),
        (tiny_config("0_1_1"), "layer 2 reads layer 1, which llama.cpp has only with hidden_act=gelu_pytorch_tanh"),
        (
            tiny_config("0_1_1:0"),
            "layer 2 reads the keys of layer 1 with the values of layer 0, which llama.cpp cannot",
        ),
        (tiny_config("0", hidden_act=GELU), "num_hidden_layers=1: llama.cpp has windows and GELU only in"),
        (tiny_config("0s"), "num_hidden_layers=1: llama.cpp has windows and GELU only in"),
        (tiny_config("0s_1_1", hidden_act=GELU, rms_norm_eps=0.0), "rms_norm_eps=0.0: llama.cpp's gemma4 needs"),
        (tiny_config("0_1", hidden_act="relu"), "hidden_act=relu: llama.cpp has no such MLP here"),
        (tiny_config("0_1", force_nodiag=True), "force_nodiag=True: no architecture"),
        (tiny_config("0_1", **SHAPES["gpt2"]), "learned_positions=True: no architecture"),
        (tiny_config("0_1", norm_type="layer_norm"), "norm_type=layer_norm: no architecture"),
        (tiny_config("0_1_2_3", **SHAPES["gemma"]), "use_output_norms=True: no architecture"),
        (tiny_config("0_1", gated_mlp=False), "gated_mlp=False: no architecture"),
        (latent_config("joint", "0_1"), "kv_latents: no architecture"),
        (tiny_config("0_1", final_logit_softcapping=2.0), "final_logit_softcapping=2.0: llama.cpp's llama has none"),
        (tiny_config("0_1_2_3", **SHAPES["smollm3"]), "rope_layer_types: llama.cpp's llama has one rotary embedding"),
        (tiny_config("0_1", use_qk_norm=True, attention_bias=True), "attention_bias=True: llama.cpp's qwen3 has no"),
        (
            tiny_config("0_1", use_qk_norm=True, rope_parameters=ROPE | YARN),
            "rope_parameters: llama.cpp's qwen3 scales no frequencies",
        ),
        (tiny_config("0_1_1", hidden_act=GELU, mlp_bias=True), "mlp_bias=True: llama.cpp's gemma4 has no biases"),
        (
            tiny_config("0s_1_1", hidden_act=GELU, rope_parameters=ROPE | YARN),
            "rope_parameters: llama.cpp's gemma4 scales no frequencies in layers with a window",
        ),
        (
            tiny_config("0_1s_2_3", hidden_act=GELU, **SHAPES["smollm3"]),
            "rope_layer_types: layers 0 and 2 rotate differently",
        ),
        (
            tiny_config("0_1", rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0}),
            "rope_type=dynamic: rotates by the length of the text",
        ),
    ],
)
def test_models_that_llama_cpp_does_not_compute_are_refused_by_setting(config, reason):
    with pytest.raises(UserError) as error:
        describe(LCKVLlamaForCausalLM(config))
    assert str(error.value).startswith(reason)


def test_numbers_that_are_none_are_refused_by_tensor(tmp_path):
    model, reason = lively_model("0s_1s_2_2", hidden_act=GELU, use_qk_norm=True), "has numbers that are not finite"
    model.model.layers[0].self_attn.q_proj.weight.data *= 10  # and far more in the file, whose norms have a larger eps
    folder = saved(tmp_path / "model", model)
    with pytest.raises(UserError, match=rf"blk.0.attn_q.weight: {reason} as dtype=float16; bfloat16"):
        export(folder, tmp_path / "a.gguf", dtype="float16", verify=False)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(UserError, match=rf"^model.layers.1.mlp.up_proj.weight: {reason} in the model$"):
        describe(model)


def test_a_full_disk_is_answered_in_one_line(tmp_path):
    folder, out = saved(tmp_path / "model", lively_model("0_1")), tmp_path / "a.gguf"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for largest in (1_000, 40_000):  # the settings, and the tensors
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
        try:
            with pytest.raises(UserError, match=f"cannot be written to out={out}: "):
                export(folder, out, verify=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tokenizers_that_llama_cpp_would_not_follow_are_refused():
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s"), "isolated"), pre_tokenizers.ByteLevel(False)])
    for tokenizer, reason in [
        (merging_tokenizer(split), "cuts text by Split, ByteLevel in a way"),
        (merging_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)), "cuts text by ByteLevel in a way"),
        (merging_tokenizer(ignore_merges=True), "cuts text by ByteLevel in a way"),
        (byte_tokenizer(), "has no merges"),
        *[
            (with_token("sword", **{flag: True}), f"token 'sword' has {flag}=True, which llama.cpp would not heed")
            for flag in ("lstrip", "rstrip", "single_word")
        ],
    ]:
        with pytest.raises(UserError, match=reason):
            tokenizer_settings(tokenizer, 304, 1)
    with pytest.raises(UserError, match=r"eos_token_id=\[1, 2, 3, 4\]: a GGUF file has room for 3 tokens that end"):
        tokenizer_settings(merging_tokenizer(), 304, [1, 2, 3, 4])
    composing = merging_tokenizer()
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(UserError, match="is of type BPE with normalizer NFC"):
        tokenizer_settings(composing, 304, 1)


def with_token(text: str, **flags):
    tokenizer = merging_tokenizer()
    tokenizer.add_tokens(AddedToken(text, **flags))
    return tokenizer


def _gemma(model, described) -> Gemma4ForCausalLM:
    """What transformers makes of a file's settings."""
    config, settings = model.config, described.settings
    kinds = {True: "sliding_attention", False: "full_attention"}
    full = described.tensors["rope_freqs.weight"]
    assert (full == full[0]).all()  # as transformers can say it
    ropes = {
        "full_attention": {"rope_type": "linear", "rope_theta": settings["rope.freq_base"], "factor": full[0].item()},
        "sliding_attention": {"rope_type": "default", "rope_theta": settings["rope.freq_base_swa"]},
    }
    text = Gemma4TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=settings["feed_forward_length"],
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        global_head_dim=config.head_dim,
        rms_norm_eps=settings["attention.layer_norm_rms_epsilon"],
        layer_types=[kinds[slides] for slides in settings["attention.sliding_window_pattern"]],
        sliding_window=settings["attention.sliding_window"],
        num_kv_shared_layers=settings["attention.shared_kv_layers"],
        hidden_size_per_layer_input=settings["embedding_length_per_layer_input"],
        final_logit_softcapping=settings["final_logit_softcapping"] or None,
        rope_parameters=ropes,
        tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation="eager",
    )
    return Gemma4ForCausalLM(text).eval()


LLAMA3_CUT = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
)
SMOLLM_CUT = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


@pytest.mark.parametrize(
    ("layer_types", "dtype", "tokenizer", "settings"),
    [
        ("0_1_2", "float32", merging_tokenizer(SMOLLM_CUT), SHAPES["granite"]),
        ("0_1_2", "bfloat16", merging_tokenizer(LLAMA3_CUT, ignore_merges=True), {}),
        ("0s_1s_2_2", "float32", merging_tokenizer(), {"hidden_act": GELU}),
        ("0_1s_2_2_1s_2", "float16", merging_tokenizer(), {"hidden_act": GELU, "tie_word_embeddings": True}),
        ("0_1_1_1", "float32", merging_tokenizer(), {}),
        ("0s_1s", "float32", merging_tokenizer(), {"hidden_act": GELU}),
    ],
)
def test_llama_cpp_computes_the_same(tmp_path, layer_types, dtype, tokenizer, settings):
    pytest.importorskip("xllamacpp")
    model = lively_model(layer_types, **settings)
    folder, approximate = saved(tmp_path / "model", model, tokenizer), layer_types == "0_1_1_1"
    made = export(folder, tmp_path / "a.gguf", dtype=dtype, approximate_silu=approximate)
    largest = {"float32": 1e-6, "float16": 1e-4, "bfloat16": 1e-3}[dtype]
    assert float(made.rpartition(" ")[2]) < largest


def test_greedy_text_and_caches_of_llama_cpp(tmp_path):
    pytest.importorskip("xllamacpp")
    model, tokenizer = lively_model("0s_1s_2_2", hidden_act=GELU), merging_tokenizer()
    out = tmp_path / "a.gguf"
    export(saved(tmp_path / "model", model), out, verify=False)
    prompt = token_ids(1, 9)
    expected = model.generate(prompt, max_new_tokens=30, min_new_tokens=30, do_sample=False)[0, 9:]
    request = {"prompt": prompt[0].tolist(), "n_predict": 30, "temperature": 0, "ignore_eos": True}
    answer, log = run_llama_cpp(out, "", [request], 64, float32_cache=True)
    assert answer["completions"][0]["choices"][0]["text"] == tokenizer.decode(expected)
    kept = re.findall(r"(\d+) layers", "".join(line for line in log.splitlines() if "llama_kv_cache: size" in line))
    assert kept == ["1", "2"]  # without a window, and with one


@pytest.mark.parametrize("others", [[], [1], [260, 1]])
def test_llama_cpp_stops_behind_the_same_tokens(tmp_path, others):
    pytest.importorskip("xllamacpp")
    model, prompt = lively_model("0s_1s_2_2", hidden_act=GELU), token_ids(1, 9)
    end = int(model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, -1])
    model.generation_config.eos_token_id = [end, *others]
    expected = model.generate(prompt, max_new_tokens=30, do_sample=False)[0, 9:]
    assert len(expected) <= 6
    out = tmp_path / "a.gguf"
    export(saved(tmp_path / "model", model), out, verify=False)
    request = {"prompt": prompt[0].tolist(), "n_predict": 30, "temperature": 0}
    answer, _ = run_llama_cpp(out, "", [request], 64, float32_cache=True)
    assert answer["completions"][0]["choices"][0]["text"] == merging_tokenizer().decode(expected)


def test_logits_that_are_no_numbers_are_something_else(tmp_path):
    pytest.importorskip("xllamacpp")
    model = lively_model("0_1")
    model.model.layers[0].self_attn.v_proj.weight.data *= 3e4  # float16 holds it, but not the values that it makes
    with pytest.raises(UserError, match="llama.cpp computes something else: its logits differ by an NMSE of nan"):
        export(saved(tmp_path / "model", model), tmp_path / "a.gguf", dtype="float16")


@pytest.mark.parametrize("verify", [None, False])
def test_a_file_that_llama_cpp_computes_otherwise_does_not_appear(tmp_path, monkeypatch, verify):
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(gguf_verification, "MAX_NMSE", 0.0)
    folder, out = saved(tmp_path / "model", lively_model("0_1")), tmp_path / "a.gguf"
    if verify is None:
        with pytest.raises(UserError, match="llama.cpp computes something else: its logits differ by an NMSE of"):
            export(folder, out)
    else:
        assert export(folder, out, verify=verify).endswith("; not compared with llama.cpp")
    assert out.exists() == (verify is False)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_llama_cpp_does_not_run_is_answered_in_one_line(tmp_path):
    pytest.importorskip("xllamacpp")
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match="^llama.cpp does not run the file: .*; nothing was written$"):
        run_llama_cpp(torn, "", [], 64, float32_cache=True)
