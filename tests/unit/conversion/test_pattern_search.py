"""The patterns that a search goes through, its budget, and what it expects of a merge."""

import itertools

import pytest

from lckv.byte_sizes import parse_budget
from lckv.conversion.pattern_search import (
    Reach,
    Span,
    Surrogate,
    layer_types_of,
    own_spans,
    owners_in,
    resolve_reach,
)
from lckv.errors import UserError


def patterns(merges):
    return [layer_types_of(merge.spans, [False] * merge.spans[-1].stop) for merge in merges]


def test_an_owner_that_goes_leaves_its_readers_to_a_neighbour():
    down, both = Reach.of("down", 9), Reach.of("both", 9)
    assert patterns(down.merges(own_spans(3))) == ["0_0_2", "0_1_1"]
    assert patterns(both.merges(own_spans(3))) == ["0_0_2", "1_1_2", "0_1_1", "0_2_2"]
    two = (Span(1, 0, 2), Span(2, 2, 4))
    assert patterns(down.merges(two)) == []  # nobody looks up
    assert patterns(both.merges(two)) == ["1_1_1_1", "2_2_2_2"]


def test_windows_stay_with_their_layers():
    assert layer_types_of((Span(0, 0, 2), Span(2, 2, 3)), [False, True, True]) == "0_0s_2s"


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
