"""How a stack of layers runs in one forward call: once, or in cycles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import Cache

from lckv.models.parts.rotary import PositionEmbeddings
from lckv.models.parts.sharing_cache import CachePeeker, CacheWriter, Streams
from lckv.models.visibility.groups import Group, GroupKeys, groups_of, interleave
from lckv.models.visibility.masks import VisibleKeys
from lckv.sharing.iteration import Passes
from lckv.sharing.layout import KVLayout
from lckv.sharing.patterns import Segment, SharingPlan

States = dict[int, Streams]
"""Streams by the layer that writes them."""


@dataclass
class Trace:
    """What a forward call reports beside its result, noted while it runs; `None` for what nobody asked for.

    Attributes:
        hidden_states: what enters each layer, `(batch, q_len, hidden_size)`, and leaves the last.
        attentions: the attention weights `(batch, num_heads, q_len, kv_len)`, by layer.
        residuals: how far the KV of each cycle moved in its last pass, scalars.
        num_passes: passes over the cycle that took most.
    """

    hidden_states: list[torch.Tensor] | None = None
    attentions: dict[int, Any] | None = None
    residuals: list[torch.Tensor] | None = None
    num_passes: int = 1

    @property
    def wants_each_layer(self) -> bool:
        """Whether every layer's output or weights are returned, so that all have to run for all tokens."""
        return self.hidden_states is not None or self.attentions is not None

    def note(self, hidden_states: torch.Tensor) -> None:
        """Notes what enters a layer, or leaves the last, `(batch, q_len, hidden_size)`, if that is to be returned."""
        if self.hidden_states is not None:
            self.hidden_states.append(hidden_states)

    def of_group(self) -> Trace:
        """An empty trace for a group of tokens."""
        return Trace(None if self.hidden_states is None else [], None if self.attentions is None else {})

    def note_turns(self, turns: list[Turn]) -> None:
        """Notes what all groups of tokens have brought to the top of a cycle."""
        traces = [trace for _, trace in turns]
        if self.hidden_states is not None:
            by_layer = zip(*(trace.hidden_states or [] for trace in traces), strict=True)
            self.hidden_states += [interleave(parts) for parts in by_layer]
        if self.attentions is not None:
            for layer_idx in traces[-1].attentions or {}:
                parts = [(trace.attentions or {})[layer_idx] for trace in traces]
                if parts[-1] is not None and parts[0] is None:  # nobody has written yet when the first group reads
                    batch_size, num_heads, _, kv_len = parts[-1].shape
                    parts[0] = parts[-1].new_zeros(batch_size, num_heads, turns[0][0].shape[1], kv_len)
                self.attentions[layer_idx] = None if parts[0] is None else interleave(parts, dim=2)


@dataclass
class Stack:
    """The layers of a decoder, and what they are given in one forward call, or for one of its tokens.

    Attributes:
        layers: from the bottom.
        plan: which of them form cycles.
        layout: which streams each of them writes and reads.
        query_labels: for every layer, the name of the rotary embedding that its queries need.
        position_embeddings: cosines and sines of the new tokens, by the name of the rotary embedding.
        visible_keys: for every layer, which keys its queries see; `None` where no output is wanted.
        cache: takes what is written in the last pass.
        has_past: whether the cache holds earlier tokens.
        passes: over each cycle.
        kwargs: for the attention backend.
        group_keys: the same as `visible_keys` for groups of tokens; `None` where none take turns.
        trace: where to note what is reported.
    """

    layers: list[nn.Module]
    plan: SharingPlan
    layout: KVLayout
    query_labels: list[str | None]
    position_embeddings: dict[str | None, PositionEmbeddings]
    visible_keys: list[VisibleKeys | None]
    cache: Cache | None
    has_past: bool
    passes: Passes
    kwargs: dict[str, Any]
    group_keys: GroupKeys | None = None
    trace: Trace = field(default_factory=Trace)

    def run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Runs all layers from the bottom.

        Args:
            hidden_states: `(batch, q_len, hidden_size)`.

        Returns:
            Those that leave the last layer, for the tokens whose outputs are wanted.
        """
        states: States = {}
        for segment in self.plan.segments:
            run = self._run_cycle if segment.is_cycle else self._run_layers
            hidden_states, states = run(segment, hidden_states, states)
        return hidden_states

    def _run_cycle(self, cycle: Segment, hidden_states: torch.Tensor, states: States) -> tuple[torch.Tensor, States]:
        """Runs the layers of a cycle until what its upward readers read has settled (Wu and Tu, ACL 2024).

        Every pass starts from the same hidden states and reads, above itself, what the pass before has written, which
        for the first one is nothing. Passes before the last only make KV for the next one. The first of them run
        without gradient: it flows through the KV of the graded passes alone.
        """
        passes, owners = self.passes, self._owners_read_upward(cycle)
        zeros = self._zeros(owners, hidden_states)
        if passes.is_single:
            return self._run_layers(cycle, hidden_states, states | self._see(zeros if self.has_past else {}))
        drafts, num_passes = zeros, 0
        with torch.no_grad():
            while num_passes < passes.num_ungraded:
                before = drafts
                drafts = self._run_pass(cycle, hidden_states.detach(), states, before, num_passes == 0)
                num_passes += 1
                if passes.tolerance is not None and has_settled(before, drafts, owners, passes.tolerance):
                    break
        # From here on, `drafts` carry gradient: a loss behind the last pass reaches the projections of the owners
        # through what the graded passes before it have written, and earlier groups of tokens in the same pass.
        turns: list[Turn] = []
        for is_last in [False] * (passes.num_graded - 1) + [True]:
            before = drafts
            drafts = self._run_pass(cycle, hidden_states, states, before, num_passes == 0, turns if is_last else None)
            num_passes += 1
        self.trace.num_passes = max(self.trace.num_passes, num_passes)
        if self.trace.residuals is not None and num_passes > 1:
            self.trace.residuals.append(relative_change(before, drafts, owners))
        return self._leave(cycle, turns, states, drafts)

    def _run_pass(
        self,
        cycle: Segment,
        hidden_states: torch.Tensor,
        states: States,
        before: States,
        is_first: bool,
        turns: list[Turn] | None = None,
    ) -> States:
        """A pass over a cycle, up to what its top layer writes, in which groups of tokens take turns.

        A group reads what those before it have just written, and of the others what the pass before has.

        Args:
            cycle: the layers.
            hidden_states: what enters them, `(batch, q_len, hidden_size)`.
            states: what the readers of layers below the cycle see.
            before: what the owners in the cycle wrote in the pass before for the new tokens alone, each `(batch,
                num_heads, q_len, head_dim)`; zeros in the first one.
            is_first: whether it is the first pass.
            turns: takes what enters the top layer, in the last pass. In this all owners write, in others only those
                that are read in the next one.

        Returns:
            What the owners have written, like `before`.
        """
        top, drafts = cycle.stop - 1, dict(before)
        read_again = {source.owner for read in self.layout.sources[cycle.start : top] for source in read}
        writers = read_again if turns is None else set(self.layout.owners)
        # New tokens are to read the cached ones from the first turn on. Without any, an owner that has not written is
        # missing, and its readers skip attention instead of attending to zeros.
        seen = states | self._see(before if self.has_past or not is_first else {})
        for group in groups_of(self.passes.num_groups):
            turn, part = self._for_group(group), group.pick(hidden_states)
            for layer_idx in range(cycle.start, cycle.stop):
                if layer_idx in writers:
                    written: States = {}
                    turn._run_layer(layer_idx, part, written, None, True, None)
                    new = written[layer_idx]
                    old = drafts.get(layer_idx) or self._zeros([layer_idx], hidden_states)[layer_idx]
                    drafts[layer_idx] = tuple(map(group.put, old, new))
                    seen |= self._see({layer_idx: drafts[layer_idx]})
                if layer_idx < top:
                    visible_keys = self._visible_to(group, layer_idx, cycle, is_first)
                    part = turn._run_layer(layer_idx, part, seen, visible_keys, False, None, turn.trace.attentions)
                    turn.trace.note(part)
            if turns is not None:
                turns.append((part, turn.trace))
        return drafts

    def _leave(self, cycle: Segment, turns: list[Turn], states: States, drafts: States) -> tuple[torch.Tensor, States]:
        """Ends the last pass: what was written goes to the cache, and the top layer reads, for all tokens at once."""
        hidden_states = interleave([part for part, _ in turns])
        self.trace.note_turns(turns)
        write = None if self.cache is None else CacheWriter(self.cache)
        for owner in sorted(drafts):
            states = states | {owner: drafts[owner] if write is None else write(drafts[owner], owner)}
        top = cycle.stop - 1
        if self.visible_keys[top] is not None:
            hidden_states = self._run_layer(
                top, hidden_states, states, self.visible_keys[top], False, None, self.trace.attentions
            )
            self.trace.note(hidden_states)
        return hidden_states, states

    def _for_group(self, group: Group) -> Stack:
        """The same for the tokens of a group."""
        position_embeddings = {
            label: (group.pick(cos), group.pick(sin)) for label, (cos, sin) in self.position_embeddings.items()
        }
        return replace(self, position_embeddings=position_embeddings, trace=self.trace.of_group())

    def _visible_to(self, group: Group, layer_idx: int, cycle: Segment, is_first: bool) -> VisibleKeys | None:
        """What the queries of a group see in a layer: in the first pass, nothing that nobody has written yet."""
        if group.num_groups == 1:
            return self.visible_keys[layer_idx]
        assert self.group_keys is not None
        num_written = None
        if is_first:
            owners = (source.owner for source in self.layout.sources[layer_idx])
            num_written = min(
                (group.index + (owner <= layer_idx) for owner in owners if owner >= cycle.start), default=None
            )
        return self.group_keys.of(layer_idx, group, num_written)

    def _run_layers(
        self, segment: Segment, hidden_states: torch.Tensor, states: States
    ) -> tuple[torch.Tensor, States]:
        """Runs layers once: all owners write, to the cache if there is one."""
        states = dict(states)
        write = None if self.cache is None else CacheWriter(self.cache)
        for layer_idx in range(segment.start, segment.stop):
            visible_keys, writes = self.visible_keys[layer_idx], layer_idx in self.layout.owners
            if visible_keys is None and not writes:
                break  # nobody wants outputs, and the highest owner has written
            hidden_states = self._run_layer(
                layer_idx, hidden_states, states, visible_keys, writes, write, self.trace.attentions
            )
            self.trace.note(hidden_states)
        return hidden_states, states

    def _run_layer(
        self,
        layer_idx: int,
        hidden_states: torch.Tensor,
        states: States,
        visible_keys: VisibleKeys | None,
        writes: bool,
        cache: CacheWriter | None,
        attentions: dict[int, Any] | None = None,
    ) -> torch.Tensor:
        """Runs one layer, and notes in `states` what it writes. Every call looks alike, so that few are compiled."""
        layer: Any = self.layers[layer_idx]
        hidden_states, *written = layer(
            hidden_states,
            *self._read(layer_idx, states, writes),
            position_embeddings=self.position_embeddings[layer.key_label],
            query_embeddings=self.position_embeddings[self.query_labels[layer_idx]],
            visible_keys=visible_keys,
            writes=writes,
            cache=cache,
            attentions=attentions,
            **self.kwargs,
        )
        if written:
            states[layer_idx] = tuple(written)
        return hidden_states

    def _read(self, layer_idx: int, states: States, writes: bool) -> list[torch.Tensor | int | None]:
        """The streams that a layer reads; the number of one that it writes, `None` for what nobody has written yet."""
        return [
            source.index
            if source.owner == layer_idx and writes
            else states[source.owner][source.index]
            if source.owner in states
            else None
            for source in self.layout.sources[layer_idx]
        ]

    def _owners_read_upward(self, cycle: Segment) -> tuple[int, ...]:
        """The layers of a cycle that some layer below them reads, from the bottom."""
        readers = range(cycle.start, cycle.stop)
        above = {source.owner for reader in readers for source in self.layout.sources[reader] if source.owner > reader}
        return tuple(sorted(above))

    def _see(self, new: States) -> States:
        """What is in the cache of some owners, followed by their streams for the new tokens."""
        if self.cache is None:
            return new
        peek = CachePeeker(self.cache)
        return {owner: peek(streams, owner) for owner, streams in new.items()}

    def _zeros(self, owners: Iterable[int], hidden_states: torch.Tensor) -> States:
        """Zeros in the place of what the owners will write for the new tokens."""
        dtype = hidden_states.dtype
        if torch.is_autocast_enabled(hidden_states.device.type):
            dtype = torch.get_autocast_dtype(hidden_states.device.type)
        batch_size, q_len = hidden_states.shape[:2]
        return {
            owner: tuple(
                hidden_states.new_zeros(batch_size, stream.num_heads, q_len, stream.head_dim, dtype=dtype)
                for stream in self.layout.store(owner).streams
            )
            for owner in owners
        }


Turn = tuple[torch.Tensor, Trace]
"""What one group of tokens brings to the top layer of a cycle, and what is to be reported of it."""


def has_settled(before: States, after: States, owners: Iterable[int], tolerance: float) -> bool:
    """Whether streams have changed by less than `tolerance`, or by no more than what rounding them does."""
    rounding = torch.finfo(next(iter(after.values()))[0].dtype).eps
    return bool(relative_change(before, after, owners) < max(tolerance, rounding))


@torch.no_grad()
def relative_change(before: States, after: States, owners: Iterable[int]) -> torch.Tensor:
    """Distance between the streams of two passes over the size of the later, in the Frobenius norm: a scalar."""
    pairs = [pair for owner in owners for pair in zip(before[owner], after[owner], strict=True)]
    distance = torch.stack([(new.float() - old.float()).square().sum() for old, new in pairs]).sum()
    size = torch.stack([new.float().square().sum() for _, new in pairs]).sum()
    return (distance / size.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
