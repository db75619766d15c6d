"""What a session refuses before it trains, and what it compares its results with."""

import pytest

from lckv.errors import UserError
from lckv.evaluation.model_costs import cost_figures
from lckv.models import LCKVLlamaConfig, LCKVLlamaForCausalLM
from lckv.training.session import check_passes


def build_model(layer_types: str, **settings) -> LCKVLlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 16}
    return LCKVLlamaForCausalLM(LCKVLlamaConfig(layer_types=layer_types, **sizes, **settings))


def test_sharded_models_must_pass_equally_often_in_every_process():
    until_converged = build_model("0_2_2_3", forward_passes="converge")
    check_passes(until_converged, is_sharded=False)
    with pytest.raises(UserError, match="^model.forward_passes=converge: .*FSDP"):
        check_passes(until_converged, is_sharded=True)
    check_passes(build_model("0_2_2_3", forward_passes=3), is_sharded=True)
    check_passes(build_model("0_0_2_2", forward_passes="converge"), is_sharded=True)


def test_what_iso_keeps_equal_is_compared_with_the_llama_that_was_asked_for(make_session):
    settings = {"model__num_key_value_heads": 1, "model__layer_types": "0_0_2_2"}
    assert make_session("without", **settings)._llama_sizes() is None
    session = make_session("with", iso="kv", **settings)
    assert session.model.config.num_key_value_heads == 2
    llama = session._llama_sizes()
    figures = cost_figures(session.model, 16, llama)
    assert figures["kv_bytes"]["written"] == figures["kv_bytes_llama"]["written"]
    assert (llama.num_key_value_heads, llama.intermediate_size) == (1, 64)
