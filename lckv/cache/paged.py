"""A cache in pages (PagedAttention, Kwon et al., SOSP 2023): no room is kept for tokens that may never come.

Each layer that computes keys and values (KV) has two pools of pages `(num_pages, num_kv_heads, page_size, head_dim)`.
Layers that keep everything share one set of block tables; those whose readers all have a window share another, in
which pages that the window has passed are free again. See `lckv.cache.pages` for who holds which page.

What the model gets is a gather of each row's pages, aligned to the right: rows of different lengths look like a batch
with padding on the left, and all of the model's masks hold as they are. The padding itself is stored nowhere. The
count of columns of that batch, padding included, is called the frame here.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from lckv.cache.base import CACHES, KVCache, KVLayer
from lckv.cache.dynamic import check_crop
from lckv.cache.pages import BlockTable, OutOfPagesError, PagedSequence, PageGroup, capacity_for, extend_hashes
from lckv.errors import UserError
from lckv.models.iteration import KeyValue
from lckv.patterns import SharingPlan


@dataclass
class _Step:
    """One forward call: which rows take how many tokens.

    Attributes:
        frame: columns before the new ones.
        num_columns: new columns.
        lengths: tokens of each row before this call.
        num_new: new tokens of each row, in the last of the new columns.
        slots: where tokens lie in the pools, worked out once for all layers of a group.
    """

    frame: int
    num_columns: int
    lengths: list[int]
    num_new: list[int]
    slots: dict[Hashable, torch.Tensor] = field(default_factory=dict)

    @property
    def starts(self) -> list[int]:
        """The column of each row's first token."""
        stop = self.frame + self.num_columns
        return [stop - length - num_new for length, num_new in zip(self.lengths, self.num_new, strict=True)]

    @property
    def is_ragged(self) -> bool:
        """Whether tokens of the past lie in new columns, because another row takes more tokens."""
        return any(
            0 < length and num_new < self.num_columns
            for length, num_new in zip(self.lengths, self.num_new, strict=True)
        )


class _Book:
    """What all layers of a cache share: sequences, the rows among them, their pages, and the forward call that runs.

    Args:
        groups: the kinds of layers.
    """

    def __init__(self, groups: list[PageGroup]) -> None:
        self.groups = groups
        self.layers: list[list[PagedLayer]] = [[] for _ in groups]
        self.forget_all()

    def forget_all(self) -> None:
        """Starts from nothing."""
        self.rows: list[PagedSequence] = []
        self.named: dict[Hashable, PagedSequence] = {}
        self.frame = 0
        self.announced: list[int] | None = None
        self.step: _Step | None = None
        for index, group in enumerate(self.groups):
            self.groups[index] = PageGroup(group.page_size, group.allocator.num_pages, group.window)

    def all_layers(self) -> Iterator[PagedLayer]:
        """The stores of all groups."""
        for layers in self.layers:
            yield from layers

    def new_sequence(self, name: Hashable | None) -> PagedSequence:
        """A sequence without tokens."""
        return PagedSequence(name, [BlockTable() for _ in self.groups])

    def set_frame(self, frame: int) -> None:
        """Says how many columns there are, for all layers."""
        self.frame = frame
        for layer in self.all_layers():
            layer.seq_length = frame

    def first_column(self) -> int:
        """The first column in which some row has a token."""
        if self.step is not None:
            return max(0, min(self.step.starts))
        return self.frame - max((row.length for row in self.rows), default=self.frame)

    def open_step(self, num_columns: int, batch_size: int | None, attention_mask: torch.Tensor | None) -> None:
        """Prepares for new tokens: works out which are padding, and reserves pages for the others.

        Args:
            num_columns: number of new tokens of each row, padding included.
            batch_size: number of rows; `None` if not known yet, as long as there are none.
            attention_mask: `(batch, past + q_len)` with zeros at padding; `None` if nothing is padding.

        Raises:
            OutOfPagesError: if there are not enough; nothing has changed then.
        """
        self.discard_step()
        if not self.rows:
            if batch_size is None:
                return
            if self.named:
                raise ValueError("no sequence takes part in this forward call: select() those that do")
            self.rows = [self.new_sequence(None) for _ in range(batch_size)]
        if batch_size is not None:
            self.check_batch(batch_size)
        num_new = self._count_new(num_columns, attention_mask)
        self._reserve(num_new)
        self.step = _Step(self.frame, num_columns, [row.length for row in self.rows], num_new)

    def check_batch(self, batch_size: int) -> None:
        """Refuses a batch that does not fit the rows."""
        if batch_size != len(self.rows):
            raise ValueError(f"a batch of {batch_size} rows for a cache of {len(self.rows)} sequences")

    def _count_new(self, num_columns: int, attention_mask: torch.Tensor | None) -> list[int]:
        """New tokens of each row that are to be stored: all but the padding before a row's first token."""
        if self.announced is not None:
            if max(self.announced) == num_columns:
                return self.announced
            if min(self.announced) < max(self.announced) or num_columns > max(self.announced):
                raise ValueError(f"{num_columns} new tokens per row, but select() announced {self.announced}")
            return [num_columns] * len(self.rows)  # the model runs token by token
        if attention_mask is None or all(row.length for row in self.rows):
            return [num_columns] * len(self.rows)
        new = attention_mask[:, self.frame : self.frame + num_columns].bool()
        num_padding = (new.cumsum(dim=1) == 0).sum(dim=1).tolist()
        return [
            num_columns - (0 if row.length else padding) for row, padding in zip(self.rows, num_padding, strict=True)
        ]

    def _reserve(self, num_new: list[int]) -> None:
        """Gives every row the pages it needs, or none of them any."""
        self.check_room(self.rows, num_new)
        for index, group in enumerate(self.groups):
            calls = _calls(index, self.rows, num_new)
            copies = [pair for call in calls for pair in group.reserve(*call)]
            for layer in self.layers[index]:
                layer.resize(group.allocator.capacity)
                layer.copy_pages(copies)

    def check_room(self, sequences: list[PagedSequence], num_new: list[int]) -> None:
        """Finds out whether these sequences can take as many tokens together.

        Raises:
            OutOfPagesError: if not; it names the first one that goes without.
        """
        for index, group in enumerate(self.groups):
            group.record_past = any(layer.record_past for layer in self.layers[index])
            calls = _calls(index, sequences, num_new)
            num_needed = group.count_needed(calls)
            if group.allocator.has_room(num_needed):
                continue
            has_room = (group.allocator.has_room(group.count_needed(calls[: row + 1])) for row in range(len(calls)))
            row = list(has_room).index(False)
            name = f"row {row}" if sequences[row].name is None else f"sequence {sequences[row].name!r}"
            _, length, new = calls[row]
            raise OutOfPagesError(name, length, new, num_needed, group)

    def discard_step(self) -> None:
        """Forgets a forward call that did not end; what some layers have written of it does not count."""
        if self.step is None:
            return
        for row in self.rows:
            for group, table in zip(self.groups, row.tables, strict=True):
                group.cut(table, row.length)
        self.step = None
        self.set_frame(self.frame)

    def settle(self) -> None:
        """Once every layer has the new tokens, counts them, and frees the pages that windows have passed."""
        step = self.step
        assert step is not None
        if any(layer.seq_length == step.frame for layer in self.all_layers()):
            return
        self.step = self.announced = None
        self.set_frame(step.frame + step.num_columns)
        for row, num_new in zip(self.rows, step.num_new, strict=True):
            for group, table in zip(self.groups, row.tables, strict=True):
                first_written = group.first_written(row.length, num_new)
                if first_written > row.length:
                    table.first_kept = first_written
                if not group.record_past:
                    group.trim(table, row.length + num_new)
            row.length += num_new
        self._shrink_after_change()

    def _shrink_after_change(self) -> None:
        # Sequences that come and go would make pools grow and shrink all the time: for them only `remove` lets go.
        if not self.named:
            self.shrink_pools()

    def sequences(self) -> list[PagedSequence]:
        """All there are: the rows of the batch, then those that wait."""
        return list({id(sequence): sequence for sequence in [*self.rows, *self.named.values()]}.values())

    def load_sequences(self, names: list[Any], lengths: list[int], num_rows: int) -> None:
        """Takes on what another book held, without its pages; this one must be new."""
        if self.rows or self.named:
            return  # another layer has brought them
        sequences = [self.new_sequence(name) for name in names]
        for sequence, length in zip(sequences, lengths, strict=True):
            sequence.length = length
        self.rows = sequences[:num_rows]
        self.named = {sequence.name: sequence for sequence in sequences if sequence.name is not None}

    def shrink_pools(self, spare: int = 1) -> None:
        """Gives memory back where pools that grow are larger than what they hold needs.

        Args:
            spare: only from pools that are larger by more than this factor.
        """
        for index, group in enumerate(self.groups):
            allocator = group.allocator
            if allocator.num_pages is not None or allocator.capacity <= spare * capacity_for(allocator.num_used):
                continue
            moved = allocator.shrink()
            for sequence in self.sequences():
                pages = sequence.tables[index].pages
                pages.update({place: moved[page] for place, page in pages.items() if page in moved})
            for layer in self.layers[index]:
                layer.copy_pages(moved.items())
                layer.resize(allocator.capacity)

    def copy_sequence(self, sequence: PagedSequence, name: Hashable | None) -> PagedSequence:
        """A sequence that holds the same pages."""
        tables = [group.share(table) for group, table in zip(self.groups, sequence.tables, strict=True)]
        return PagedSequence(name, tables, sequence.length, list(sequence.hashes))

    def release(self, sequence: PagedSequence) -> None:
        """Frees the pages that only this sequence holds."""
        for group, table in zip(self.groups, sequence.tables, strict=True):
            group.release(table)

    def arrange_rows(self, indices: list[int]) -> None:
        """Row *i* becomes what row `indices[i]` was. Nothing is copied until somebody writes."""
        self.discard_step()
        rows, taken = [], set()
        for index in indices:
            row = self.rows[index]
            rows.append(self.copy_sequence(row, None) if index in taken else row)
            taken.add(index)
        for index, row in enumerate(self.rows):
            if index not in taken and row.name is None:
                self.release(row)
        self.rows, self.announced = rows, None
        self._shrink_after_change()

    def check_crop(self, num_removed: int) -> None:
        """Refuses to go back to where a window needs a token that has been dropped."""
        for row in self.rows:
            length = max(0, row.length - num_removed)
            for group, table in zip(self.groups, row.tables, strict=True):
                if not group.can_go_back_to(table, length):
                    raise RuntimeError(
                        f"a window of {group.window} tokens has dropped what taking back {num_removed} of "
                        f"{row.length} tokens needs; call activate_past_recording() before the tokens that may be "
                        "taken back"
                    )

    def crop(self, num_removed: int) -> None:
        """Takes the last tokens of every row back, and frees their pages."""
        for row in self.rows:
            row.length = max(0, row.length - num_removed)
            for group, table in zip(self.groups, row.tables, strict=True):
                group.cut(table, row.length)
                group.trim(table, row.length)
            del row.hashes[row.length // self.groups[0].page_size :]
        self.set_frame(self.frame - num_removed)
        self._shrink_after_change()

    def find_slots(
        self, group_idx: int, columns: range, lows: list[int], num_tokens: list[int], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the tokens of these columns lie.

        Args:
            group_idx: whose block tables.
            columns: of the current forward call's frame.
            lows: the first token of each row that counts.
            num_tokens: the tokens of each row that count end here.
            device: of the results.

        Returns:
            Pages and places within the page, `(batch, num_columns)` each. For columns without a token that counts,
            those of the nearest token of the same row, so that nothing of another sequence is ever read.
        """
        assert self.step is not None
        page_size = self.groups[group_idx].page_size
        starts = self.step.starts
        highs = [max(0, stop - 1) for stop in num_tokens]
        lows = [
            min(high, max(low, columns.start - start)) for low, high, start in zip(lows, highs, starts, strict=True)
        ]
        tables = [
            [row.tables[group_idx].pages.get(index, 0) for index in range(low // page_size, high // page_size + 1)]
            for row, low, high in zip(self.rows, lows, highs, strict=True)
        ]
        width = max(map(len, tables))
        rows = [
            [start, low, high] + table + [0] * (width - len(table))
            for start, low, high, table in zip(starts, lows, highs, tables, strict=True)
        ]
        packed = torch.tensor(rows, device=device)
        start, low, high, table = packed[:, 0:1], packed[:, 1:2], packed[:, 2:3], packed[:, 3:]
        positions = torch.arange(columns.start, columns.stop, device=device)[None] - start
        positions = positions.maximum(low).minimum(high)  # (batch, num_columns)
        pages = table.gather(1, positions // page_size - low // page_size)
        return pages, positions % page_size


def _calls(index: int, sequences: list[PagedSequence], num_new: list[int]) -> list[tuple[BlockTable, int, int]]:
    """Arguments for the pages that a group reserves: each sequence's table, tokens, and new tokens."""
    return [(row.tables[index], row.length, new) for row, new in zip(sequences, num_new, strict=True)]


class PagedLayer(KVLayer):
    """The pools of one layer that computes KV, `(num_pages, num_kv_heads, page_size, head_dim)`.

    Args:
        book: what the cache's layers share.
        group_idx: which of its groups the layer belongs to.
    """

    def __init__(self, book: _Book, group_idx: int) -> None:
        super().__init__(book.groups[group_idx].window)
        self.book, self.group_idx = book, group_idx
        book.layers[group_idx].append(self)

    @property
    def group(self) -> PageGroup:
        """The block tables' rules for layers like this one."""
        return self.book.groups[self.group_idx]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the pools."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            self._new_pool(states, self.group.allocator.capacity) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def _new_pool(self, like: torch.Tensor, num_pages: int) -> torch.Tensor:
        num_heads, head_dim = like.shape[1], like.shape[3]
        with torch.inference_mode(False):  # so that it can be written to in and outside of that mode
            return torch.zeros(
                num_pages, num_heads, self.group.page_size, head_dim, dtype=like.dtype, device=like.device
            )

    def resize(self, num_pages: int) -> None:
        """Lets the pools have `num_pages` pages: new ones at the end, or the first of the old ones."""
        for name, pool in self.tensors().items():
            if pool.shape[0] != num_pages:
                resized = self._new_pool(pool, num_pages)
                num_kept = min(num_pages, pool.shape[0])
                resized[:num_kept] = pool[:num_kept]
                setattr(self, name, resized)

    def copy_pages(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies pages within the pools; pairs of from where and where to."""
        pairs = list(copies)
        for pool in self.tensors().values() if pairs else ():
            source, target = torch.tensor(pairs, device=pool.device).T
            pool.index_copy_(0, target, pool.index_select(0, source))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `update` will return for `query_length` new tokens, and which column the first belongs to."""
        offset = self._first_read_column()
        return self.seq_length - offset + query_length, offset

    def _first_read_column(self) -> int:
        first = min(self.book.first_column(), self.seq_length)
        return first if self.window is None else max(first, self.seq_length - self.window + 1)

    def peek(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KeyValue:
        """The cached keys and values `(batch, num_kv_heads, kv_len, head_dim)` with the new ones behind them."""
        step = self._open_step(key_states)
        columns = range(self._first_read_column(), step.frame + step.num_columns)
        if len(columns) == step.num_columns and not step.is_ragged:
            return key_states, value_states
        if not any(step.lengths):
            past = key_states.new_zeros(*key_states.shape[:2], len(columns) - step.num_columns, key_states.shape[3])
            return torch.cat([past, key_states], dim=2), torch.cat([past, value_states], dim=2)
        # Room for the new tokens comes with the gather: putting them behind it would copy everything once more.
        slots = self._read_slots(columns, step.lengths)
        keys, values = self._read(slots, step.lengths)
        return self._put_new(step, keys, key_states), self._put_new(step, values, value_states)

    def _put_new(self, step: _Step, gathered: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Puts each row's new tokens into its last columns."""
        last = gathered[:, :, gathered.shape[2] - step.num_columns :]
        if step.is_ragged:
            num_new = torch.tensor(step.num_new, device=states.device)[:, None]
            is_new = torch.arange(step.num_columns, 0, -1, device=states.device) <= num_new  # (batch, q_len)
            states = torch.where(is_new[:, None, :, None], states, last)
        last.copy_(states)
        return gathered

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValue:
        """Writes the new tokens to their pages, and returns what their queries see."""
        step = self._open_step(key_states, writes=True)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # A window drops what a long piece's first queries still see, so its past has to be read before.
        states = None if self.window is None else self.peek(key_states, value_states)
        self._write(step, key_states, value_states)
        if states is None:
            columns = range(self._first_read_column(), step.frame + step.num_columns)
            totals = [length + num_new for length, num_new in zip(step.lengths, step.num_new, strict=True)]
            slots = self._read_slots(columns, totals)
            states = self._read(slots, totals)
        self.seq_length = step.frame + step.num_columns
        self.book.settle()
        return states

    def _open_step(self, states: torch.Tensor, writes: bool = False) -> _Step:
        """The current forward call, or a new one where the cache was not told of any."""
        book = self.book
        num_columns = states.shape[2]
        if book.step is not None and writes and self.seq_length > book.step.frame:
            raise RuntimeError(
                "a layer got new tokens again before all layers that compute keys and values got theirs"
            )
        if book.step is None or book.step.num_columns != num_columns:
            book.open_step(num_columns, states.shape[0], None)
        assert book.step is not None
        book.check_batch(states.shape[0])
        return book.step

    def _read_slots(self, columns: range, num_tokens: list[int]) -> torch.Tensor:
        """Rows of the flattened pools that hold these columns, `(batch * num_kv_heads * num_columns,)`."""
        step = self.book.step
        assert step is not None
        name = (self.group_idx, columns, tuple(num_tokens), self.keys.device)
        if name not in step.slots:
            lows = [row.tables[self.group_idx].first_kept for row in self.book.rows]
            pages, places = self.book.find_slots(self.group_idx, columns, lows, num_tokens, self.keys.device)
            step.slots[name] = self._flat(pages, places)
        return step.slots[name]

    def _flat(self, pages: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Rows `(batch, num_kv_heads, num_columns)` of pools flattened to `(-1, head_dim)`."""
        num_heads, page_size = self.keys.shape[1:3]
        heads = torch.arange(num_heads, device=pages.device)[None, :, None]
        return (pages[:, None] * num_heads + heads) * page_size + places[:, None]

    def _read(self, slots: torch.Tensor, num_tokens: list[int]) -> KeyValue:
        """Keys and values in these places, `(batch, num_kv_heads, num_columns, head_dim)`; zeros for empty rows."""
        return self._gather((self.keys, self.values), slots, num_tokens)

    def _gather(self, pools: KeyValue, slots: torch.Tensor, num_tokens: list[int]) -> KeyValue:
        """What `_read` returns, from any two pools.

        Both go to one piece of memory: two large pieces that come and go together are handed back to the system each
        time, and to get them anew takes far longer than the gather.
        """
        shape, rows = (*slots.shape, pools[0].shape[3]), slots.flatten()
        if pools[0].dtype == pools[1].dtype:
            keys, values = pools[0].new_empty(2, *shape)
        else:  # autocast rounds values, but not keys once they are rotated
            keys, values = (pool.new_empty(shape) for pool in pools)
        empty = [row for row, count in enumerate(num_tokens) if count == 0]
        for pool, states in zip(pools, (keys, values), strict=True):
            torch.index_select(pool.view(-1, shape[3]), 0, rows, out=states.view(-1, shape[3]))
            if empty:
                states[empty] = 0.0
        return keys, values

    def _write(self, step: _Step, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Writes the new tokens that have to be kept, for all rows and heads at once."""
        firsts = [
            self.group.first_written(length, num_new)
            for length, num_new in zip(step.lengths, step.num_new, strict=True)
        ]
        totals = [length + num_new for length, num_new in zip(step.lengths, step.num_new, strict=True)]
        counts = [total - first for total, first in zip(totals, firsts, strict=True)]
        width = max(counts)
        if width == 0:
            return
        slots = self._write_slots(step, width, firsts, totals)
        states = [states.detach()[:, :, -width:] for states in (key_states, value_states)]
        if min(counts) < width:
            is_kept = torch.arange(width, 0, -1)[None] <= torch.tensor(counts)[:, None]  # (batch, width)
            kept = is_kept[:, None].expand(slots.shape).flatten().nonzero().flatten().to(slots.device)
            slots = slots.flatten()[kept]
            states = [new.flatten(0, 2)[kept] for new in states]
        for pool, new in zip((self.keys, self.values), states, strict=True):
            pool.view(-1, pool.shape[3]).index_copy_(0, slots.flatten(), new.reshape(-1, pool.shape[3]))

    def _write_slots(self, step: _Step, width: int, firsts: list[int], totals: list[int]) -> torch.Tensor:
        """Places `(batch, num_kv_heads, width)` for the last `width` new columns."""
        name = ("write", self.group_idx, self.keys.device)
        if name not in step.slots:
            stop = step.frame + step.num_columns
            pages, places = self.book.find_slots(
                self.group_idx, range(stop - width, stop), firsts, totals, self.keys.device
            )
            step.slots[name] = self._flat(pages, places)
        return step.slots[name]

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What has to be saved: the pages that somebody holds, and for each sequence, which are its own."""
        sequences = self.book.sequences()
        tables = [sequence.tables[self.group_idx] for sequence in sequences]
        used = sorted({page for table in tables for page in table.pages.values()})
        place = {page: index for index, page in enumerate(used)}
        entries = [
            (row, index, place[page]) for row, table in enumerate(tables) for index, page in table.pages.items()
        ]
        scalars = {
            "seq_length": self.seq_length,
            "record_past": self.record_past,
            "num_rows": len(self.book.rows),
            "names": [sequence.name for sequence in sequences],
            "lengths": [sequence.length for sequence in sequences],
            "first_kept": [table.first_kept for table in tables],
        }
        if not self.is_initialized:
            return {}, scalars
        return self._saved(used) | {"block_table": torch.tensor(entries, dtype=torch.long).view(-1, 3)}, scalars

    def load_state(self, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        """Takes on a saved state; the cache must be new."""
        book = self.book
        book.load_sequences(scalars["names"], scalars["lengths"], scalars["num_rows"])
        book.frame = self.seq_length = scalars["seq_length"]
        self.record_past = scalars["record_past"]
        if not tensors:
            return
        if not self.group.allocator.num_used:
            tables = [sequence.tables[self.group_idx] for sequence in book.sequences()]
            for row, index, page in tensors["block_table"].tolist():
                tables[row].pages[index] = page
            for table, first_kept in zip(tables, scalars["first_kept"], strict=True):
                table.first_kept = first_kept
            pages = {page for table in tables for page in table.pages.values()}
            self.group.load(tables, max(pages, default=-1) + 1)
        self._restore(tensors)

    def _saved(self, pages: list[int]) -> dict[str, torch.Tensor]:
        """What these pages hold."""
        return {name: pool[pages] for name, pool in self.tensors().items()}

    def _restore(self, saved: dict[str, torch.Tensor]) -> None:
        """Fills new pools with what `_saved` gave."""
        self.lazy_initialization(saved["keys"], saved["values"])
        for name, pool in self.tensors().items():
            pool[: saved[name].shape[0]] = saved[name]

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses: the cache does it for all layers."""
        raise RuntimeError("the layers of a paged cache share their block tables: crop the cache")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refuses: the cache does it for all layers."""
        raise RuntimeError("the layers of a paged cache share their block tables: select rows of the cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuses: the cache does it for all layers."""
        raise RuntimeError("the layers of a paged cache share their block tables: repeat rows of the cache")


@CACHES.register("paged")
class PagedKVCache(KVCache):
    """Takes pages of `page_size` tokens from pools as sequences grow, and gives them back as they end.

    Used like any cache, it has one sequence per row of the batch. With `add`, `select` and `remove`, sequences of any
    lengths come and go, and those that take part in a forward call are chosen anew for each. Keys and values carry no
    gradient: the cache is for inference.

    Args:
        config: the configuration of the model.
        page_size: tokens per page.
        num_pages: pages in each layer's pool, all made with the first token; `None` for pools that double when full.

    Raises:
        UserError: if a page would be empty, or there would be none.
    """

    name = "paged"

    def __init__(self, config: Any, page_size: int = 16, num_pages: int | None = None) -> None:
        for option, value in (("page_size", page_size), ("num_pages", num_pages)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"cache.{option}={value!r}: allowed is a whole number, 1 or more")
        self.page_size, self.num_pages = page_size, num_pages
        self._book = _Book([])
        super().__init__(config)

    def make_layer(self, layer_idx: int, window: int | None) -> KVLayer:
        """Makes the store of one owner, in the group of those with an equal window."""
        windows = [group.window for group in self._book.groups]
        if window not in windows:
            self._book.groups.append(PageGroup(self.page_size, self.num_pages, window))
            self._book.layers.append([])
            windows.append(window)
        return PagedLayer(self._book, windows.index(window))

    def options(self) -> dict[str, Any]:
        """The arguments, beside `config`, that make an empty cache like this one."""
        return {"page_size": self.page_size, "num_pages": self.num_pages}

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 while the cache is empty."""
        return len(self._book.rows) or -1

    def planned_bytes(self, seq_length: int, batch_size: int, dtype: torch.dtype) -> int:
        """Bytes that `num_bytes` will report once the cache has seen this much, by arithmetic.

        Args:
            seq_length: tokens of each sequence, none of them padding.
            batch_size: number of sequences.
            dtype: type of the keys and values that the model computes.
        """
        if seq_length == 0:
            return 0
        page_bytes = 2 * self.config.num_key_value_heads * self.page_size * self.config.head_dim * dtype.itemsize
        return sum(
            len(layers) * page_bytes * (self.num_pages or capacity_for(batch_size * group.count_pages(seq_length)))
            for group, layers in zip(self._book.groups, self._book.layers, strict=True)
        )

    def max_sequences(self, seq_length: int) -> int | None:
        """How many sequences pools of fixed size hold while these grow token by token; `None` for pools that grow.

        Args:
            seq_length: tokens of each sequence at its end.
        """
        if self.num_pages is None:
            return None
        num_pages = (
            # a page is taken for a new token before the one that leaves the window is given back
            max(
                group.count_pages(length - 1) + (length % self.page_size == 1 % self.page_size)
                for length in range(1, seq_length + 1)
            )
            for group in self._book.groups
        )
        return min(self.num_pages // most for most in num_pages)

    def num_used_bytes(self) -> int:
        """Bytes of the pages that some sequence holds, each counted once; `num_bytes` is those of the whole pools."""
        return sum(
            layer.num_bytes() // max(1, group.allocator.capacity) * group.allocator.num_used
            for group, layers in zip(self._book.groups, self._book.layers, strict=True)
            for layer in layers
            if layer.is_initialized
        )

    def num_used_pages(self) -> int:
        """Pages that some sequence holds, of all pools."""
        return sum(
            group.allocator.num_used * len(layers)
            for group, layers in zip(self._book.groups, self._book.layers, strict=True)
        )

    def begin_forward(self, plan: SharingPlan, attention_mask: torch.Tensor | None, num_new_tokens: int) -> None:
        """Reserves pages for the coming tokens, but for padding on the left.

        Raises:
            OutOfPagesError: if pools of fixed size have too few; nothing has changed then.
            ValueError: for rows of different lengths without an attention mask that tells them apart.
        """
        super().begin_forward(plan, attention_mask, num_new_tokens)
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        self._book.open_step(num_new_tokens, None if mask is None else mask.shape[0], mask)
        if attention_mask is None and self._book.step is not None and len(set(self._book.step.starts)) > 1:
            self._book.discard_step()
            raise ValueError(
                "the cached sequences have different lengths: give the attention_mask that select() returns"
            )

    def add(self, name: Hashable, token_ids: Sequence[int] | None = None) -> int:
        """Adds a sequence, without tokens, or with the pages of an equal beginning that the cache still has.

        Args:
            name: what to call it: text or a number, which a saved cache can hold.
            token_ids: of the tokens that the sequence will begin with. At least the last is left to compute.

        Returns:
            How many of the tokens need not be computed.

        Raises:
            UserError: for a name of another type.
            ValueError: if there is a sequence of that name.
        """
        book = self._book
        self._check_name(name)
        self._check_no_batch()
        hashes = [] if token_ids is None else extend_hashes([], token_ids[:-1], self.page_size)
        sequence = book.new_sequence(name)
        known = zip(*(group.find_beginnings(hashes) for group in book.groups), strict=True)
        num_pages = max((num for num, is_known in enumerate(known, 1) if all(is_known)), default=0)
        if num_pages:
            sequence.hashes, sequence.length = hashes[:num_pages], num_pages * self.page_size
            sequence.tables = [group.adopt(sequence.hashes) for group in book.groups]
        book.named[name] = sequence
        return sequence.length

    def _check_name(self, name: object) -> None:
        """Refuses names that are taken, and those that a file would not give back as they are."""
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise UserError(f"a sequence called {name!r}: allowed are text and whole numbers")
        if name in self._book.named:
            raise ValueError(f"a second sequence called {name!r}")

    def _check_no_batch(self) -> None:
        if any(row.name is None for row in self._book.rows):
            raise ValueError("this cache holds the rows of a batch, not named sequences: reset() it first")

    def record_tokens(self, name: Hashable, token_ids: Sequence[int]) -> None:
        """Lets sequences to come find the full pages of this one.

        Args:
            name: of the sequence.
            token_ids: its tokens from the start; those that are not cached yet do not count.
        """
        sequence = self._sequence(name)
        if len(sequence.hashes) == sequence.length // self.page_size:
            return
        sequence.hashes = extend_hashes(sequence.hashes, token_ids[: sequence.length], self.page_size)
        for group, table in zip(self._book.groups, sequence.tables, strict=True):
            group.register(table, sequence.hashes)

    def fork_sequence(self, name: Hashable, new_name: Hashable) -> None:
        """Adds a sequence with the tokens of another. They share pages until one of them writes to a page."""
        self._check_name(new_name)
        self._book.discard_step()
        self._book.named[new_name] = self._book.copy_sequence(self._sequence(name), new_name)

    def remove(self, name: Hashable) -> None:
        """Removes a sequence; pages that no other holds are free at once."""
        book = self._book
        sequence = self._sequence(name)
        book.discard_step()
        del book.named[name]
        book.rows = [row for row in book.rows if row is not sequence]
        book.announced = None
        book.release(sequence)
        book.shrink_pools(spare=4)

    def length(self, name: Hashable) -> int:
        """Tokens of a sequence."""
        return self._sequence(name).length

    def __contains__(self, name: object) -> bool:
        """Whether there is a sequence of that name."""
        return name in self._book.named

    def _sequence(self, name: Hashable) -> PagedSequence:
        if name not in self._book.named:
            raise KeyError(f"no sequence called {name!r}")
        return self._book.named[name]

    def select(
        self, names: Sequence[Hashable], num_new: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses the sequences that take part in the next forward call, row by row.

        A row that takes fewer tokens than another has padding before them.

        Args:
            names: of the sequences, each at most once.
            num_new: how many tokens each takes; one each by default.

        Returns:
            `attention_mask` `(batch, past + q_len)` and `position_ids` `(batch, q_len)` for the forward call.
        """
        book = self._book
        self._check_no_batch()
        book.discard_step()
        rows = [self._sequence(name) for name in names]
        if not rows or len(set(names)) < len(rows):
            raise ValueError(f"select({list(names)!r}): allowed are one or more sequences, each once")
        num_new = [1] * len(rows) if num_new is None else list(num_new)
        totals = torch.tensor([row.length + new for row, new in zip(rows, num_new, strict=True)])[:, None]
        num_columns, width = max(num_new), int(totals.max())
        book.rows, book.announced = rows, num_new
        book.set_frame(width - num_columns)
        columns = torch.arange(width)[None]
        attention_mask = (columns >= width - totals).long()
        position_ids = (columns[:, width - num_columns :] - (width - totals)).clamp(min=0)
        return attention_mask, position_ids

    def check_room(self, num_new: Mapping[Any, int]) -> None:
        """Finds out whether sequences can take tokens together in one forward call.

        Args:
            num_new: how many new tokens, by the name of the sequence.

        Raises:
            OutOfPagesError: if not; it names the first one that goes without.
        """
        self._book.check_room([self._sequence(name) for name in num_new], list(num_new.values()))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens of every row, and frees their pages.

        Raises:
            ValueError: unless there are as many.
            RuntimeError: if tokens that are needed again have been dropped; nothing has changed then.
        """
        self._book.discard_step()
        num_removed = check_crop(tokens_to_remove, self._book.frame)
        self._book.check_crop(num_removed)
        self._book.crop(num_removed)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row *i* becomes row `beam_idx[i]`: rows that come from one share its pages until they write."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch, in this order, and frees the pages of the others."""
        rows = torch.arange(len(self._book.rows))
        chosen = rows[indices.cpu() if isinstance(indices, torch.Tensor) else indices]
        self._book.arrange_rows(chosen.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch `repeats` times; the copies share pages until they write."""
        self._book.arrange_rows([row for row in range(len(self._book.rows)) for _ in range(repeats)])

    def reset(self) -> None:
        """Forgets everything, and gives up the pools."""
        super().reset()
        self._book.forget_all()

    def fork(self) -> Self:
        """A cache with the same content; what is done to one from now on does not disturb the other."""
        with torch.inference_mode(False):  # so that the copies can be written to in and outside of that mode
            return copy.deepcopy(self, {id(self.config): self.config, id(self.plan): self.plan})
