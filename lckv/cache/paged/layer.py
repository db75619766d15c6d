"""The pools of pages of one owner: how they are written, read and saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from lckv.cache.layers import KVLayer, join
from lckv.cache.paged.book import PageBook, PageStep
from lckv.cache.paged.pages import PageGroup, capacity_for
from lckv.layout import Store
from lckv.models.sharing_cache import Streams

T = TypeVar("T")


@dataclass(frozen=True)
class _Written:
    """The new tokens that a group of layers keeps.

    Attributes:
        width: in how many of the last new columns they are.
        slots: for each stream, rows of the flattened pool that they go to, `(num_slots,)`.
        kept: for each stream, which of the last `width` columns' tokens `(batch * num_heads * width,)` they are;
            `None` for all.
    """

    width: int
    slots: list[torch.Tensor]
    kept: list[torch.Tensor | None]


class PagedLayer(KVLayer):
    """The pools of one owner, for each stream `(num_pages, num_heads, page_size, head_dim)`.

    Pools are written and read as if flattened to rows `(num_pages * num_heads * page_size, head_dim)`: one index finds
    all tokens and heads of a batch. Where these rows are is worked out once for all layers of a group whose streams
    have as many heads, however wide these are.

    Args:
        store: what the owner keeps.
        book: what the cache's layers share.
        group_idx: which of its groups the layer belongs to.

    Attributes:
        head_counts: each stream's number of heads.
    """

    head_counts: tuple[int, ...]

    def __init__(self, store: Store, book: PageBook, group_idx: int) -> None:
        super().__init__(store)
        self.book, self.group_idx = book, group_idx
        book.layers[group_idx].append(self)

    @property
    def group(self) -> PageGroup:
        """The block tables' rules for layers like this one."""
        return self.book.groups[self.group_idx]

    def lazy_initialization(self, *streams: torch.Tensor) -> None:
        """Makes the pools for streams `(batch, num_heads, q_len, head_dim)`."""
        self.dtype, self.device = streams[0].dtype, streams[0].device
        self.head_counts = tuple(states.shape[1] for states in streams)
        self.streams = tuple(self.new_pool(states, self.num_pool_pages()) for states in streams)

    def num_pool_pages(self) -> int:
        """Pages that the pools are to have."""
        return self.group.allocator.capacity

    def new_pool(self, like: torch.Tensor, num_pages: int) -> torch.Tensor:
        """An empty pool for states like these, `(num_pages, num_heads, page_size, head_dim)`."""
        with torch.inference_mode(False):  # so that it can be written to in and outside of that mode
            shape = (num_pages, like.shape[1], self.group.page_size, like.shape[3])
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def resize(self, num_pages: int) -> None:
        """Lets the pools have `num_pages` pages: new ones at the end, or the first of the old ones."""
        self.change_tensors(lambda pool: resized(pool, num_pages))

    def copy_pages(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies pages within the pools; pairs of from where and where to."""
        pairs = list(copies)
        if pairs:
            copy_within(self.streams, pairs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns `write` will return for `query_length` new tokens, and which column is the first."""
        offset = self._first_read_column()
        return self.seq_length - offset + query_length, offset

    def _first_read_column(self) -> int:
        first = min(self.book.first_column(), self.seq_length)
        return first if self.window is None else max(first, self.seq_length - self.window + 1)

    def peek(self, streams: Streams) -> Streams:
        """The cached tokens, for each stream `(batch, num_heads, kv_len, head_dim)`, with the new ones behind them."""
        step = self.open_step(streams[0])
        columns = range(self._first_read_column(), step.frame + step.num_columns)
        if len(columns) == step.num_columns and not step.is_ragged:
            return streams
        if not any(step.lengths):
            num_past = len(columns) - step.num_columns
            return join(tuple(new.new_zeros(*new.shape[:2], num_past, new.shape[3]) for new in streams), streams)
        # Room for the new tokens comes with the gather: putting them behind it would copy everything once more.
        return self._put_new(step, self.read(step, columns, step.lengths), streams)

    def _put_new(self, step: PageStep, gathered: Streams, streams: Streams) -> Streams:
        """Puts each row's new tokens into its last columns.

        In a ragged call a row may take fewer tokens than there are new columns: there its own past reaches into these.
        """
        is_new = None
        if step.is_ragged:
            num_new = torch.tensor(step.num_new, device=streams[0].device)[:, None]
            is_new = torch.arange(step.num_columns, 0, -1, device=streams[0].device) <= num_new  # (batch, q_len)
            is_new = is_new[:, None, :, None]
        for states, new in zip(gathered, streams, strict=True):
            last = states[:, :, states.shape[2] - step.num_columns :]
            last.copy_(new if is_new is None else torch.where(is_new, new, last))
        return gathered

    def write(self, streams: Streams) -> Streams:
        """Writes the new tokens to their pages, and returns what their queries see."""
        step = self.open_step(streams[0], writes=True)
        if not self.is_initialized:
            self.lazy_initialization(*streams)
        # A window drops what a long piece's first queries still see, so its past has to be read before.
        seen = None if self.window is None else self.peek(streams)
        self._write(step, streams)
        if seen is None:
            seen = self.read(step, range(self._first_read_column(), step.frame + step.num_columns), step.totals)
        self.end_step(step)
        self.seq_length = step.frame + step.num_columns
        self.book.settle()
        return seen

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

    def read_slots(self, step: PageStep, columns: range, num_tokens: list[int]) -> list[torch.Tensor]:
        """For each stream, rows of the flattened pool that hold these columns, `(batch, num_heads, num_columns)`."""
        device = self.streams[0].device

        def find() -> list[torch.Tensor]:
            lows = [row.tables[self.group_idx].first_kept for row in self.book.rows]
            return self._flat(*self.book.find_slots(self.group_idx, columns, lows, num_tokens, device))

        key = ("read", self.group_idx, self.head_counts, columns, tuple(num_tokens), device)
        return step.share(key, find)

    def _flat(self, pages: torch.Tensor, places: torch.Tensor) -> list[torch.Tensor]:
        """For each stream, rows `(batch, num_heads, num_columns)` of its pool flattened to `(-1, head_dim)`."""

        def rows(num_heads: int) -> torch.Tensor:
            heads = torch.arange(num_heads, device=pages.device)[None, :, None]
            return (pages[:, None] * num_heads + heads) * self.group.page_size + places[:, None]

        return self.for_each(rows)

    def for_each(self, make: Callable[[int], T]) -> list[T]:
        """For each stream what `make` gives for its number of heads; those of equal numbers share it."""
        made = {count: make(count) for count in dict.fromkeys(self.head_counts)}
        return [made[count] for count in self.head_counts]

    def read(self, step: PageStep, columns: range, num_tokens: list[int]) -> Streams:
        """For each stream, these columns `(batch, num_heads, num_columns, head_dim)`; zeros for empty rows.

        Args:
            step: the forward call that runs.
            columns: of its frame.
            num_tokens: how many tokens of each row count, the last of them in the last column.
        """
        return self.gather(self.streams, self.read_slots(step, columns, num_tokens), num_tokens)

    def gather(self, pools: Streams, slots: list[torch.Tensor], num_tokens: list[int]) -> Streams:
        """What `read` returns, from any pools.

        Streams of one shape go to one piece of memory: two large pieces that come and go together are handed back to
        the system each time, and to get them anew takes far longer than the gather.
        """
        shapes = [(*rows.shape, pool.shape[3]) for pool, rows in zip(pools, slots, strict=True)]
        gathered: Streams
        if all(shape == shapes[0] and pool.dtype == pools[0].dtype for shape, pool in zip(shapes, pools, strict=True)):
            gathered = pools[0].new_empty(len(pools), *shapes[0]).unbind()
        else:  # of other widths, or under autocast, which rounds values but not keys once they are rotated
            gathered = tuple(pool.new_empty(shape) for pool, shape in zip(pools, shapes, strict=True))
        empty = [row for row, count in enumerate(num_tokens) if count == 0]
        for pool, rows, states in zip(pools, slots, gathered, strict=True):
            width = pool.shape[3]
            torch.index_select(pool.view(-1, width), 0, rows.flatten(), out=states.view(-1, width))
            if empty:
                states[empty] = 0.0
        return gathered

    def _write(self, step: PageStep, streams: Streams) -> None:
        """Writes the new tokens that have to be kept, for all rows and heads at once."""
        key = ("write", self.group_idx, self.head_counts, self.streams[0].device)
        written = step.share(key, lambda: self._find_written(step))
        if written.width == 0:
            return
        slots = self.write_slots(step, written.slots)
        for pool, states, rows, kept in zip(self.streams, streams, slots, written.kept, strict=True):
            new = states.detach()[:, :, -written.width :].flatten(0, 2)
            pool.view(-1, pool.shape[3]).index_copy_(0, rows, new if kept is None else new[kept])

    def _find_written(self, step: PageStep) -> _Written:
        """Finds out which of the new tokens have to be kept, and where they go."""
        calls, totals, device = zip(step.lengths, step.num_new, strict=True), step.totals, self.streams[0].device
        firsts = [self.group.first_written(length, num_new) for length, num_new in calls]
        counts = [total - first for total, first in zip(totals, firsts, strict=True)]
        width, stop = max(counts), step.frame + step.num_columns
        columns = range(stop - width, stop)
        slots = self._flat(*self.book.find_slots(self.group_idx, columns, firsts, totals, device))
        if min(counts) == width:
            return _Written(width, [rows.flatten() for rows in slots], [None for _ in slots])
        is_kept = torch.arange(width, 0, -1)[None] <= torch.tensor(counts)[:, None]  # (batch, width)
        kept = [is_kept[:, None].expand(rows.shape).flatten().nonzero().flatten().to(device) for rows in slots]
        return _Written(width, [rows.flatten()[each] for rows, each in zip(slots, kept, strict=True)], [*kept])

    def write_slots(self, step: PageStep, slots: list[torch.Tensor]) -> list[torch.Tensor]:
        """Where in this layer's pools lies what pools of all pages have in these slots, `(num_slots,)` per stream."""
        return slots

    def planned_bytes(self, seq_length: int, batch_size: int, itemsize: int) -> int:
        """What `num_bytes` will be: those of whole pools, which may be larger than what is used."""
        num_pages = self.book.num_pages or capacity_for(batch_size * self.group.count_pages(seq_length))
        return num_pages * self.group.page_size * self.store.size * itemsize

    def num_used_bytes(self) -> int:
        """Bytes of the pages that some sequence holds."""
        allocator = self.group.allocator
        return self.num_bytes() // max(1, allocator.capacity) * allocator.num_used

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
        self.lazy_initialization(*(saved[name] for name in self.names))
        for name, pool in self.tensors().items():
            pool[: saved[name].shape[0]] = saved[name]

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses: the cache does it for all layers."""
        raise RuntimeError("the layers of a paged cache share their block tables: crop the cache")

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Refuses: the cache does it for all layers."""
        raise RuntimeError("the layers of a paged cache share their block tables: change the rows of the cache")


def resized(pool: torch.Tensor, num_pages: int) -> torch.Tensor:
    """A pool with `num_pages` pages, zeros behind the old ones; it can be written to in inference mode and outside."""
    if len(pool) == num_pages and not pool.is_inference():
        return pool
    with torch.inference_mode(False):
        result = torch.zeros(num_pages, *pool.shape[1:], dtype=pool.dtype, device=pool.device)
        result[:num_pages][: len(pool)] = pool[:num_pages]
    return result


def copy_within(pools: Iterable[torch.Tensor], pairs: list[tuple[int, int]]) -> None:
    """Copies pages within pools `(num_pages, ...)`; pairs of from where and where to."""
    for pool in pools:
        source, target = torch.tensor(pairs, device=pool.device).T
        pool.index_copy_(0, target, pool.index_select(0, source))
