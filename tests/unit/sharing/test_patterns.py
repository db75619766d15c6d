"""The `layer_types` language: parsing, refusing, cycles, and the builders of named patterns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lckv.errors import UserError
from lckv.sharing.patterns import PATTERNS, build_layer_types, parse_layer_types, pattern_parameters
from tests.strategies import layer_types

PARTITIONS, POSITIONS = ("pizza", "sandwich", "lasagna"), ("bottom", "top", "middle")
STUDY = [f"{partition}_{position}" for partition in PARTITIONS for position in POSITIONS]


@given(layer_types())
def test_parsing_keeps_every_entry(string):
    plan = parse_layer_types(string)
    assert plan.layer_types == string
    pairs = [[int(source) for source in entry.rstrip("s").split(":")] for entry in string.split("_")]
    keys, values = [pair[0] for pair in pairs], [pair[-1] for pair in pairs]
    for layer, entry in zip(plan.layers, string.split("_"), strict=True):
        assert layer.sources == (keys[layer.layer_idx], values[layer.layer_idx])
        assert layer.is_sliding == entry.endswith("s")
        assert layer.is_upward == (max(pairs[layer.layer_idx]) > layer.layer_idx)
        assert layer.computes_keys == (layer.layer_idx in keys)
        assert layer.computes_values == (layer.layer_idx in values)
    assert plan.kv_owners == tuple(sorted({*keys, *values}))


def test_equal_sources_have_one_spelling():
    assert parse_layer_types("0:0_1:1s_1:0") == parse_layer_types("0_1s_1:0")
    assert parse_layer_types("0:0_1:1s_1:0").layer_types == "0_1s_1:0"


@given(layer_types())
def test_cycles_are_where_upward_entries_reach(string):
    plan = parse_layer_types(string)
    covered = [index for segment in plan.segments for index in range(segment.start, segment.stop)]
    assert covered == list(range(plan.num_hidden_layers))
    for segment in plan.segments:
        inside = plan.layers[segment.start : segment.stop]
        upward = [layer for layer in inside if layer.is_upward]
        assert segment.is_cycle == bool(upward)
        if segment.is_cycle:
            assert inside[0].is_upward
            assert max(source for layer in upward for source in layer.sources) == segment.stop - 1
    assert plan.has_cycles == any(segment.is_cycle for segment in plan.segments)


def test_cycles_by_hand():
    def cycles(string):
        return [(s.start, s.stop) for s in parse_layer_types(string).segments if s.is_cycle]

    assert cycles("0_1_2_3") == []
    assert cycles("0_6_6_6_6_6_6_7") == [(1, 7)]
    assert cycles("2_2_2_5_5_5_8_8_8") == [(0, 3), (3, 6), (6, 9)]
    assert cycles("1_3_2_3_4") == [(0, 4)]  # layer 1, inside the reach of layer 0, reaches further
    assert cycles("1_1_3_3") == [(0, 2), (2, 4)]
    assert cycles("0_0:2_1:3_3_3:0") == [(1, 4)]  # either stream reaches up


def test_owner_keeps_what_its_widest_reader_needs():
    plan = parse_layer_types("0_1s_1s_0s_4s_1")
    assert not plan.owner_is_sliding(0)
    assert not plan.owner_is_sliding(1)
    assert plan.owner_is_sliding(4)
    # Layer 3 reads layers 1 and 2 together, so that these keep as many tokens: all, as layer 2 reads itself in full.
    assert [parse_layer_types("0s_1s_2_1:2s").owner_is_sliding(owner) for owner in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("", "is empty"),
        ("0_1_5", "entry 2 is '5', but there is no layer 5; allowed are 0 to 2"),
        ("0_x", "entry 1 is 'x'"),
        ("0_1S", "entry 1 is '1S'"),
        ("0__1", "entry 1 is ''"),
        ("0_1_", "entry 2 is ''"),
        ("0_-1", "entry 1 is '-1'"),
        ("0_1ss", "entry 1 is '1ss'"),
        ("0_0:9", "entry 1 is '0:9', but there is no layer 9"),
        ("0_0:", "entry 1 is '0:'"),
        ("0_:1", "entry 1 is ':1'"),
        ("0_1:0:0", "entry 1 is '1:0:0'"),
        (
            "0_0s:1",
            "entry 1 is '0s:1'; allowed is a layer number, or two as in '3:0' (keys:values), with an 's' behind",
        ),
        ("0_ 1", "entry 1 is ' 1'"),
        ("٠_1", "entry 0 is '٠'"),
    ],
)
def test_wrong_strings_name_the_entry(string, message):
    with pytest.raises(UserError) as error:
        parse_layer_types(string)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_count_and_numbers_are_refused():
    with pytest.raises(UserError, match="has 3 entries, but num_hidden_layers=4"):
        parse_layer_types("0_1_2", 4)
    with pytest.raises(UserError, match="in quotes"):
        parse_layer_types(222)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "num_layers", "expected"),
    [
        ("llama", 8, "0_1_2_3_4_5_6_7"),
        ("cla", 8, "0_0_2_2_4_4_6_6"),
        ("yoco", 8, "0s_1s_2s_3s_4_4_4_4"),
        ("fusedkv_lite", 8, "0_1_2_3_3:0_3:0_3:0_3:0"),
        ("fusedkv_lite", 3, "0_1_1:0"),
        ("mix_attention", 8, "0_1s_1s_0_4s_4s_0_7s"),
        ("lckv", 8, "0_6_6_6_6_6_6_7"),
        ("sandwich_top", 8, "0_6_6_6_6_6_6_7"),
        ("sandwich_middle", 8, "0_4_4_4_4_4_4_7"),
        ("sandwich_bottom", 8, "0_1_1_1_1_1_1_7"),
        ("pizza_bottom", 8, "0_1_1_1_1_1_1_1"),
        ("pizza_top", 8, "0_7_7_7_7_7_7_7"),
        ("lasagna_top", 9, "2_2_2_5_5_5_8_8_8"),
        ("lasagna_bottom", 9, "0_0_0_3_3_3_6_6_6"),
        ("lasagna_middle", 9, "1_1_1_4_4_4_7_7_7"),
    ],
)
def test_published_patterns(name, num_layers, expected):
    assert build_layer_types(name, num_layers) == expected


def num_owners(name: str, num_layers: int, value: int) -> int:
    """How many layers compute KV, by each family's own definition."""
    if name == "llama":
        return num_layers
    if name == "cla":
        return -(-num_layers // value)
    if name == "mix_attention":
        return 1 + -(-(num_layers - 1) // 3)
    return value if name in [*STUDY, "fusedkv_lite"] else value + 1


@given(st.sampled_from(sorted(PATTERNS)), st.integers(1, 40), st.data())
def test_every_builder_at_every_depth(name, num_layers, data):
    parameters = {}
    lowest = 1 if name in [*STUDY, "cla", "fusedkv_lite"] else 0
    for parameter in pattern_parameters(name):
        parameters[parameter] = data.draw(st.integers(lowest, num_layers - 1 + lowest), label=parameter)
    plan = parse_layer_types(build_layer_types(name, num_layers, **parameters), num_layers)
    assert len(plan.kv_owners) == num_owners(name, num_layers, next(iter(parameters.values()), 0))


def test_builders_refuse_what_cannot_be():
    with pytest.raises(UserError, match="unknown sharing pattern 'lkcv'.*did you mean 'lckv'"):
        build_layer_types("lkcv", 8)
    with pytest.raises(UserError, match="'cla' has no parameter 'groupsize': allowed are group_size; did you mean"):
        build_layer_types("cla", 8, groupsize=2)
    with pytest.raises(UserError, match="group_size=9: allowed is a whole number, 1 to 8"):
        build_layer_types("cla", 8, group_size=9)
    with pytest.raises(UserError, match="num_hidden_layers=0"):
        build_layer_types("llama", 0)
    with pytest.raises(UserError, match="warmup_layers=8: allowed is a whole number, 0 to 7"):
        build_layer_types("lckv", 8, warmup_layers=8)
