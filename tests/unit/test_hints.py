"""The command: what it prints and writes, of a number of layers and of a model."""

import json

import pytest

from lckv.hints import build_hint, main
from lckv.serving.hints import hinted_layer_types
from tests.composing import compose


def hint_of(*arguments: str):
    return build_hint(compose(arguments, "hints"))


def test_groups_of_a_number_of_layers(capsys, tmp_path):
    arguments = ["num_layers=12", "role=retriever", "thinking=false", "group_size=2", "direction=upper"]
    main(compose([*arguments, "min_layer=2", "max_layer=11", f"out={tmp_path}/hint.json"], "hints"))
    printed = capsys.readouterr().out
    hint = json.loads(printed)
    assert hint["kv_source"] == [0, 1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11]
    assert hint["layer_types"] == "0_1_3_3_5_5_7_7_9_9_11_11"
    assert (hint["ignored"], hint["ignored_reason"]) == (False, None)
    assert hint["saved_fraction"] == pytest.approx(5 / 12)
    assert json.loads((tmp_path / "hint.json").read_text()) == hint
    assert hinted_layer_types(tmp_path / "hint.json", 12) == hint["layer_types"]


def test_an_agent_that_thinks_has_the_model_as_it_is():
    hint = hint_of("num_layers=4", "role=retriever", "thinking=true")
    assert (hint.ignored, hint.kv_source, hint.saved_fraction) == (True, [0, 1, 2, 3], 0)
    assert hint_of("num_layers=4", "role=retriever", "thinking=true", "thinking_bypass=false").kv_source == [
        0,
        0,
        2,
        2,
    ]


def test_digits_stay_text_and_roles_are_settings():
    hint = hint_of("role=reranker", "layer_types=2_2_2", "non_thinking_roles=[reranker]")
    assert (hint.layer_types, hint.saved_fraction) == ("2_2_2", pytest.approx(2 / 3))
