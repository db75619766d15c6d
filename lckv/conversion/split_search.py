"""The search goes on among the owners that are left: for layers that do better with keys and values of two of them.

Who keeps what stays as it is, and so do the bytes: only layers without keys and values of their own look for others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lckv.conversion.pattern_search import Reach, ScoredPattern, SearchTrace, plan_of
from lckv.conversion.scoring import Converter, Scorer
from lckv.sharing.patterns import parse_layer_types

_Sources = list[tuple[int, int]]
"""For each of the source's owners, by number, whose keys and whose values its layers read now."""


class SplitSearch:
    """Gives layers other keys, or other values, one of the source's owners after the other, from the bottom.

    For each, all owners that are left within reach are tried, for keys and for values; the best is taken if it loses
    less than what there was.
    """

    def __init__(self, scorer: Scorer, converter: Converter, reach: Reach) -> None:
        self._scorer, self._converter, self._reach = scorer, converter, reach
        self._plan = converter.config.sharing_plan

    def num_scored(self, pattern: ScoredPattern) -> int:
        """How many patterns are scored, where none is better."""
        sources = self._sources_in(pattern)
        return sum(len(self._changed(sources, place)) for place in range(len(sources)))

    def run(
        self, pattern: ScoredPattern, trace: SearchTrace, on_scored: Callable[[], Any] | None = None
    ) -> ScoredPattern:
        """The best pattern of the owners that `pattern` has, which is that one if none is better.

        Args:
            pattern: where to begin.
            trace: takes what is tried, and what comes out if it is better.
            on_scored: called after each pattern that was scored.
        """
        best, sources = pattern, self._sources_in(pattern)
        for place in range(len(sources)):
            tried = {}
            for changed in self._changed(sources, place):
                plan = plan_of(changed, self._plan)
                loss = self._scorer.score(self._converter.build(plan)).loss
                found = ScoredPattern(plan.layer_types, pattern.num_owners, loss)
                trace.candidates.append(found)
                tried[found] = changed
                if on_scored is not None:
                    on_scored()
            nearest = min(tried, key=lambda each: each.loss, default=best)
            if nearest.loss < best.loss:
                best, sources = nearest, tried[nearest]
            self._converter.forget([parse_layer_types(best.layer_types)])
        if best is not pattern:
            trace.frontier.append(best)
        return best

    def _sources_in(self, pattern: ScoredPattern) -> _Sources:
        """What the layers read which read each of the source's owners before."""
        owners, now = self._plan.kv_owners, parse_layer_types(pattern.layer_types).sources
        first_readers = (self._plan.readers(owner)[0].layer_idx for owner in owners)
        return [(owners.index(key), owners.index(value)) for key, value in (now[reader] for reader in first_readers)]

    def _changed(self, sources: _Sources, place: int) -> list[_Sources]:
        """The same with other keys, or other values, in one place; none where an owner is left."""
        kept = [owner for owner, read in enumerate(sources) if read == (owner, owner)]
        if place in kept:
            return []
        near = [owner for owner in kept if -self._reach.down <= owner - place <= self._reach.up]
        key, value = sources[place]
        pairs = [(owner, value) for owner in near if owner != key] + [(key, owner) for owner in near if owner != value]
        return [[*sources[:place], pair, *sources[place + 1 :]] for pair in pairs]
