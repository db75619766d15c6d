"""The pools of pages of one owner: how they are written, read and saved."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from lckv.cache.layers import KVLayer, join
from lckv.cache.paged.pages import BlockTable, capacity_for
from lckv.models.parts.sharing_cache import Streams
from lckv.sharing.layout import Store

if TYPE_CHECKING:
    from lckv.cache.paged.cache import PagedKVCache

T = TypeVar("T")
Rows = dict[int, torch.Tensor]
"""By a stream's number of heads, rows of a pool that is flattened to `(-1, head_dim)`."""


@dataclass
class PageStep:
    """One forward call: which rows take how many tokens.

    Attributes:
        frame: columns before the new ones.
        num_columns: new columns.
        lengths: tokens of each row before this call.
        num_new: new tokens of each row, in the last of the new columns.
        num_written: how many layers have the new tokens.
        shared: what has been worked out for several layers.
    """

    frame: int
    num_columns: int
    lengths: list[int]
    num_new: list[int]
    num_written: int = 0
    shared: dict[Hashable, Any] = field(default_factory=dict)

    @cached_property
    def stop(self) -> int:
        """The column behind the last."""
        return self.frame + self.num_columns

    @cached_property
    def totals(self) -> list[int]:
        """Tokens of each row after this call."""
        return [length + num_new for length, num_new in zip(self.lengths, self.num_new, strict=True)]

    @cached_property
    def starts(self) -> list[int]:
        """The column of each row's first token."""
        return [self.stop - total for total in self.totals]

    @cached_property
    def is_ragged(self) -> bool:
        """Whether tokens of the past lie in new columns, because another row takes more tokens."""
        return any(
            0 < length and num_new < self.num_columns
            for length, num_new in zip(self.lengths, self.num_new, strict=True)
        )

    def share(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` has returned to the first layer that asked with this key."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


class _Written(NamedTuple):
    """The new tokens that a group of layers keeps.

    Attributes:
        width: in how many of the last new columns they are.
        rows: where they go, `(num_rows,)`.
        kept: by number of heads, which of the last `width` columns' tokens `(batch * num_heads * width,)` they are;
            `None` for all.
    """

    width: int
    rows: Rows
    kept: dict[int, torch.Tensor] | None


class PagedLayer(KVLayer):
    """The pools of one owner, for each stream `(num_pages, num_heads, page_size, head_dim)`.

    Pools are written and read as if flattened to rows `(num_pages * num_heads * page_size, head_dim)`: one index finds
    all tokens and heads of a batch. Where these rows are is worked out once for all layers of a group whose streams
    have as many heads, however wide these are.

    Args:
        store: what the owner keeps.
        cache: has the sequences, and the forward call that runs.

    Attributes:
        group: the layers that keep the same tokens as this one.
        head_counts: the numbers of heads that its streams have.
    """

    def __init__(self, store: Store, cache: PagedKVCache) -> None:
        super().__init__(store)
        self.cache, self.group = cache, cache.group_for(store.window)
        self.head_counts = tuple(dict.fromkeys(stream.num_heads for stream in store.streams))
        self.group.layers.append(self)

    def lazy_initialization(self, *streams: torch.Tensor) -> None:
        """Makes the pools for streams `(batch, num_heads, q_len, head_dim)`."""
        self.dtype, self.device = streams[0].dtype, streams[0].device
        self.streams = self.new_pools(streams, self.group.allocator.capacity)

    def new_pools(self, streams: Streams, num_pages: int) -> Streams:
        """Empty pools for streams like these, each `(num_pages, num_heads, page_size, head_dim)`."""
        shapes = ((num_pages, states.shape[1], self.group.page_size, states.shape[3]) for states in streams)
        with torch.inference_mode(False):  # so that they can be written to in and outside of that mode
            return tuple(
                torch.zeros(shape, dtype=states.dtype, device=states.device)
                for shape, states in zip(shapes, streams, strict=True)
            )

    def resize(self, num_pages: int) -> None:
        """Lets the pools have `num_pages` pages: new ones at the end, or the first of the old ones."""
        self.change_tensors(lambda pool: resized(pool, num_pages))

    def copy_pages(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies pages within the pools; pairs of from where and where to."""
        copy_within(self.streams, list(copies))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns `write` will return for `query_length` new tokens, and which column is the first."""
        offset = self._first_read_column()
        return self.seq_length - offset + query_length, offset

    def _first_read_column(self) -> int:
        first = min(self.cache.first_column(), self.seq_length)
        return first if self.window is None else max(first, self.seq_length - self.window + 1)

    def peek(self, streams: Streams) -> Streams:
        """The cached tokens, for each stream `(batch, num_heads, kv_len, head_dim)`, with the new ones behind them."""
        return self._seen(self.open_step(streams[0]), streams)

    def _seen(self, step: PageStep, streams: Streams) -> Streams:
        columns = range(self._first_read_column(), step.stop)
        if len(columns) == step.num_columns and not step.is_ragged:
            return streams
        if not any(step.lengths):
            num_past = len(columns) - step.num_columns
            return join(tuple(new.new_zeros(*new.shape[:2], num_past, new.shape[3]) for new in streams), streams)
        # Room for the new tokens comes with the gather: putting them behind it would copy everything once more.
        return self._put_new(step, self.read(step, columns), streams)

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
        """Writes to the pages, and returns what queries see, each `(batch, num_heads, kv_len, head_dim)`."""
        step = self.open_step(streams[0], writes=True)
        seen = self._seen(step, streams)  # a window drops what a long piece's first queries still see
        if not self.is_initialized:
            self.lazy_initialization(*streams)
        self._write(step, streams)
        self.end_step(step)
        self.seq_length = step.stop
        self.cache.end_layer(step)
        return seen

    def end_step(self, step: PageStep) -> None:
        """Does what is to be done once the new tokens are written, before old pages are free again."""

    def open_step(self, states: torch.Tensor, writes: bool = False) -> PageStep:
        """The current forward call, or a new one for states `(batch, num_heads, q_len, head_dim)` that begin one."""
        cache, num_columns = self.cache, states.shape[2]
        if cache.step is not None and writes and self.seq_length > cache.step.frame:
            raise RuntimeError(
                "a layer got new tokens again before all layers that compute keys and values got theirs"
            )
        if cache.step is None or cache.step.num_columns != num_columns:
            cache.open_step(num_columns, states.shape[0], None)
        assert cache.step is not None
        cache.check_batch(states.shape[0])
        return cache.step

    def _find_rows(self, step: PageStep, columns: range, lows: list[int], num_tokens: list[int]) -> Rows:
        """Where the tokens of these columns lie, `(batch, num_heads, num_columns)`.

        For columns without a token that counts, it is where the nearest token of the same row lies, so that nothing of
        another sequence is ever read.

        Args:
            step: the forward call that runs.
            columns: of its frame.
            lows: the first token of each row that counts.
            num_tokens: the tokens of each row that count end here.
        """
        page_size, starts, device = self.group.page_size, step.starts, self.streams[0].device
        # Token t of a row lies in column start + t. Columns without one are sent to the nearest token, low or high.
        highs = [max(0, stop - 1) for stop in num_tokens]
        lows = [
            min(high, max(low, columns.start - start)) for low, high, start in zip(lows, highs, starts, strict=True)
        ]
        tables = [
            [table.pages.get(index, 0) for index in range(low // page_size, high // page_size + 1)]
            for table, low, high in zip(self.tables(), lows, highs, strict=True)
        ]
        # All that the device needs goes there in one piece: three numbers and the pages of each row.
        width = max(map(len, tables))
        packed = torch.tensor(
            [
                [start, low, high] + table + [0] * (width - len(table))
                for start, low, high, table in zip(starts, lows, highs, tables, strict=True)
            ],
            device=device,
        )
        start, low, high, table = packed[:, 0:1], packed[:, 1:2], packed[:, 2:3], packed[:, 3:]
        positions = torch.arange(columns.start, columns.stop, device=device)[None] - start
        positions = positions.maximum(low).minimum(high)  # (batch, num_columns)
        pages = table.gather(1, positions // page_size - low // page_size)  # tables begin with the page of `low`
        pages, places = pages[:, None], (positions % page_size)[:, None]
        return {
            count: (pages * count + torch.arange(count, device=device)[None, :, None]) * page_size + places
            for count in self.head_counts
        }

    def tables(self) -> list[BlockTable]:
        """Those of the rows of the batch."""
        return [row.tables[self.window] for row in self.cache.rows]

    def read_rows(self, step: PageStep, columns: range) -> Rows:
        """The rows of pools of all pages that hold these columns, `(batch, num_heads, num_columns)`."""
        key = ("read", self.window, self.head_counts, columns, self.streams[0].device)

        def find() -> Rows:
            lows = [table.first_kept for table in self.tables()]
            return self._find_rows(step, columns, lows, step.lengths)

        return step.share(key, find)

    def read(self, step: PageStep, columns: range) -> Streams:
        """For each stream, the past in these columns, `(batch, num_heads, num_columns, head_dim)`.

        It ends where the new tokens begin, and what they will take is not set. Rows without a past are zeros.
        """
        return self.gather(self.streams, self.read_rows(step, columns), step)

    def gather(self, pools: Streams, rows: Rows, step: PageStep) -> Streams:
        """What `read` returns, from any pools `(num_pages, num_heads, page_size, head_dim)`.

        Streams of one shape go to one piece of memory: two large pieces that come and go together are handed back to
        the system each time, and to get them anew takes far longer than the gather.
        """
        shapes = [(*rows[pool.shape[1]].shape, pool.shape[3]) for pool in pools]
        gathered: Streams
        if all(shape == shapes[0] and pool.dtype == pools[0].dtype for shape, pool in zip(shapes, pools, strict=True)):
            gathered = pools[0].new_empty(len(pools), *shapes[0]).unbind()
        else:  # of other widths, or under autocast, which rounds values but not keys once they are rotated
            gathered = tuple(pool.new_empty(shape) for pool, shape in zip(pools, shapes, strict=True))
        empty = [row for row, length in enumerate(step.lengths) if length == 0]
        for pool, states in zip(pools, gathered, strict=True):
            _, num_heads, _, width = pool.shape
            torch.index_select(pool.view(-1, width), 0, rows[num_heads].flatten(), out=states.view(-1, width))
            if empty:
                states[empty] = 0.0
        return gathered

    def _write(self, step: PageStep, streams: Streams) -> None:
        """Writes the new tokens that have to be kept, for all rows and heads at once."""
        key = ("write", self.window, self.head_counts, self.streams[0].device)
        written = step.share(key, lambda: self._find_written(step))
        if written.width == 0:
            return
        rows = self.written_rows(step, written.rows)
        for pool, states in zip(self.streams, streams, strict=True):
            num_heads, new = pool.shape[1], states.detach()[:, :, -written.width :].flatten(0, 2)
            new = new if written.kept is None else new[written.kept[num_heads]]
            pool.view(-1, pool.shape[3]).index_copy_(0, rows[num_heads], new)

    def _find_written(self, step: PageStep) -> _Written:
        """Finds out which of the new tokens have to be kept, and where they go."""
        calls = zip(step.lengths, step.num_new, strict=True)
        firsts = [self.group.first_written(length, num_new) for length, num_new in calls]
        counts = [total - first for total, first in zip(step.totals, firsts, strict=True)]
        width = max(counts)
        rows = self._find_rows(step, range(step.stop - width, step.stop), firsts, step.totals)
        if min(counts) == width:
            return _Written(width, {count: each.flatten() for count, each in rows.items()}, None)
        is_kept = torch.arange(width, 0, -1)[None] <= torch.tensor(counts)[:, None]  # (batch, width)
        kept = {
            count: is_kept[:, None].expand(each.shape).flatten().nonzero().flatten().to(each.device)
            for count, each in rows.items()
        }
        return _Written(width, {count: each.flatten()[kept[count]] for count, each in rows.items()}, kept)

    def written_rows(self, step: PageStep, rows: Rows) -> Rows:
        """Where in this layer's pools lies what pools of all pages have in these rows, each `(num_rows,)`."""
        return rows

    def planned_bytes(self, seq_length: int, batch_size: int, itemsize: int) -> int:
        """What `num_bytes` will be: those of whole pools, which may be larger than what is used."""
        num_pages = self.group.num_pages or capacity_for(batch_size * self.group.count_pages(seq_length))
        return num_pages * self.group.page_size * self.store.size * itemsize

    def num_used_bytes(self) -> int:
        """Bytes of the pages that some sequence holds."""
        allocator = self.group.allocator
        return self.num_bytes() // max(1, allocator.capacity) * allocator.num_used

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What has to be saved: pages that somebody holds, `(num_used, ...)`, and for each sequence which it has."""
        sequences = self.cache.sequences()
        tables = [sequence.tables[self.window] for sequence in sequences]
        used = sorted({page for table in tables for page in table.pages.values()})
        place = {page: index for index, page in enumerate(used)}
        entries = [
            (row, index, place[page]) for row, table in enumerate(tables) for index, page in table.pages.items()
        ]
        scalars = {
            "seq_length": self.seq_length,
            "record_past": self.record_past,
            "num_rows": len(self.cache.rows),
            "names": [sequence.name for sequence in sequences],
            "lengths": [sequence.length for sequence in sequences],
            "first_kept": [table.first_kept for table in tables],
        }
        if not self.is_initialized:
            return {}, scalars
        return self.saved_pages(used) | {"block_table": torch.tensor(entries, dtype=torch.long).view(-1, 3)}, scalars

    def load_state(self, tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        """Takes on a saved state, pages `(num_used, ...)`; the cache must be new."""
        cache = self.cache
        cache.load_sequences(scalars["names"], scalars["lengths"], scalars["num_rows"])
        cache.frame = self.seq_length = scalars["seq_length"]
        self.record_past = scalars["record_past"]
        if not tensors:
            return
        if not self.group.allocator.num_used:
            tables = [sequence.tables[self.window] for sequence in cache.sequences()]
            for row, index, page in tensors["block_table"].tolist():
                tables[row].pages[index] = page
            for table, first_kept in zip(tables, scalars["first_kept"], strict=True):
                table.first_kept = first_kept
            pages = {page for table in tables for page in table.pages.values()}
            self.group.load(tables, max(pages, default=-1) + 1)
        self.restore_pages(tensors)

    def saved_pages(self, pages: list[int]) -> dict[str, torch.Tensor]:
        """What these pages hold, each stream `(num_pages, num_heads, page_size, head_dim)`."""
        return {name: pool[pages] for name, pool in self.tensors().items()}

    def restore_pages(self, saved: dict[str, torch.Tensor]) -> None:
        """Fills new pools with what `saved_pages` gave, in its shapes: `(num_pages, ...)`."""
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
    """A pool `(num_pages, ...)`, zeros behind the old pages; it can be written to in inference mode and outside."""
    if len(pool) == num_pages and not pool.is_inference():
        return pool
    with torch.inference_mode(False):
        result = torch.zeros(num_pages, *pool.shape[1:], dtype=pool.dtype, device=pool.device)
        result[:num_pages][: len(pool)] = pool[:num_pages]
    return result


def copy_within(pools: Iterable[torch.Tensor], pairs: list[tuple[int, int]]) -> None:
    """Copies pages within pools `(num_pages, ...)`; pairs of from where and where to."""
    for pool in pools if pairs else ():
        source, target = torch.tensor(pairs, device=pool.device).T
        pool.index_copy_(0, target, pool.index_select(0, source))
