"""The sharing patterns that a search goes through: neighbouring layers with common keys and values, merged further."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lckv.errors import UserError
from lckv.patterns import join_layer_types


@dataclass(frozen=True)
class Span:
    """Layers `start, ..., stop - 1`, which all read the keys and values of one among them, the `owner`."""

    owner: int
    start: int
    stop: int

    @property
    def num_layers(self) -> int:
        """How many layers read the owner, itself among them."""
        return self.stop - self.start


Spans = tuple[Span, ...]
"""A sharing pattern as its spans, from the bottom."""


def own_spans(num_layers: int) -> Spans:
    """The pattern in which every layer reads itself."""
    return tuple(Span(layer_idx, layer_idx, layer_idx + 1) for layer_idx in range(num_layers))


def layer_types_of(spans: Spans, has_window: Sequence[bool]) -> str:
    """The `layer_types` string of a pattern whose layers see a window only where `has_window` says so."""
    owners = [span.owner for span in spans for _ in range(span.num_layers)]
    return join_layer_types(owners, has_window)


@dataclass(frozen=True)
class Merge:
    """One step: two neighbouring spans become one, after which the whole pattern is `spans`."""

    lower: Span
    upper: Span
    merged: Span
    spans: Spans


@dataclass(frozen=True)
class Reach:
    """How many layers below its reader, or above it, an owner may be."""

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
