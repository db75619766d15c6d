"""Patterns in files."""

import json

import pytest

from lckv.errors import UserError
from lckv.serving.hint_files import read_hint


def write(tmp_path, hint) -> str:
    file = tmp_path / "hint.json"
    file.write_text(hint if isinstance(hint, str) else json.dumps(hint), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    "hint",
    [
        {"layer_types": "0_0_2_2"},
        {"kv_source": [0, 0, 2, 2]},
        {"layer_types": "0_0_2_2", "kv_source": [0, 0, 2, 2], "saved_fraction": 0.5, "ignored": []},
    ],
)
def test_a_hint_is_a_pattern(hint, tmp_path):
    assert read_hint(write(tmp_path, hint), 4) == read_hint(write(tmp_path, hint)) == "0_0_2_2"


@pytest.mark.parametrize(
    ("hint", "reason"),
    [
        ({"layer_types": "0_0_2"}, "is for 3 layers, but the model has 4; make one for this model"),
        ({"layer_types": "0_0_2_2", "kv_source": [0, 0, 0, 0]}, "differ; give one of them"),
        ({"role": "retriever"}, "has neither layer_types, a string such as '0_0_2_2', nor kv_source"),
        ([0, 0, 2, 2], "is no hint that can be read"),
        ("{", "is no hint that can be read"),
    ],
)
def test_mistakes_are_named(hint, reason, tmp_path):
    file = write(tmp_path, hint)
    with pytest.raises(UserError) as refused:
        read_hint(file, 4)
    assert str(refused.value).startswith(f"sharing_hint={file}: ") and reason in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^sharing_hint=.*nothing: is no hint that can be read: .*No such file"):
        read_hint(str(tmp_path / "nothing"))
