"""Costs: by hand for small cases, against real models and against FLOPs that torch has counted."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lckv.errors import UserError
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.sharing.costs import ModelSizes, count_costs, count_flops, count_kv_bytes, count_parameters, llama_plan
from lckv.sharing.iteration import Iteration
from lckv.sharing.patterns import PATTERNS, build_layer_types, parse_layer_types
from tests.reference import SHAPES
from tests.strategies import layer_types

SIZES = ModelSizes(
    vocab_size=100,
    hidden_size=8,
    intermediate_size=20,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    sliding_window=4,
)


def kv_bytes(string: str, context_length: int, **sizes):
    return count_kv_bytes(parse_layer_types(string), dataclasses.replace(SIZES, **sizes), context_length)


def test_kv_bytes_by_hand():
    one = 2 * 2 * 2 * 2  # keys and values, 2 heads of 2, in 2 bytes
    llama = kv_bytes("0_1_2", 10)
    assert (llama.written, llama.resident, llama.resident_total, llama.read) == (3 * one, 3 * one, 30 * one, 30 * one)

    # Layer 0 is read with and without a window, so it keeps everything; layer 2 keeps its window only.
    mixed = kv_bytes("0s_0_2s", 10)
    assert mixed.written == 2 * one
    assert mixed.resident_total == (10 + 4) * one
    assert mixed.resident == pytest.approx(1.4 * one)
    assert mixed.read == (4 + 10 + 4) * one

    # A layer that reads upward does not see its own token: 9 of 10 keys, 3 of a window of 4.
    assert kv_bytes("1_1", 10).read == (9 + 10) * one
    assert kv_bytes("1s_1", 10).read == (3 + 10) * one
    assert kv_bytes("0_1s", 10, force_nodiag=True).read == (9 + 3) * one

    # The window is longer than the context.
    assert kv_bytes("0s_1s", 3) == kv_bytes("0_1", 3)
    assert kv_bytes("1s_1", 1).read == one


def test_sharing_saves_capacity_and_not_reads():
    shared, llama = (kv_bytes(build_layer_types(name, 8), 1000) for name in ("cla", "llama"))
    assert shared.written / llama.written == shared.resident / llama.resident == 0.5
    assert shared.read == llama.read


def test_dtypes():
    plan = parse_layer_types("0_1")
    assert count_kv_bytes(plan, SIZES, 5, "float32").written == 2 * count_kv_bytes(plan, SIZES, 5, "float16").written
    with pytest.raises(UserError, match="dtype='float61'.*did you mean 'float16'"):
        count_kv_bytes(plan, SIZES, 5, "float61")
    with pytest.raises(UserError, match="context_length=0"):
        count_kv_bytes(plan, SIZES, 0)


@pytest.mark.parametrize(
    ("tie_word_embeddings", "attention_bias", "mlp_bias", "head_dim"),
    [(False, False, False, None), (True, True, False, 6), (True, False, True, None), (False, True, True, 6)],
)
def test_parameters_of_llama(tie_word_embeddings, attention_bias, mlp_bias, head_dim):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        tie_word_embeddings=tie_word_embeddings,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
    )
    expected = sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())
    assert count_parameters(parse_layer_types("0_1_2"), ModelSizes.from_config(config)) == expected


def tiny_config(string: str, **settings) -> LCKVLlamaConfig:
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, vocab_size=32)
    return LCKVLlamaConfig(layer_types=string, **(sizes | settings))


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_parameters_of_every_pattern(name):
    config = tiny_config(build_layer_types(name, 6), attention_bias=True)
    expected = sum(parameter.numel() for parameter in LCKVLlamaForCausalLM(config).parameters())
    assert count_parameters(config.sharing_plan, ModelSizes.from_config(config)) == expected


@pytest.mark.parametrize("family", SHAPES)
def test_parameters_of_other_families(family):
    config = tiny_config("0_0_2_2", **SHAPES[family])
    model = LCKVLlamaForCausalLM(config)
    assert count_parameters(config.sharing_plan, ModelSizes.from_config(config)) == model.num_parameters()


def latent_config(string: str, kind: str, **settings) -> LCKVLlamaConfig:
    sizes = {
        "joint": {"latent": 7},
        "separate": {"key_latent": 3, "value_latent": 5},
        "decoupled": {"latent": 5, "rotated_planes": [1]},
    }[kind]
    owners = parse_layer_types(string).kv_owners
    kv_latents = [sizes if layer in owners else None for layer in range(string.count("_") + 1)]
    return tiny_config(string, kv_latents=kv_latents, **settings)


@pytest.mark.parametrize("kind", ["joint", "separate", "decoupled"])
@pytest.mark.parametrize("string", ["0_1_2_3", "0_0_2_2", "0_2_2_3"])
@pytest.mark.parametrize("family", [{}, {"attention_bias": True}, {"use_qk_norm": True}])
def test_parameters_and_bytes_of_latents(kind, string, family):
    if kind == "decoupled" and family.get("use_qk_norm"):
        family = {}  # which does not go together
    config = latent_config(string, kind, **family)
    sizes = ModelSizes.from_config(config)
    assert count_parameters(config.sharing_plan, sizes) == LCKVLlamaForCausalLM(config).num_parameters()
    written = count_kv_bytes(config.sharing_plan, sizes, 10, "float32").written
    assert written == 4 * len(config.sharing_plan.kv_owners) * (8 if kind == "separate" else 7)


@pytest.mark.parametrize("options", [{}, {"force_nodiag": True}, {"force_nodiag": True, "attention_bias": True}])
@pytest.mark.parametrize("kind", ["joint", "separate", "decoupled"])
def test_flops_of_latents_are_those_that_torch_counts(kind, options):
    """Whole passes with masks computed in full, and a decoding step, which makes keys of all that it sees."""
    config = latent_config("0_1_1", kind, attn_implementation="eager", sliding_window=64, **options)
    model, input_ids = LCKVLlamaForCausalLM(config).eval(), torch.arange(12)[None]
    sizes, plan = ModelSizes.from_config(config), config.sharing_plan
    with torch.no_grad():
        past = model(input_ids[:, :11]).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids[:, 11:], past_key_values=past)
    rotations = 2 * (config.head_dim // 2) * (1 + 12)  # positions times frequencies, a product in transformers
    counted = counter.get_total_flops()
    num_keys = 12 + config.force_nodiag  # behind a mask, which hides the own token, but spares nothing
    assert counted - count_flops(plan, sizes, num_keys).decode in (0, rotations, 2 * rotations)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids, use_cache=False)
    scores = 4 * sizes.query_size * 12 * 3  # all pairs of tokens, of which half are masked
    seen = 4 * sizes.query_size * 6.5 * 3
    expected = count_flops(plan, sizes, 12).forward + scores - seen
    assert 12 * expected == pytest.approx(counter.get_total_flops(), rel=2e-2)


def test_tinyllama_has_as_many_parameters_as_published():
    sizes = ModelSizes(32000, 2048, 5632, 32, 4, 64, 4096)
    assert count_parameters(parse_layer_types(build_layer_types("llama", 22)), sizes) == 1_100_048_384


@pytest.mark.parametrize(
    ("string", "forward_passes", "backward_passes", "cyclic_groups"),
    [
        ("0_0_2_2", 7, 2, 1),
        ("0_3_3_3_4", 7, 2, 1),
        ("0_3_3_3_4", 0, 2, 1),
        ("1_1_3_3", 2, 3, 1),
        ("2_1_2_2", 1, 2, 1),
        ("0_3_3_3_4", 1, 1, 4),
        ("2_2_2_3", 0, 1, 3),
    ],
)
def test_matrix_products_are_those_that_torch_counts(string, forward_passes, backward_passes, cyclic_groups):
    """A window of one token without that token leaves no keys, hence no attention: torch would count masked ones."""
    windowed = "_".join(f"{entry}s" for entry in string.split("_"))
    config = tiny_config(
        windowed,
        sliding_window=1,
        force_nodiag=True,
        forward_passes=forward_passes,
        backward_passes=backward_passes,
        cyclic_groups=cyclic_groups,
    )
    model = LCKVLlamaForCausalLM(config)
    input_ids = torch.arange(12)[None]
    counted = []
    for backward in False, True:
        with FlopCounterMode(display=False) as counter:
            loss = model(input_ids, labels=input_ids, use_cache=False).loss
            if backward:
                loss.backward()
        products = counter.get_flop_counts()["Global"].items()
        counted.append(sum(flops for name, flops in products if str(name) in ("aten.mm", "aten.addmm")) / 12)
    iteration = Iteration(forward_passes, backward_passes, cyclic_groups)
    flops = count_flops(config.sharing_plan, ModelSizes.from_config(config), 12, iteration)
    assert [flops.forward, flops.train] == counted


@pytest.mark.parametrize(
    ("string", "forward_passes", "backward_passes"),
    [
        ("0_0_2_2", 7, 2),
        ("0_1_2_2_2", 7, 2),
        ("0_3_3_3_3_3", 2, 2),
        ("1_1_3_3", 2, 3),
        ("2_0_2_0", 2, 2),
    ],
)
def test_matrix_products_of_a_prefill_are_those_that_torch_counts(string, forward_passes, backward_passes):
    """As above, without attention; then with it, for the layers that attend from the last token alone."""
    windowed = "_".join(f"{entry}s" for entry in string.split("_"))
    passes = dict(forward_passes=forward_passes, backward_passes=backward_passes)
    config = tiny_config(windowed, sliding_window=1, force_nodiag=True, **passes)
    flops = count_flops(
        config.sharing_plan, ModelSizes.from_config(config), 12, Iteration(forward_passes, backward_passes)
    )
    assert sum(prefill_flops(config, "aten.mm", "aten.addmm")) / 12 == pytest.approx(flops.prefill, rel=1e-12)


@pytest.mark.parametrize("family", ["plain", *SHAPES])
@pytest.mark.parametrize("string", ["0_0_0_0", "0_0_0_0s"])
def test_whole_prefills_are_what_torch_counts_where_only_the_last_token_attends(string, family):
    config = tiny_config(string, sliding_window=64, attn_implementation="eager", **SHAPES.get(family, {}))
    flops = count_flops(config.sharing_plan, ModelSizes.from_config(config), 12)
    assert sum(prefill_flops(config)) / 12 == pytest.approx(flops.prefill, rel=1e-12)


def prefill_flops(config: LCKVLlamaConfig, *names: str) -> list[int]:
    """What torch counts, of all operations or of some, while a real model takes in 12 tokens.

    Without the rotary embedding, which some versions of transformers compute as a matrix product.
    """
    model = LCKVLlamaForCausalLM(config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(12)[None], logits_to_keep=1)
    counts = counter.get_flop_counts()
    rotary = next((counts[module] for module in counts if "rotary_emb" in module), {})
    return [flops - rotary.get(name, 0) for name, flops in counts["Global"].items() if not names or str(name) in names]


LM_HEAD, KV, MLP = 2 * 100 * 8, 4 * 8 * 4, 6 * 8 * 20  # FLOPs of the parts, for SIZES


def attention(num_keys):
    return 4 * 8 * 8 + 4 * 8 * num_keys


def test_a_prefill_by_hand():
    lm_head, kv, mlp = LM_HEAD, KV, MLP
    # Llama's last layer gives KV for all 9 tokens, the rest for one; the others run whole (1 to 9 keys: 5 on average).
    llama = count_flops(parse_layer_types("0_1"), SIZES, 9)
    assert llama.prefill == pytest.approx(kv + mlp + attention(5) + kv + (mlp + attention(9) + lm_head) / 9)
    # Readers above the highest owner run for one token; a window of 4 shows it 4 keys.
    shared = count_flops(parse_layer_types("0_0_0s"), SIZES, 9)
    assert shared.prefill == pytest.approx(kv + (3 * mlp + 2 * attention(9) + attention(4) + lm_head) / 9)
    # One token at a time goes through everything.
    sequential = count_flops(parse_layer_types("0_2_2"), SIZES, 9, Iteration(7, 2, use_sequential=True))
    assert sequential.prefill == pytest.approx(sequential.forward - lm_head * 8 / 9)


def test_flops_by_hand():
    lm_head, kv, mlp = LM_HEAD, KV, MLP
    llama = count_flops(parse_layer_types("0_1"), SIZES, 9)
    assert llama.decode == lm_head + 2 * (kv + mlp + attention(9))
    assert llama.forward == lm_head + 2 * (kv + mlp + attention(5))  # 1 to 9 keys: 5 on average
    assert llama.train == 3 * llama.forward

    # Windows of 4 in a context of 9: 1, 2, 3 and then six times 4 keys.
    windowed = count_flops(parse_layer_types("0s"), SIZES, 9)
    assert windowed.forward == pytest.approx(lm_head + kv + mlp + attention(30 / 9))

    # One ungraded and two graded passes: the first without attention in layer 0, layer 1 whole in the last only.
    cycle = count_flops(parse_layer_types("1_1"), SIZES, 9, Iteration(1, 2))
    first, second = mlp + kv, mlp + attention(4) + kv
    last = mlp + attention(4) + kv + mlp + attention(5)
    assert cycle.decode == lm_head + 2 * mlp + attention(8) + attention(9) + kv
    assert cycle.forward == lm_head + first + second + last
    assert cycle.train == 3 * lm_head + first + 3 * (second + last)


def test_passes_that_depend_on_the_data_are_left_open():
    flops = count_flops(parse_layer_types("0_2_2"), SIZES, 9, Iteration(None, 2))
    assert flops.forward is None and flops.train is None and flops.prefill is None and flops.decode > 0
    assert count_flops(parse_layer_types("0_0_2"), SIZES, 9, Iteration(None, 2)).train is not None


def test_no_more_passes_than_tokens_are_counted():
    plan = parse_layer_types("0_2_2")
    assert count_flops(plan, SIZES, 3, Iteration(7, 2)) == count_flops(plan, SIZES, 3, Iteration(1, 2))
    assert count_flops(plan, SIZES, 1, Iteration(7, 2)).forward == count_flops(plan, SIZES, 1).decode


def test_token_by_token_counts_every_layer_once():
    sequential = count_flops(parse_layer_types("0_2_2"), SIZES, 9, Iteration(7, 2, use_sequential=True))
    assert sequential.train == 3 * sequential.forward


@given(layer_types(), st.integers(1, 50))
def test_bounds_that_hold_for_every_pattern(string, context_length):
    plan = parse_layer_types(string)
    costs = count_costs(plan, SIZES, context_length)
    llama = count_costs(llama_plan(plan), SIZES, context_length)
    assert costs.num_parameters <= llama.num_parameters
    assert costs.kv_bytes.written <= llama.kv_bytes.written
    assert costs.kv_bytes.resident <= costs.kv_bytes.written
    assert costs.kv_bytes.read <= llama.kv_bytes.read
    assert costs.flops_per_token.decode <= llama.flops_per_token.decode
    assert costs.flops_per_token.prefill <= costs.flops_per_token.forward
    if not plan.has_cycles:
        assert costs.flops_per_token.train <= llama.flops_per_token.train
    assert set(llama_plan(plan).kv_owners) == set(range(plan.num_hidden_layers))
