"""The search for a sharing pattern: layers give up their keys and values one by one, wherever it costs least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lckv.conversion.merging import Merge, Reach, Spans, Surrogate, layer_types_of, own_spans
from lckv.conversion.scoring import Converter, Score, Scorer
from lckv.patterns import SharingPlan, parse_layer_types


@dataclass(frozen=True)
class ScoredPattern:
    """A pattern that was scored; `expected` is the loss that the surrogate had foretold, if it was asked."""

    layer_types: str
    num_owners: int
    loss: float
    expected: float | None = None


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
    """Goes from the pattern in which every layer reads itself, one owner at a time, to a given number of owners.

    The first step scores every merge of two neighbouring layers. These losses foretell, by adding up, those of all
    later steps (see [`lckv.conversion.merging.Surrogate`]), of which only the most promising are scored. Layers below
    a merge do what they did before, so they do not run again.
    """

    def __init__(self, converter: Converter, scorer: Scorer, limits: SearchLimits) -> None:
        self._converter, self._scorer, self._limits = converter, scorer, limits
        self._surrogate = Surrogate()
        self._has_window = [layer.is_sliding for layer in converter.config.sharing_plan.layers]

    def run(
        self,
        trace: SearchTrace,
        *,
        on_scored: Callable[[ScoredPattern], Any] | None = None,
        on_step: Callable[[ScoredPattern], Any] | None = None,
    ) -> None:
        """Searches, and writes into an empty `trace` what comes out as it does.

        Args:
            trace: empty.
            on_scored: called with each pattern that was scored.
            on_step: called with the best pattern of each number of owners.
        """
        plan = self._converter.config.sharing_plan
        states = [_State(own_spans(plan.num_hidden_layers), plan, Score(0.0, self._scorer.original))]
        trace.frontier.append(ScoredPattern(plan.layer_types, plan.num_hidden_layers, 0.0))
        trace.candidates.append(trace.frontier[0])
        while len(states[0].spans) > self._limits.num_owners:
            states = self._step(states, trace, on_scored)
            best = states[0]
            trace.frontier.append(ScoredPattern(best.plan.layer_types, len(best.spans), best.score.loss))
            if on_step is not None:
                on_step(trace.frontier[-1])

    def _step(
        self, states: Sequence[_State], trace: SearchTrace, on_scored: Callable[[ScoredPattern], Any] | None
    ) -> list[_State]:
        """The best patterns with one owner less."""
        best: list[_State] = []
        tried = []
        for state, merge, expected in self._shortlist(states):
            plan = parse_layer_types(layer_types_of(merge.spans, self._has_window))
            score = self._scorer.score(plan, merge.merged.start, state.score.inputs)
            child = _State(merge.spans, plan, score)
            tried.append(child.plan)
            loss = child.score.loss
            self._surrogate.record(state.score.loss, merge, loss)
            trace.candidates.append(ScoredPattern(child.plan.layer_types, len(child.spans), loss, expected))
            # What enters each layer is kept of the best only. Ties go to the one that was tried first.
            best = sorted([*best, child], key=lambda each: each.score.loss)[: self._limits.beam]
            if on_scored is not None:
                on_scored(trace.candidates[-1])
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
        if len(states[0].spans) == self._converter.config.sharing_plan.num_hidden_layers:
            return [(state, merge, None) for state, merge in merges.values()]
        expected = {
            spans: self._surrogate.estimate(state.score.loss, merge) for spans, (state, merge) in merges.items()
        }
        chosen = sorted(expected, key=lambda spans: expected[spans])[: limits.shortlist * len(states)]
        return [(*merges[spans], expected[spans]) for spans in chosen]
