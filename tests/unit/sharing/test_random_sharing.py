"""Which patterns are drawn, how often, and of what the draws depend."""

import pytest

from lckv.errors import UserError
from lckv.sharing.patterns import build_layer_types, parse_layer_types
from lckv.sharing.random_sharing import RandomSharing

EIGHT = parse_layer_types(build_layer_types("llama", 8))


def drawn(num_steps: int, plan=EIGHT, seed: int = 0, **settings):
    return [RandomSharing(plan, seed, **settings).layer_types(step) for step in range(num_steps)]


def num_owners(layer_types: str) -> int:
    return len(parse_layer_types(layer_types).kv_owners)


def test_draws_depend_on_seed_and_step_alone():
    assert drawn(50) == drawn(50)
    assert drawn(50) != drawn(50, seed=1)
    assert len(set(drawn(50))) > 20
    assert RandomSharing(EIGHT, 0).layer_types(6) == "0_0_2_3_3_5_6_6"  # on every machine, and in later versions


def test_layers_read_the_lowest_of_a_group_of_neighbours():
    for layer_types in drawn(200):
        sources = [layer.key_source for layer in parse_layer_types(layer_types).layers]
        assert sources[0] == 0
        assert all(source in (layer_idx, sources[layer_idx - 1]) for layer_idx, source in enumerate(sources))


@pytest.mark.parametrize("name", ["llama", "cla", "pizza_bottom", "sandwich_bottom", "lasagna_bottom"])
def test_published_patterns_are_among_them(name):
    four = parse_layer_types(build_layer_types("llama", 4))
    assert build_layer_types(name, 4) in drawn(200, four)


@pytest.mark.parametrize(("probability", "mean"), [(0.1, 1 + 7 * 0.9), (0.8, 1 + 7 * 0.2), (1.0, 1)])
def test_probability_says_how_many_own_keys_and_values_are_read(probability, mean):
    counts = [num_owners(layer_types) for layer_types in drawn(2000, probability=probability)]
    assert sum(counts) / len(counts) == pytest.approx(mean, abs=0.1)


def test_reach_bounds_how_far_below_a_layer_reads():
    for reach in (1, 3):
        plans = [parse_layer_types(layer_types) for layer_types in drawn(300, probability=0.7, reach=reach)]
        distances = {layer.layer_idx - layer.key_source for plan in plans for layer in plan.layers}
        assert distances == set(range(reach + 1))
    assert drawn(1, probability=1.0, reach=3) == ["0_0_0_0_4_4_4_4"]


def test_windows_stay_where_they_are():
    assert drawn(1, parse_layer_types("0s_1_2s_3"), probability=1.0) == ["0s_0_0s_0"]


@pytest.mark.parametrize(
    ("layer_types", "settings", "message"),
    [
        ("0", {}, "sharing=random: a model of one layer has nothing to choose from"),
        ("0_0_2", {}, "not 0_0_2; give a source that shares nothing"),
        ("0_1_2", {"reach": 3}, r"sharing.reach=3: .* allowed is 1 to 2"),
    ],
)
def test_refuses_where_there_is_nothing_to_choose_from(layer_types, settings, message):
    with pytest.raises(UserError, match=message):
        RandomSharing(parse_layer_types(layer_types), 0, **settings)
