"""What the plugin of vLLM decides without vLLM: which models it serves, which it refuses, and what it loads."""

import json
import socket
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from lckv import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.errors import UserError
from lckv.serving.hints import emit_hint
from lckv.serving.vllm import check
from lckv.serving.vllm.settings import check_engine, num_passes, read_served
from lckv.sharing.iteration import Iteration
from tests.tiny import byte_tokenizer

SIZES = dict(
    vocab_size=257, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1
)  # fmt: skip
OURS = {"architectures": ["LCKVLlamaForCausalLM"]}


def values(layer_types: str = "0_0_2_2", **settings) -> dict:
    return LCKVLlamaConfig(layer_types=layer_types, **SIZES, **settings).to_dict()


def test_our_own_configuration_is_served_as_it_is():
    served = read_served(values("0s_0_2_2s", use_qk_norm=True, sliding_window=7))
    assert (served.config.sharing_plan.layer_types, served.is_asked_for) == ("0s_0_2_2s", False)
    assert served.config.use_qk_norm and served.config.sliding_window == 7


@pytest.mark.parametrize("key", ["layer_types", "kv_sharing", "sharing_hint"])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_other_families_take_a_pattern(kind, key, tmp_path):
    hint = tmp_path / "hint.json"
    hint.write_text(json.dumps(emit_hint("router", 4).as_dict()), encoding="utf-8")
    given = kind(num_hidden_layers=4, **SIZES).to_dict() | {key: str(hint) if key == "sharing_hint" else "0_0_2_2"}
    served = read_served(given)
    assert (served.config.sharing_plan.layer_types, served.is_asked_for) == ("0_0_2_2", True)
    assert served.config.use_qk_norm == (kind is Qwen3Config)


def test_readers_projections_are_left_out_where_a_pattern_is_asked_for():
    plain = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, tie_word_embeddings=True, **SIZES))
    served = read_served(plain.config.to_dict() | {"layer_types": "0_0_2_2"})
    stored = {name: tensor for name, tensor in plain.state_dict().items() if name != "lm_head.weight"}
    loaded = dict(served.tensors(stored.items()))
    left_out = {f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in (1, 3) for kind in "kv"}
    assert loaded.keys() == stored.keys() - left_out


@pytest.mark.parametrize(
    ("layer_types", "reason"),
    [("0_1_2_2", "has model.layers.1.self_attn.k_proj.weight, which the checkpoint has not"),
     ("0_0_0_0", "has no model.layers.2.self_attn.k_proj.weight, which the checkpoint has")],
)  # fmt: skip
def test_a_checkpoint_of_another_pattern_is_refused(layer_types, reason):
    stored = LCKVLlamaForCausalLM(LCKVLlamaConfig(layer_types="0_0_2_2", **SIZES)).state_dict()
    with pytest.raises(UserError, match=f"^layer_types='{layer_types}': a model of this pattern {reason}"):
        list(read_served(values(layer_types)).tensors(stored.items()))


def test_a_head_that_is_not_the_embeddings_is_refused_where_these_are_tied():
    model = LCKVLlamaForCausalLM(LCKVLlamaConfig(layer_types="0_0", **SIZES))
    tied = read_served(values("0_0", tie_word_embeddings=True))
    stored = model.state_dict()
    with pytest.raises(UserError, match=r"^tie_word_embeddings=True: the checkpoint has a lm_head.weight of its own"):
        list(tied.tensors(stored.items()))
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    list(tied.tensors(stored.items()))
    del stored["lm_head.weight"]
    list(tied.tensors(stored.items()))


REFUSED = [
    (
        {"layer_types": "0_2_2_3"},
        "layer_types='0_2_2_3': layer 1 reads layer 2, above it, which vLLM serves only with --hf-overrides '{\"exp",
    ),
    (
        {"layer_types": "0_1_1:0_1:0"},
        "layer_types='0_1_1:0_1:0': layer 2 reads the keys of layer 1 with the values of layer 0, but layers of vLLM",
    ),
    ({"force_nodiag": True}, "force_nodiag=True: vLLM lets tokens see their own keys without --hf-overrides '{\"exp"),
    ({"experimental": True}, "experimental=True: has no effect, as no layer of '0_0_2_2' reads a layer above it"),
    ({"experimental": "yes"}, "experimental='yes': allowed are true and false"),
    (
        {"layer_types": "0_2s_2_3", "sliding_window": 1, "experimental": True},
        "sliding_window=1: is the token itself, which not all layers see",
    ),
    (
        {"kv_latents": [{"latent": 8}, None, {"latent": 8}, None]},
        "kv_latents: layer 0 keeps {'latent': 8}, but vLLM's",
    ),
    (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope_parameters: rope_type='dynamic' rotates by the length of the text",
    ),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED, ids=[reason.split(":")[0] for _, reason in REFUSED])
def test_what_cannot_be_served_exactly_is_refused_by_name(settings, reason):
    with pytest.raises(UserError) as refused:
        read_served(values(**settings))
    assert str(refused.value).startswith(reason) and "\n" not in str(refused.value)


def engine(
    *,
    fast_prefill: bool = True,
    speculative: object = None,
    second_runner: bool = False,
    enforce_eager: bool = True,
) -> SimpleNamespace:
    """What is asked of vLLM's configuration."""
    return SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=enforce_eager),
        use_v2_model_runner=second_runner,
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=fast_prefill),
        speculative_config=speculative,
    )


@pytest.mark.parametrize(
    ("layer_types", "options", "reason"),
    [
        ("0_0_2_2", {"second_runner": True}, "VLLM_USE_V2_MODEL_RUNNER: "),
        ("0_0_2_2", {"speculative": object()}, "--kv-sharing-fast-prefill: is wrong with speculative decoding"),
        ("0_0_2_3", {}, "--kv-sharing-fast-prefill: has no effect, as the last layer of '0_0_2_3' computes"),
        ("0_1s_1_1", {}, "--kv-sharing-fast-prefill: layer 1 of '0_1s_1_1' reads less than it keeps"),
        (
            "0_2_2_2",
            {"fast_prefill": False, "enforce_eager": False},
            "experimental=True: how often layers run depends",
        ),
        ("0_2_2_2", {}, "--kv-sharing-fast-prefill: was not seen to be right with experimental=True"),
        (
            "0_2_2_2",
            {"fast_prefill": False, "speculative": object()},
            "--speculative-config: was not seen to be right",
        ),
        ("0_1_0_2", {}, "--kv-sharing-fast-prefill: layer 2 of '0_1_0_2' reads less than it keeps, or another layer"),
    ],
)
def test_options_of_the_engine_that_would_be_wrong_are_refused(layer_types, options, reason):
    with pytest.raises(UserError) as refused:
        check_engine(engine(**options), LCKVLlamaConfig(layer_types=layer_types, **SIZES))
    assert str(refused.value).startswith(reason) and "\n" not in str(refused.value)


def test_other_options_are_not():
    config = LCKVLlamaConfig(layer_types="0s_1s_2_2", **SIZES)
    check_engine(engine(), config)
    check_engine(engine(fast_prefill=False, speculative=object()), config)


def test_layers_that_read_upward_are_served_as_an_experiment():
    upward = {"layer_types": "0_2_2_3", "experimental": True, "forward_passes": 30}
    for given in (values(**upward), LlamaConfig(num_hidden_layers=4, **SIZES).to_dict() | upward):
        config = read_served(given).config
        assert (config.sharing_plan.layer_types, config.forward_passes) == ("0_2_2_3", 30)
        check_engine(engine(fast_prefill=False), config)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 2, 9, 9]),
        ({"forward_passes": 1, "backward_passes": 1, "cyclic_groups": 8}, [1, 2, 8, 8]),
        ({"forward_passes": "converge"}, [1, 2, 9, 50]),
        ({"use_sequential": True}, [1, 2, 9, 50]),
    ],
)
def test_no_more_passes_run_than_make_an_exact_result(settings, expected):
    iteration = Iteration(**settings)
    assert [num_passes(iteration, num_tokens) for num_tokens in (1, 2, 9, 50)] == expected


def save(model, folder) -> str:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_what_would_keep_a_server_from_starting_is_said_first(tmp_path):
    torch.manual_seed(0)
    ours = save(LCKVLlamaForCausalLM(LCKVLlamaConfig(layer_types="0_0_2_2", **SIZES)), tmp_path / "ours")
    upward = save(LCKVLlamaForCausalLM(LCKVLlamaConfig(layer_types="0_2_2_2", **SIZES)), tmp_path / "upward")
    plain = save(LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **SIZES)), tmp_path / "plain")
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, reason in (
            (["--model", ours, "--port", port], f"--port {port}: cannot be had (Address already in use)"),
            (["--model", str(tmp_path / "our")], f"--model={tmp_path / 'our'}: there is no such folder"),
            (["--model", ours, "--hf-overrides", '{"layer_types": "0_0"}'], "layer_types='0_0': has 2 entries"),
            (
                ["--model", upward],
                "layer_types='0_2_2_2': layer 1 reads layer 2, above it, which vLLM serves only with",
            ),
            (
                ["--model", upward, "--hf-overrides", '{"experimental": true}'],
                "experimental=True: how often layers run",
            ),
            (["--model", plain, "--hf-overrides", "{"], "--hf-overrides {: is no JSON"),
            (
                ["--model", plain, "--hf-overrides", '{"layer_types": "0_0_2_2"}'],
                "--hf-overrides: layer_types='0_0_2_2' has no effect on vLLM's own model; give also",
            ),
        ):
            with pytest.raises(UserError) as refused:
                check.main(["--port", "0", *arguments])
            assert str(refused.value).startswith(reason) and "\n" not in str(refused.value)
    overrides = json.dumps(OURS | {"layer_types": "0_0_2_2"})
    assert check.main(["--model", plain, "--port", "0", "--hf-overrides", overrides, "--max-model-len", "9"]) == plain
    assert check.main(["--model", ours, "--port", "0"]) == ours
