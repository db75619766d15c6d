"""What a session refuses before it trains, and what it compares its results with."""

import pytest

from lckv.config import EvaluationConfig
from lckv.errors import UserError
from lckv.training.session import check_can_shard
from tests.reference import tiny_model


def test_sharded_models_must_pass_equally_often_in_every_process_and_are_not_evaluated(make_config):
    with pytest.raises(UserError, match="^model.forward_passes=converge: .*FSDP"):
        check_can_shard(make_config(), tiny_model("0_2_2_3", forward_passes="converge"))
    plain = tiny_model("0_2_2_3", forward_passes=3)
    check_can_shard(make_config(), plain)
    check_can_shard(make_config(), tiny_model("0_0_2_2", forward_passes="converge"))
    with pytest.raises(UserError, match=r"^evaluation.evals=\['speed'\]: cannot be had while FSDP"):
        check_can_shard(make_config(evaluation=EvaluationConfig(["speed"])), plain)
    for settings in {"optim__name": "riemannian_adam"}, {"teacher__reconstruction_weight": 1, "teacher__source": "x"}:
        with pytest.raises(UserError, match=r"^(optim.name=riem|teacher.reconstruction_weight=1: needs).*FSDP"):
            check_can_shard(make_config(**settings), plain)


def test_what_iso_keeps_equal_is_compared_with_the_llama_that_was_asked_for(make_session):
    settings = {"model__num_key_value_heads": 1, "model__layer_types": "0_0_2_2"}
    plain = make_session("without", **settings).run()
    assert plain["kv_bytes"]["written"] == plain["kv_bytes_llama"]["written"] / 2
    session = make_session("with", iso="kv", **settings)
    assert session.model.config.num_key_value_heads == 2
    results = session.run()
    assert results["kv_bytes"]["written"] == results["kv_bytes_llama"]["written"] == plain["kv_bytes_llama"]["written"]
