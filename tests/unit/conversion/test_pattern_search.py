"""The patterns that a search goes through, its budget, and what it expects of a merge."""

import itertools

import pytest

from lckv.conversion.pattern_search import (
    Reach,
    Span,
    Surrogate,
    lowest_changed,
    own_spans,
    owners_in,
    plan_of,
    plan_of_spans,
    resolve_reach,
)
from lckv.errors import UserError
from lckv.sharing.patterns import build_layer_types, parse_layer_types
from lckv.utils.byte_sizes import parse_budget


def patterns(merges):
    return [plan_of_spans(merge.spans, llama(merge.spans[-1].stop)).layer_types for merge in merges]


def llama(num_layers):
    return parse_layer_types(build_layer_types("llama", num_layers))


def test_an_owner_that_goes_leaves_its_readers_to_a_neighbour():
    down, both = Reach.of("down", 9), Reach.of("both", 9)
    assert patterns(down.merges(own_spans(3))) == ["0_0_2", "0_1_1"]
    assert patterns(both.merges(own_spans(3))) == ["0_0_2", "1_1_2", "0_1_1", "0_2_2"]
    two = (Span(1, 0, 2), Span(2, 2, 4))
    assert patterns(down.merges(two)) == []  # nobody looks up
    assert patterns(both.merges(two)) == ["1_1_1_1", "2_2_2_2"]


def test_windows_stay_with_their_layers():
    plan = plan_of_spans((Span(0, 0, 2), Span(2, 2, 3)), parse_layer_types("0_1s_2s"))
    assert plan.layer_types == "0_0s_2s"


def test_layers_that_read_the_same_in_the_source_stay_together():
    source = parse_layer_types("2_3s_2_3_4_2")
    plan = plan_of_spans((Span(1, 0, 2), Span(2, 2, 3)), source)
    assert plan.layer_types == "3_3s_3_3_4_3"
    assert lowest_changed(plan, Span(1, 0, 2), source) == 0


@pytest.mark.parametrize(
    ("source", "owners", "merged", "lowest"),
    [
        ("0_1_2_3", [0, 1, 2, 2], Span(2, 2, 4), 2),
        ("0_0_2_2_4", [0, 2, 2], Span(2, 1, 3), 2),
        ("0_3_3_3_4", [0, 2, 2], Span(2, 1, 3), 1),
        ("1_1_2_2_4", [0, 2, 2], Span(2, 1, 3), 2),
        ("0_1_0_3_4", [0, 1, 3, 3], Span(3, 2, 4), 3),
        ("0_1_2_0_4", [0, 1, 3, 3], Span(3, 2, 3), 0),  # layer 3 reads below all that has changed
    ],
)
def test_what_is_below_a_merge_need_not_run_again(source, owners, merged, lowest):
    source = parse_layer_types(source)
    assert lowest_changed(plan_of(owners, source), merged, source) == lowest


@pytest.mark.parametrize("directions", ["down", "both"])
@pytest.mark.parametrize("distance", [1, 2, 3])
def test_fewest_owners_is_what_merging_comes_down_to(directions, distance):
    reach = Reach.of(directions, distance)
    seen = {own_spans(6): None}
    for spans in seen_and_growing(seen, reach):
        below = [*reachable(spans, reach)]
        assert reach.fewest_owners(spans) == min(len(each) for each in below)
    if (directions, distance) == ("down", 1):  # there is something to be avoided
        assert {len(spans) for spans in seen if not reach.merges(spans)} == {3, 4}


def seen_and_growing(seen, reach):
    queue = list(seen)
    while queue:
        spans = queue.pop()
        yield spans
        for merge in reach.merges(spans):
            if merge.spans not in seen:
                seen[merge.spans] = None
                queue.append(merge.spans)


def reachable(spans, reach):
    yield spans
    for merge in reach.merges(spans):
        yield from reachable(merge.spans, reach)


def test_the_surrogate_adds_up_steps_until_a_span_was_tried():
    surrogate, reach = Surrogate(), Reach.of("both", 9)
    first = {(merge.merged.owner, merge.merged.start): merge for merge in reach.merges(own_spans(4))}
    for (owner, start), merge in first.items():
        surrogate.record(0.0, merge, 0.1 * 2**start if owner == start else 10.0 * 2**start)
    spans = first[1, 1].spans  # 0_1_1_3 has lost 0.2
    down, wide_up, up, far_up = reach.merges(spans)
    assert (down.merged, wide_up.merged) == (Span(0, 0, 3), Span(1, 0, 3))
    # Layer 1 goes one step down to layer 0, layer 2 two steps.
    assert surrogate.estimate(0.2, down) == pytest.approx(0.2 + (0.1 + (0.1 + 0.2)) - 0.2)
    assert surrogate.estimate(0.2, wide_up) == pytest.approx(0.2 + (10 + 0.2) - 0.2)
    assert (up.merged, far_up.merged) == (Span(1, 1, 4), Span(3, 1, 4))
    assert surrogate.estimate(0.2, far_up) == pytest.approx(0.2 + (20 + 40 + 40) - 0.2)
    surrogate.record(0.2, down, 0.7)
    assert surrogate.estimate(0.2, down) == pytest.approx(0.7)
    assert surrogate.estimate(1.2, down) == pytest.approx(1.7)


@pytest.mark.parametrize(
    ("given", "expected"), [(0.5, 0.5), ("0.25", 0.25), (".5", 0.5), (1536, 1536), ("12KiB", 12288), ("2kB", 2000)]
)
def test_budgets_are_fractions_or_bytes(given, expected):
    budget = parse_budget(given)
    assert budget == expected and type(budget) is type(expected)


@pytest.mark.parametrize("given", [None, 0, 0.0, 1, 1.0, -0.5, "half", True, "50%", "", "nan", 1.5, "2.0"])
def test_other_budgets_are_refused(given):
    with pytest.raises(UserError, match="^budget="):
        parse_budget(given)


def test_owners_that_fit():
    assert [owners_in(each, 100, 30) for each in (0.5, 0.1, 0.29, 1500, 1599, 100)] == [15, 3, 8, 15, 15, 1]
    for budget, message in (
        (0.03, "budget=0.03: is too little: .* one layer alone are 100 bytes per token, 0.0333 of the model's 3000"),
        (99, "budget=99 bytes: is too little"),
        (3000, "budget=3000 bytes: is what the model needs already: 3000 bytes per token in 30 layers"),
    ):
        with pytest.raises(UserError, match=message):
            owners_in(budget, 100, 30)


def test_the_reach_is_long_enough_or_refused():
    assert resolve_reach("down", None, 15, 30) == Reach(down=4, up=0)
    assert resolve_reach("both", None, 1, 4) == Reach(down=3, up=3)
    assert resolve_reach("both", 1, 10, 30) == Reach(down=1, up=1)
    with pytest.raises(UserError, match="^max_distance=1: leaves 15 of 30 layers .* room for 14; allow a larger"):
        resolve_reach("down", 1, 14, 30)
    for num_layers, num_owners in itertools.product(range(2, 12), range(1, 11)):
        if num_owners < num_layers:
            resolve_reach("down", None, num_owners, num_layers)
