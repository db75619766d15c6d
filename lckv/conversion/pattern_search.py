"""The search for a sharing pattern: layers give up their keys and values one by one, wherever it costs least.

Layers that read the same keys and values in the source stay together. So what is counted here, in spans and distances,
are its owners of keys and values, from the bottom; where every layer reads itself, these are the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lckv.conversion.scoring import Converter, Score, Scorer
from lckv.errors import UserError
from lckv.sharing.patterns import SharingPlan


@dataclass(frozen=True)
class Span:
    """Owners `start, ..., stop - 1` of the source, whose readers all read one among them now, the `owner`."""

    owner: int
    start: int
    stop: int

    @property
    def num_layers(self) -> int:
        """How many of the source's owners it replaces, itself among them."""
        return self.stop - self.start


Spans = tuple[Span, ...]
"""A sharing pattern as its spans, from the bottom."""


def own_spans(num_layers: int) -> Spans:
    """The source's own pattern."""
    return tuple(Span(layer_idx, layer_idx, layer_idx + 1) for layer_idx in range(num_layers))


def plan_of(owners: Sequence[int | tuple[int, int]], source: SharingPlan) -> SharingPlan:
    """The pattern in which layers read the source's owner number `owners[i]` that read its `i`-th one before.

    Of two, they read the keys of the first and the values of the second.
    """
    pairs = [(now, now) if isinstance(now, int) else now for now in owners]
    instead = {
        before: (source.kv_owners[key], source.kv_owners[value])
        for before, (key, value) in zip(source.kv_owners, pairs, strict=True)
    }
    sources = [instead[layer.key_source] for layer in source.layers]
    return source.with_sources(sources)


def plan_of_spans(spans: Spans, source: SharingPlan) -> SharingPlan:
    """The pattern that these spans of the source's owners stand for; windows stay with their layers."""
    return plan_of([span.owner for span in spans for _ in range(span.num_layers)], source)


def lowest_changed(plan: SharingPlan, merged: Span, source: SharingPlan) -> int:
    """The layer from which on a pattern runs anew, if the one before it has run and all but `merged` is the same.

    Nothing above it reads below, nor the other way round.
    """
    owners = source.kv_owners[merged.start : merged.stop]
    first = min(*owners, *(layer.layer_idx for layer in source.layers if layer.key_source in owners))
    return next(
        start
        for start in range(first, -1, -1)
        if all((layer.key_source < start) == (layer.layer_idx < start) for layer in plan.layers)
    )


@dataclass(frozen=True)
class Merge:
    """One step: two neighbouring spans become one, after which the whole pattern is `spans`."""

    lower: Span
    upper: Span
    merged: Span
    spans: Spans


@dataclass(frozen=True)
class Reach:
    """How many owners below one that gives up its keys and values, or above it, its substitute may be."""

    down: int
    up: int

    @classmethod
    def of(cls, directions: str, max_distance: int) -> Reach:
        """The reach for `directions`, "down" or "both"."""
        return cls(max_distance, max_distance if directions == "both" else 0)

    def merges(self, spans: Spans) -> list[Merge]:
        """All patterns with one owner less that this reach allows."""
        found = []
        for index, (lower, upper) in enumerate(zip(spans, spans[1:], strict=False)):
            for owner in (lower.owner, upper.owner):
                merged = Span(owner, lower.start, upper.stop)
                if self._allows(merged):
                    found.append(Merge(lower, upper, merged, (*spans[:index], merged, *spans[index + 2 :])))
        return found

    def fewest_owners(self, spans: Spans) -> int:
        """The number of owners that merging can come down to.

        Taking as many spans together as possible, from the bottom, is optimal: a part of an allowed span is allowed.
        """
        count, taken = 0, 0  # spans that are taken together in so many
        for stop in range(1, len(spans) + 1):
            start = spans[taken].start
            if not any(self._allows(Span(span.owner, start, spans[stop - 1].stop)) for span in spans[taken:stop]):
                count, taken = count + 1, stop - 1
        return count + 1

    def _allows(self, span: Span) -> bool:
        return span.owner - span.start <= self.up and span.stop - 1 - span.owner <= self.down


class Surrogate:
    """What merges are expected to cost, from what merges have cost.

    The loss of a pattern is taken for the sum of its spans' costs. That of a span is what it added when it was last
    tried. One that was not tried yet costs the sum over its readers, and over the steps from the reader to the owner,
    of what merging two neighbouring layers alone has cost.
    """

    def __init__(self) -> None:
        self._costs: dict[Span, float] = {}

    def estimate(self, loss: float, merge: Merge) -> float:
        """The expected loss of a pattern that comes by `merge` from one of this loss."""
        return loss + self._cost(merge.merged) - self._cost(merge.lower) - self._cost(merge.upper)

    def record(self, before: float, merge: Merge, after: float) -> None:
        """Remembers the losses before and after a merge."""
        self._costs[merge.merged] = after - before + self._cost(merge.lower) + self._cost(merge.upper)

    def _cost(self, span: Span) -> float:
        if span.num_layers == 1:
            return 0.0
        if span in self._costs:
            return self._costs[span]
        # From each reader to the owner, one layer at a time, which is what the first step of the search has tried.
        down = (
            Span(low, low, low + 2) for reader in range(span.owner + 1, span.stop) for low in range(span.owner, reader)
        )
        up = (
            Span(low + 1, low, low + 2)
            for reader in range(span.start, span.owner)
            for low in range(reader, span.owner)
        )
        return sum(self._costs[step] for step in (*down, *up))


@dataclass(frozen=True)
class ScoredPattern:
    """A pattern that was scored.

    Attributes:
        layer_types: the pattern.
        num_owners: layers that compute keys and values.
        loss: see [`lckv.conversion.scoring.Scorer`].
        expected: the loss that the surrogate had foretold, if it was asked.
        latent_size: numbers of a token in all latents; `None` if keys and values are kept.
    """

    layer_types: str
    num_owners: int
    loss: float
    expected: float | None = None
    latent_size: int | None = None


@dataclass
class SearchTrace:
    """All patterns that a search has scored so far, and the best of each number of owners, the source's own first."""

    candidates: list[ScoredPattern] = field(default_factory=list)
    frontier: list[ScoredPattern] = field(default_factory=list)


@dataclass(frozen=True)
class SearchLimits:
    """How thoroughly to search.

    Attributes:
        reach: how far from a layer the owner may be that it reads.
        num_owners: where to stop.
        beam: how many patterns of each number of owners to go on from.
        shortlist: how many of each one's successors to score, the most promising by the surrogate.
    """

    reach: Reach
    num_owners: int
    beam: int = 1
    shortlist: int = 4

    def num_scored(self, num_layers: int) -> int:
        """At most so many patterns are scored."""
        per_owner = 2 if self.reach.up else 1
        total, num_parents = 0, 1
        for num_owners in range(num_layers, self.num_owners, -1):
            num_merges = per_owner * (num_owners - 1) * num_parents
            total += num_merges if num_owners == num_layers else min(num_merges, self.shortlist * num_parents)
            num_parents = min(self.beam, num_merges)
        return total


@dataclass(frozen=True)
class _State:
    """A pattern that the search goes on from."""

    spans: Spans
    plan: SharingPlan
    score: Score


class PatternSearch:
    """Goes from the source's own pattern, one owner at a time, to a given number of owners.

    The first step scores every merge of two neighbouring layers. These losses foretell, by adding up, those of all
    later steps (see [`Surrogate`]), of which only the most promising are scored. Layers below
    a merge do what they did before, so they do not run again.
    """

    def __init__(self, scorer: Scorer, converter: Converter, limits: SearchLimits) -> None:
        self._scorer, self._converter, self._limits = scorer, converter, limits
        self._surrogate = Surrogate()
        self._plan = converter.config.sharing_plan

    def run(self, trace: SearchTrace, on_scored: Callable[[], Any] | None = None) -> Iterator[ScoredPattern]:
        """Searches, and yields the best pattern of each number of owners.

        Args:
            trace: empty; what comes out is written there as it does.
            on_scored: called after each pattern that was scored.
        """
        plan, num_owners = self._plan, len(self._plan.kv_owners)
        states = [_State(own_spans(num_owners), plan, Score(0.0, self._scorer.original))]
        trace.frontier.append(ScoredPattern(plan.layer_types, num_owners, 0.0))
        trace.candidates.append(trace.frontier[0])
        while len(states[0].spans) > self._limits.num_owners:
            states = self._step(states, trace, on_scored)
            best = states[0]
            trace.frontier.append(ScoredPattern(best.plan.layer_types, len(best.spans), best.score.loss))
            yield trace.frontier[-1]

    def _step(self, states: Sequence[_State], trace: SearchTrace, on_scored: Callable[[], Any] | None) -> list[_State]:
        """The best patterns with one owner less."""
        best: list[_State] = []
        tried = []
        for state, merge, expected in self._shortlist(states):
            plan = plan_of_spans(merge.spans, self._plan)
            start = lowest_changed(plan, merge.merged, self._plan)
            score = self._scorer.score(self._converter.build(plan, start), start, state.score.inputs)
            child = _State(merge.spans, plan, score)
            tried.append(child.plan)
            loss = child.score.loss
            self._surrogate.record(state.score.loss, merge, loss)
            trace.candidates.append(ScoredPattern(child.plan.layer_types, len(child.spans), loss, expected))
            # What enters each layer is kept of the best only. Ties go to the one that was tried first.
            best = sorted([*best, child], key=lambda each: each.score.loss)[: self._limits.beam]
            if on_scored is not None:
                on_scored()
        self._converter.forget([*tried, *(state.plan for state in best)])
        return best

    def _shortlist(self, states: Sequence[_State]) -> list[tuple[_State, Merge, float | None]]:
        """The merges to score, the most promising first; in the first step, all."""
        limits = self._limits
        merges = {}
        for state in states:
            for merge in limits.reach.merges(state.spans):
                # The same pattern can come from two others; and some lead where no further merge is allowed.
                if merge.spans not in merges and limits.reach.fewest_owners(merge.spans) <= limits.num_owners:
                    merges[merge.spans] = state, merge
        if len(states[0].spans) == len(self._plan.kv_owners):
            return [(state, merge, None) for state, merge in merges.values()]
        expected = {
            spans: self._surrogate.estimate(state.score.loss, merge) for spans, (state, merge) in merges.items()
        }
        chosen = sorted(expected, key=lambda spans: expected[spans])[: limits.shortlist * len(states)]
        return [(*merges[spans], expected[spans]) for spans in chosen]


def owners_in(budget: float | int, bytes_per_owner: int, num_layers: int) -> int:
    """How many layers' keys and values, each of `bytes_per_owner` a token, fit a budget as `parse_budget` gives it.

    Raises:
        UserError: if not one fits, or all do.
    """
    full = bytes_per_owner * num_layers
    given = f"budget={budget}" if isinstance(budget, float) else f"budget={budget} bytes"
    # Rounding may leave 0.1 of 30 layers just below three.
    num_owners = int(budget * num_layers + 1e-9) if isinstance(budget, float) else budget // bytes_per_owner
    if num_owners < 1:
        raise UserError(
            f"{given}: is too little: the keys and values of one layer alone are {bytes_per_owner} bytes per token, "
            f"{1 / num_layers:.3g} of the model's {full}"
        )
    if num_owners >= num_layers:
        raise UserError(f"{given}: is what the model needs already: {full} bytes per token in {num_layers} layers")
    return num_owners


def resolve_reach(directions: str, max_distance: int | None, num_owners: int, num_layers: int) -> Reach:
    """How far layers may look for so many owners; by default about twice as far as equal spans would need.

    Raises:
        UserError: if a given `max_distance` is too short.
    """
    if max_distance is None:
        max_distance = 2 * -(-num_layers // num_owners)
    reach = Reach.of(directions, min(max_distance, num_layers - 1))
    fewest = reach.fewest_owners(own_spans(num_layers))
    if fewest > num_owners:
        raise UserError(
            f"max_distance={max_distance}: leaves {fewest} of {num_layers} layers with keys and values of their own, "
            f"and the budget has room for {num_owners}; allow a larger distance"
        )
    return reach
