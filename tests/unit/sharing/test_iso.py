"""Equal parameters and equal KV bytes, against the parameters of real models and against every other choice."""

import logging
from dataclasses import replace

import pytest

from lckv import plan
from lckv.config.model_arguments import model_arguments
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.sharing.costs import ModelSizes, count_kv_bytes, count_parameters, llama_plan
from lckv.sharing.iso import match_llama, matching_intermediate_size, matching_kv_heads
from lckv.sharing.patterns import PATTERNS, build_layer_types, parse_layer_types
from tests.composing import compose

SIZES = ModelSizes(
    64, hidden_size=24, intermediate_size=40, num_attention_heads=12, num_key_value_heads=2, head_dim=2,
    sliding_window=8,
)  # fmt: skip


def num_parameters(*settings: str) -> int:
    arguments = model_arguments(compose(["model=nano", *settings]), 64)
    return LCKVLlamaForCausalLM(LCKVLlamaConfig(**arguments)).num_parameters()


@pytest.mark.parametrize("name", list(PATTERNS))
@pytest.mark.parametrize("given", [{}, {"attention_bias": True, "use_qk_norm": True, "mlp_bias": True}])
def test_no_other_multiple_comes_nearer_to_llamas_parameters(name, given):
    sizes = replace(SIZES, **given)
    plan = parse_layer_types(build_layer_types(name, 6))
    target = count_parameters(llama_plan(plan), sizes)

    def distance(size):
        return abs(count_parameters(plan, replace(sizes, intermediate_size=size)) - target)

    for multiple in (1, 3, 8, 64):
        chosen = matching_intermediate_size(plan, sizes, multiple)
        if name == "llama":
            assert chosen == 40  # nothing to make up for, so nothing is rounded
        else:
            assert chosen % multiple == 0
            assert distance(chosen) == min(distance(size) for size in range(multiple, 200, multiple))


def test_models_that_are_built_have_llamas_parameters():
    llama = num_parameters("sharing=llama")
    cla = num_parameters("sharing=cla", "iso=params", "iso_multiple=1")
    step = 4 * 3 * 64  # of four layers, one unit of the MLP's three matrices
    assert abs(cla - llama) <= step / 2
    assert llama - num_parameters("sharing=cla") > 10 * step
    # Two of four layers lose 2 * 32 * 64 parameters each: 10 2/3 units of MLP for every layer.
    assert (
        model_arguments(compose(["model=nano", "sharing=cla", "iso=params", "iso_multiple=1"]), 64)[
            "intermediate_size"
        ]
        == 176 + 11
    )
    assert num_parameters("sharing=llama", "iso=params") == llama


@pytest.mark.parametrize("name", list(PATTERNS))
def test_kv_heads_are_the_most_that_llamas_bytes_allow(name):
    plan = parse_layer_types(build_layer_types(name, 6))
    budget = count_kv_bytes(llama_plan(plan), SIZES, 100).written
    chosen = matching_kv_heads(plan, SIZES)
    fitting = [
        heads
        for heads in (1, 2, 3, 4, 6, 12)
        if count_kv_bytes(plan, replace(SIZES, num_key_value_heads=heads), 100).written <= budget
    ]
    assert chosen == max(fitting)
    assert chosen == {1: 12, 2: 6, 3: 4, 4: 3, 5: 2, 6: 2}[len(plan.kv_owners)]


def test_what_could_not_be_matched_is_said_with_both_figures(caplog):
    one_layer_of_four = parse_layer_types("0_0_0_0")
    with caplog.at_level(logging.WARNING):
        match_llama("kv", parse_layer_types("0_0_2_2"), SIZES, 8)  # 4 heads in 2 layers for 2 heads in 4 layers
        assert caplog.messages == []
        match_llama("kv", one_layer_of_four, replace(SIZES, num_key_value_heads=4), 8)
        match_llama("params", one_layer_of_four, SIZES, 64)
    kv, params = caplog.messages
    assert kv == (
        "iso=kv: nearest is model.num_key_value_heads=12, of 12 heads: 96 bytes of KV per token, in 16 bits; "
        "Llama has 128"
    )
    assert params.startswith("iso=params: nearest is model.intermediate_size=64, in steps of 64: ")
    assert params.endswith(f"; Llama has {count_parameters(parse_layer_types('0_1_2_3'), SIZES):,}")


def test_plan_compares_with_the_llama_that_was_asked_for():
    report = plan.build_report(compose(["model=nano", "sharing=cla", "iso=kv"], "plan"))
    assert report.sizes.num_key_value_heads == 4
    assert report.costs.kv_bytes.written == report.llama_costs.kv_bytes.written
    report = plan.build_report(compose(["model=nano", "sharing=cla"], "plan"))
    assert report.costs.kv_bytes.written * 2 == report.llama_costs.kv_bytes.written


def test_runs_with_and_without_have_folders_of_their_own():
    assert compose(["sharing=cla", "iso=params"]).run_name == "tiny-cla-iso_params-seed0"
