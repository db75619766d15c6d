"""Hints: which layers share for whom, what that saves of real caches, and that JSON says the same to its reader."""

import json
from dataclasses import fields

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig, Qwen3Config

from lckv.cache import build_cache
from lckv.config import GroupConfig
from lckv.config.hints import DIRECTIONS
from lckv.errors import UserError
from lckv.serving.hints import ModelKV, SharingHint, emit_hint, find_model, hinted_layer_types, read_hint, schema
from lckv.serving.schema import check_schema
from lckv.sharing.patterns import parse_layer_types
from tests.reference import tiny_config, tiny_model, token_ids
from tests.strategies import layer_types

VALIDATOR = jsonschema.Draft202012Validator(schema())


def model_of(layer_types, **settings) -> ModelKV:
    return ModelKV.from_values(tiny_config(layer_types, **settings).to_dict())


@given(st.data(), st.integers(1, 12), st.integers(1, 5), st.sampled_from(DIRECTIONS))
def test_every_layer_of_a_group_reads_one_end_of_it(data, num_layers, size, direction):
    low = data.draw(st.integers(0, num_layers - 1))
    high = data.draw(st.none() | st.integers(low, num_layers - 1))
    hint = emit_hint("router", num_layers, GroupConfig(size, direction, low, high))
    top = num_layers - 1 if high is None else high
    groups = [[layer] for layer in range(low)]
    groups += [[layer for layer in range(low, top + 1) if (layer - low) // size == number] for number in range(12)]
    groups += [[layer] for layer in range(top + 1, num_layers)]
    expected = {layer: group[-1 if direction == "upper" else 0] for group in groups for layer in group}
    assert hint.kv_source == [expected[layer] for layer in range(num_layers)]
    assert hint.saved_fraction == pytest.approx(1 - len(set(hint.kv_source)) / num_layers)


@given(layer_types(), st.integers(1, 9), st.integers(1, 20))
def test_any_pattern_gives_a_hint_and_a_hint_gives_it_back(string, window, context_length):
    plan = parse_layer_types(string)
    group = GroupConfig(layer_types=string)
    hint = emit_hint("router", plan.num_hidden_layers, group, sliding_window=window, context_length=context_length)
    sent = json.loads(json.dumps(hint.as_dict()))
    VALIDATOR.validate(sent)
    assert parse_layer_types(hinted_layer_types(sent, plan.num_hidden_layers)) == plan
    assert read_hint(sent) == hint
    read = {(stream, owner) for layer in plan.layers for stream, owner in zip("kv", layer.sources, strict=True)}
    tokens = [
        min(window, context_length) if plan.owner_is_sliding(owner) else context_length for _, owner in sorted(read)
    ]
    assert hint.saved_fraction == pytest.approx(1 - sum(tokens) / (2 * context_length * plan.num_hidden_layers))
    assert [each if isinstance(each, list) else [each, each] for each in hint.kv_source] == [*map(list, plan.sources)]
    assert bool(hint.not_served) == (plan.has_cycles or plan.first_split is not None)


@pytest.mark.parametrize(
    "own, group",
    [
        ("0_1_2_3_4", GroupConfig(2, "lower")),
        ("0_1_2_3_4", GroupConfig(3, "upper", 1)),
        ("0s_1_2s_3s_4", GroupConfig(2, "lower", 1)),
        ("0s_1s_2_2_2", GroupConfig(2, "upper")),
        ("0_1_2_3_4", GroupConfig(layer_types="0_0s_2s_2s_4")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_real_caches(own, group, dtype):
    kv = model_of(own, dtype=dtype)
    hint = emit_hint("router", kv, group, context_length=20)
    for string, num_bytes in (own, hint.kv_bytes.model), (hint.layer_types, hint.kv_bytes.hint):
        model = tiny_model(string).to(dtype)
        cache = build_cache("dynamic", model.config)
        with torch.no_grad():
            for token in token_ids(1, 20).T:
                model(token[None], past_key_values=cache)
        assert cache.num_bytes() == num_bytes
    assert hint.saved_fraction == hint.kv_bytes.saved / hint.kv_bytes.model > 0
    assert emit_hint("router", kv, group, context_length=20, kv_dtype="int8").kv_bytes.model == (
        hint.kv_bytes.model // dtype.itemsize
    )


@pytest.mark.parametrize(
    "own, size, direction, expected",
    [
        ("0_0_2_2_4_4", 3, "lower", "0_0_0_2_2_2"),  # layer 3 reads layer 2, and so do those above it
        ("0_0_2_2_4_4", 3, "upper", "2_2_2_4_4_4"),
        ("0s_1s_2_2_2_2", 2, "lower", "0s_0s_2_2_2_2"),
        ("0_4_4_4_4_5", 4, "upper", "4_4_4_4_5_5"),
    ],
)
def test_groups_of_a_model_that_shares_already_read_what_one_of_them_reads(own, size, direction, expected):
    kv = model_of(own)
    hint = emit_hint("router", kv, GroupConfig(size, direction))
    assert hint.layer_types == expected
    as_it_is = emit_hint("planner", kv, GroupConfig(size, direction))
    assert (as_it_is.layer_types, as_it_is.saved_fraction) == (own, 0)
    assert as_it_is.kv_bytes.hint == as_it_is.kv_bytes.model == hint.kv_bytes.model


def test_windows_of_a_pattern_are_as_long_as_one_says():
    kv = model_of("0s_1s_2_3", sliding_window=8)
    for window, tokens in (None, 8), (5, 5):
        hint = emit_hint("router", kv, GroupConfig(layer_types="0_0s_2s_2s"), sliding_window=window, context_length=10)
        assert hint.sliding_window == tokens
        assert hint.saved_fraction == pytest.approx(1 - (10 + tokens) / (2 * 8 + 2 * 10))
    assert emit_hint("planner", kv, GroupConfig(layer_types="0_0s_2s_2s"), sliding_window=5).sliding_window == 8
    wider = emit_hint("router", kv, GroupConfig(layer_types="0_1_2_3"), context_length=10)
    assert (wider.sliding_window, wider.saved_fraction) == (None, pytest.approx(-4 / 36))


def test_latents_are_counted_and_not_shared():
    kv = model_of("0_1_2_3", kv_latents=[None, None, {"latent": 6}, {"latent": 10}], dtype="float16")
    plain = 2 * 2 * 8  # keys and values of two heads
    hint = emit_hint("router", kv, GroupConfig(max_layer=1), context_length=100)
    assert (hint.kv_bytes.model, hint.kv_bytes.saved) == (200 * (2 * plain + 16), 200 * plain)
    with pytest.raises(UserError, match="layer 3 would read layer 2, not 3, but latents are read only by the layers"):
        emit_hint("router", kv)
    assert emit_hint("planner", kv, context_length=100).kv_bytes.hint == 200 * (2 * plain + 16)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("bypass", [True, False])
@pytest.mark.parametrize("role", ["router", "planner"])
def test_who_may_share(role, bypass, thinking):
    hint = emit_hint(role, 4, GroupConfig(thinking_bypass=bypass), thinking=thinking)
    assert hint.ignored == (role == "planner" or (thinking and bypass)) == (hint.ignored_reason is not None)
    assert hint.kv_source == ([0, 1, 2, 3] if hint.ignored else [0, 0, 2, 2])
    assert hint.saved_fraction == (0 if hint.ignored else 0.5)
    assert hinted_layer_types(json.loads(json.dumps(hint.as_dict())), 4) == hint.layer_types


def test_what_an_engine_cannot_serve_is_said_and_not_turned():
    group = GroupConfig(2, "upper", 1)
    hint = emit_hint("router", 6, group)
    assert hint.layer_types == "0_2_2_4_4_5"
    assert hint.not_served == {
        "vllm": "layers 1, 3 read layers above, which the plugin serves only with experimental=true"
    }
    assert emit_hint("router", 6, group, experimental=True).not_served == {}
    apart = emit_hint("router", 3, GroupConfig(layer_types="0_1_1:0"), experimental=True).not_served["vllm"]
    assert apart == "layer 2 reads the keys of layer 1 with the values of layer 0, which the plugin does not serve"
    assert emit_hint("router", 6, GroupConfig()).not_served == {}
    assert "layer 0 reads a layer above" in emit_hint("router", 2, GroupConfig(2, "upper")).not_served["vllm"]


def test_models_are_read_from_their_configurations(tmp_path):
    tiny_config("0_0_2s_2s", dtype="float16").save_pretrained(tmp_path / "ours")
    kv = find_model(str(tmp_path / "ours" / "config.json"))
    assert (kv.plan.layer_types, kv.sliding_window, kv.dtype) == (
        "0_0_2s_2s",
        tiny_config("0").sliding_window,
        "float16",
    )
    sizes = dict(num_hidden_layers=3, hidden_size=32, num_attention_heads=4, max_position_embeddings=64)
    MistralConfig(**sizes, num_key_value_heads=2, sliding_window=9).save_pretrained(tmp_path / "mistral")
    hint = emit_hint("router", find_model(str(tmp_path / "mistral")))
    assert (hint.layer_types, hint.sliding_window) == ("0s_0s_2s", 9)
    assert (hint.kv_bytes.context_length, hint.kv_bytes.hint) == (64, 2 * 2 * 2 * 8 * 9 * 2)
    Qwen3Config(**sizes, num_key_value_heads=1, head_dim=16).save_pretrained(tmp_path / "qwen3")
    assert emit_hint("router", find_model(str(tmp_path / "qwen3"))).kv_bytes.model == 3 * 2 * 16 * 64 * 2


def test_the_schema_says_what_the_dataclasses_say():
    VALIDATOR.check_schema(schema())
    properties = schema()["properties"]
    assert list(properties) == schema()["required"] == [item.name for item in fields(SharingHint)]
    group = properties["group"]
    assert list(group["properties"]) == group["required"] == [item.name for item in fields(GroupConfig)]
    assert tuple(group["properties"]["direction"]["enum"]) == DIRECTIONS
    for hint in emit_hint("router", 4), emit_hint("planner", model_of("0s_1_1"), thinking=True):
        VALIDATOR.validate(json.loads(json.dumps(hint.as_dict())))


PATHS = [(name,) for name in schema()["properties"]] + [
    (name, inner) for name in ("group", "kv_bytes") for inner in schema()["properties"][name]["properties"]
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.just(0.5) | st.sampled_from(["", "upper", "x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "dtype"]), inner, max_size=2),
)


@given(st.sampled_from(PATHS), JSON, st.sampled_from(["set", "add", "remove"]))
def test_what_the_schema_forbids_is_refused(path, value, change):
    document = json.loads(json.dumps(emit_hint("router", model_of("0_1")).as_dict()))
    *outer, name = path
    place = document[outer[0]] if outer else document
    if change == "remove":
        del place[name]
    else:
        place[name if change == "set" else f"{name}_"] = value
    try:
        check_schema(document, schema())
        is_allowed = True
    except UserError as error:
        assert "\n" not in str(error)
        is_allowed = False
    assert is_allowed == VALIDATOR.is_valid(document)


SAVED = {"context_length": 8, "dtype": "int8", "model": 64, "hint": 32, "saved": 32}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2, "new": 1}, "hint: version=2: allowed are 1"),
        ({"version": True}, "hint: version=true: allowed is a whole number"),
        ({"layers": 1}, "hint: unknown key 'layers'; did you mean 'num_layers'?"),
        ({"role": "retreiver"}, "hint: role='retreiver': allowed are retriever, .*did you mean 'retriever'?"),
        ({"ignored": True}, "hint: ignored=true: does not follow from role, thinking and group"),
        ({"thinking": True}, "hint: ignored=false: does not follow from role, thinking and group"),
        ({"kv_source": [0, 0, 2, 3]}, r"hint: kv_source=\[0, 0, 2, 3\]: is not what layer_types=0_0_2_2 says"),
        (
            {"kv_source": [0, 0, 2, [2, 0]]},
            r"hint: kv_source=\[0, 0, 2, \[2, 0\]\]: is not what layer_types=0_0_2_2 says",
        ),
        ({"kv_source": [0, 0, 2, [2, "0"]]}, r"hint: kv_source\[3\]\[1\]=\"0\": allowed is a whole number"),
        ({"layer_types": "0_0_2"}, "hint: layer_types='0_0_2': has 3 entries, but num_hidden_layers=4"),
        ({"layer_types": "0_0_2s_2"}, "hint: sliding_window=null: layer_types=0_0_2s_2 has windows"),
        ({"kv_bytes": SAVED | {"saved": 31}}, r"hint: kv_bytes.saved=31: is not 64 - 32"),
        ({"kv_bytes": SAVED, "saved_fraction": 0.6}, r"hint: saved_fraction=0.6: is not that of kv_bytes, 32 of 64"),
        ({"num_layers": 0}, "hint: num_layers=0: allowed is 1 or more"),
        ({"group.direction": "uper"}, "hint: group.direction='uper': allowed are upper, lower; did you mean 'upper'?"),
        ({"group.group_size": 2.5}, "hint: group.group_size=2.5: allowed is a whole number"),
        ({"group.thinking_roles": ["router"]}, "hint: group.thinking_roles: 'router' is among"),
        ({"group.size": 2}, "hint: unknown key 'group.size'; did you mean 'group_size'?"),
    ],
)
def test_wrong_hints_are_refused_in_one_line(change, message):
    values = json.loads(json.dumps(emit_hint("router", 4).as_dict()))
    for name, value in change.items():
        *outer, last = name.split(".")
        (values[outer[0]] if outer else values)[last] = value
    with pytest.raises(UserError, match=f"^{message}"):
        read_hint(values)


def test_files_are_named_and_other_models_refused(tmp_path):
    file = tmp_path / "hint.json"
    with pytest.raises(UserError, match=f"^hint={file}: cannot be read: FileNotFoundError"):
        read_hint(file)
    file.write_text("{")
    with pytest.raises(UserError, match=f"^hint={file}: cannot be read: JSONDecodeError"):
        read_hint(file)
    file.write_text("[]")
    with pytest.raises(UserError, match=rf"^hint={file}: is \[\]: allowed is an object"):
        read_hint(file)
    file.write_text("{}")
    with pytest.raises(UserError, match=f"^hint={file}: has no 'version'"):
        read_hint(file)
    file.write_text(json.dumps(emit_hint("router", 4).as_dict()))
    assert hinted_layer_types(str(file), 4) == "0_0_2_2"
    with pytest.raises(UserError, match=f"^kv_sharing={file}: is for 4 layers, but the model has 6; make one for it"):
        hinted_layer_types(file, 6, key="kv_sharing")
