"""The pools of pages of one layer that computes keys and values (KV): how they are written, read and saved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from lckv.cache.layers import KVLayer
from lckv.cache.paged.book import PageBook, PageStep
from lckv.cache.paged.pages import PageGroup
from lckv.models.iteration import KeyValue


@dataclass(frozen=True)
class _Written:
    """The new tokens that a group of layers keeps.

    Attributes:
        width: in how many of the last new columns they are.
        slots: rows of the flattened pools that they go to, `(num_slots,)`.
        kept: which of the last `width` columns' tokens `(batch * num_kv_heads * width,)` they are; `None` for all.
    """

    width: int
    slots: torch.Tensor
    kept: torch.Tensor | None


class PagedLayer(KVLayer):
    """The pools of one layer that computes KV, `(num_pages, num_kv_heads, page_size, head_dim)`.

    Args:
        book: what the cache's layers share.
        group_idx: which of its groups the layer belongs to.
    """

    def __init__(self, book: PageBook, group_idx: int) -> None:
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
            self.new_pool(states, self.group.allocator.capacity) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def new_pool(self, like: torch.Tensor, num_pages: int) -> torch.Tensor:
        """An empty pool for states like these, `(num_pages, num_kv_heads, page_size, head_dim)`."""
        num_heads, head_dim = like.shape[1], like.shape[3]
        with torch.inference_mode(False):  # so that it can be written to in and outside of that mode
            return torch.zeros(
                num_pages, num_heads, self.group.page_size, head_dim, dtype=like.dtype, device=like.device
            )

    def resize(self, num_pages: int) -> None:
        """Lets the pools have `num_pages` pages: new ones at the end, or the first of the old ones."""
        for name, pool in self.tensors().items():
            if pool.shape[0] != num_pages:
                resized = self.new_pool(pool, num_pages)
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
        step = self.open_step(key_states)
        columns = range(self._first_read_column(), step.frame + step.num_columns)
        if len(columns) == step.num_columns and not step.is_ragged:
            return key_states, value_states
        if not any(step.lengths):
            past = key_states.new_zeros(*key_states.shape[:2], len(columns) - step.num_columns, key_states.shape[3])
            return torch.cat([past, key_states], dim=2), torch.cat([past, value_states], dim=2)
        # Room for the new tokens comes with the gather: putting them behind it would copy everything once more.
        keys, values = self.read(step, columns, step.lengths)
        return self._put_new(step, keys, key_states), self._put_new(step, values, value_states)

    def _put_new(self, step: PageStep, gathered: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
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
        step = self.open_step(key_states, writes=True)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # A window drops what a long piece's first queries still see, so its past has to be read before.
        states = None if self.window is None else self.peek(key_states, value_states)
        self._write(step, key_states, value_states)
        if states is None:
            states = self.read(step, range(self._first_read_column(), step.frame + step.num_columns), step.totals)
        self.end_step(step)
        self.seq_length = step.frame + step.num_columns
        self.book.settle()
        return states

    def end_step(self, step: PageStep) -> None:
        """Does what is to be done once the new tokens are written and read, before old pages are free again."""

    def open_step(self, states: torch.Tensor, writes: bool = False) -> PageStep:
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

    def read_slots(self, step: PageStep, columns: range, num_tokens: list[int]) -> torch.Tensor:
        """Rows of the flattened pools that hold these columns, `(batch, num_kv_heads, num_columns)`."""
        device = self.keys.device

        def find() -> torch.Tensor:
            lows = [row.tables[self.group_idx].first_kept for row in self.book.rows]
            return self._flat(*self.book.find_slots(self.group_idx, columns, lows, num_tokens, device))

        return step.share(("read", self.group_idx, columns, tuple(num_tokens), device), find)

    def _flat(self, pages: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Rows `(batch, num_kv_heads, num_columns)` of pools flattened to `(-1, head_dim)`."""
        num_heads, page_size = self.keys.shape[1:3]
        heads = torch.arange(num_heads, device=pages.device)[None, :, None]
        return (pages[:, None] * num_heads + heads) * page_size + places[:, None]

    def read(self, step: PageStep, columns: range, num_tokens: list[int]) -> KeyValue:
        """Keys and values of these columns, `(batch, num_kv_heads, num_columns, head_dim)`; zeros for empty rows.

        Args:
            step: the forward call that runs.
            columns: of its frame.
            num_tokens: how many tokens of each row count, the last of them in the last column.
        """
        return self.gather((self.keys, self.values), self.read_slots(step, columns, num_tokens), num_tokens)

    def gather(self, pools: KeyValue, slots: torch.Tensor, num_tokens: list[int]) -> KeyValue:
        """What `read` returns, from any two pools.

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

    def _write(self, step: PageStep, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Writes the new tokens that have to be kept, for all rows and heads at once."""
        written = step.share(("write", self.group_idx, self.keys.device), lambda: self._find_written(step))
        if written.width == 0:
            return
        slots = self.write_slots(step, written.slots)
        for name, states in (("keys", key_states), ("values", value_states)):
            pool, new = getattr(self, name), states.detach()[:, :, -written.width :].flatten(0, 2)
            new = new if written.kept is None else new[written.kept]
            pool.view(-1, pool.shape[3]).index_copy_(0, slots, new)

    def _find_written(self, step: PageStep) -> _Written:
        """Finds out which of the new tokens have to be kept, and where they go."""
        calls, totals, device = zip(step.lengths, step.num_new, strict=True), step.totals, self.keys.device
        firsts = [self.group.first_written(length, num_new) for length, num_new in calls]
        counts = [total - first for total, first in zip(totals, firsts, strict=True)]
        width, stop = max(counts), step.frame + step.num_columns
        columns = range(stop - width, stop)
        slots = self._flat(*self.book.find_slots(self.group_idx, columns, firsts, totals, device))
        if min(counts) == width:
            return _Written(width, slots.flatten(), None)
        is_kept = torch.arange(width, 0, -1)[None] <= torch.tensor(counts)[:, None]  # (batch, width)
        kept = is_kept[:, None].expand(slots.shape).flatten().nonzero().flatten().to(device)
        return _Written(width, slots.flatten()[kept], kept)

    def write_slots(self, step: PageStep, slots: torch.Tensor) -> torch.Tensor:
        """Where in this layer's pools lies what pools of all pages have in these slots `(num_slots,)`."""
        return slots

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
        return self.saved_pages(used) | {"block_table": torch.tensor(entries, dtype=torch.long).view(-1, 3)}, scalars

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
        self.restore_pages(tensors)

    def saved_pages(self, pages: list[int]) -> dict[str, torch.Tensor]:
        """What these pages hold."""
        return {name: pool[pages] for name, pool in self.tensors().items()}

    def restore_pages(self, saved: dict[str, torch.Tensor]) -> None:
        """Fills new pools with what `saved_pages` gave."""
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
