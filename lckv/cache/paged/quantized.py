"""The quantised cache in pages: a page is a group of tokens, and is encoded as a whole once it is full and old.

Which sequence holds which page is as in `lckv.cache.paged.cache`, with copies on writing and shared beginnings. Each
owner's layer has two kinds of pools: one of packed pages with a place for every page, and a small one of pages as they
are, for those that are recent or not full. Sequences that share a page share its codes; where one of them has gone on
far enough for it to be encoded, it is encoded for all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any, NamedTuple

import torch

from lckv.cache.paged.cache import PagedKVCache
from lckv.cache.paged.layer import PagedLayer, PageStep, Rows, copy_within, resized
from lckv.cache.paged.pages import capacity_for
from lckv.cache.quantization import GroupCodec, Quantized
from lckv.cache.quantized import EncodingLayer, QuantizedOptions
from lckv.errors import UserError
from lckv.models.parts.sharing_cache import Streams
from lckv.sharing.layout import Store

Exact = tuple[int, ...]
"""The pages that lie as they are, in their order in the pools for those. Layers with equal ones share what follows."""


class _Leaving(NamedTuple):
    """What happens to exact pages when some of them leave.

    Attributes:
        pages: those that leave, `(num_pages,)`.
        places: where they lie in the exact pools, `(num_pages,)`.
        kept: where the others lie, `(num_kept,)`.
        exact: the others.
    """

    pages: torch.Tensor
    places: torch.Tensor
    kept: torch.Tensor
    exact: Exact

    @classmethod
    def among(cls, exact: Exact, pages: Collection[int], device: torch.device) -> _Leaving:
        """Lets those of the `pages` leave that are exact."""
        leaving = set(pages)
        gone = [(page, place) for place, page in enumerate(exact) if page in leaving]
        kept = [(page, place) for place, page in enumerate(exact) if page not in leaving]
        return cls(
            pages=_indices([page for page, _ in gone], device),
            places=_indices([place for _, place in gone], device),
            kept=_indices([place for _, place in kept], device),
            exact=tuple(page for page, _ in kept),
        )


def _indices(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=device)


class QuantizedPagedLayer(EncodingLayer, PagedLayer):
    """The pools of one owner.

    Attributes:
        streams: of exact pages, each `(num_exact_pages, num_heads, page_size, head_dim)`.
        encoded: the packed pools, with a place for every page.
        exact: which pages the exact ones are; all others are read from the packed pools.

    Args:
        store: what the owner keeps.
        cache: has the sequences, and the forward call that runs.
        codecs: for each stream.
        residual_length: the fewest recent tokens that stay as they are.
    """

    def __init__(
        self, store: Store, cache: PagedKVCache, codecs: tuple[GroupCodec, ...], residual_length: int
    ) -> None:
        super().__init__(store, cache)
        self.codecs, self.residual_length = codecs, residual_length
        self.exact: Exact = ()

    def lazy_initialization(self, *streams: torch.Tensor) -> None:
        """Makes the pools for streams `(batch, num_heads, q_len, head_dim)`, without exact pages."""
        self.dtype, self.device, self.exact = streams[0].dtype, streams[0].device, ()
        self.streams = self.new_pools(streams, 0)
        with torch.inference_mode(False):
            empty = [codec.encode(pool) for codec, pool in zip(self.codecs, self.streams, strict=True)]
        self.encoded = tuple(_resized(parts, self.group.allocator.capacity) for parts in empty)

    def resize(self, num_pages: int) -> None:
        """Lets the packed pools have `num_pages` pages: new ones at the end, or the first of the old ones."""
        if not self.is_initialized or len(self.encoded[0].codes) == num_pages:
            return
        held, device = self.group.allocator.count_holders, self.streams[0].device
        found_again = [page for page in self.exact if page < num_pages and not held(page)]
        self._encode(_Leaving.among(self.exact, found_again, device))
        self.encoded = tuple(_resized(parts, num_pages) for parts in self.encoded)
        self._forget(_Leaving.among(self.exact, [page for page in self.exact if page >= num_pages], device))

    def copy_pages(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies pages within the pools; pairs of from where and where to."""
        pairs = list(copies)
        if not pairs or not self.is_initialized:
            return
        copy_within(chain(*self.encoded), pairs)
        self._forget(_Leaving.among(self.exact, [copy for _, copy in pairs], self.streams[0].device))
        exact = [(self.exact.index(page), copy) for page, copy in pairs if page in self.exact]
        if exact:
            places, pages = zip(*exact, strict=True)
            self._add_exact(self.exact + pages, tuple(pool[list(places)] for pool in self.streams))

    def end_step(self, step: PageStep) -> None:
        """Encodes pages that are old."""
        device = self.streams[0].device
        key = ("encode", self.window, self.exact, self.record_past, device)
        self._encode(step.share(key, lambda: _Leaving.among(self.exact, self._old_pages(step), device)))

    def _old_pages(self, step: PageStep) -> set[int]:
        """The pages that are full and older than the recent ones of some row, and exact ones that nobody holds."""
        held = self.group.allocator.count_holders
        old = {page for page in self.exact if not held(page)}
        for table, total in zip(self.tables(), step.totals, strict=True):
            edge = (total - self.residual_length) // self.group.page_size
            if not self.record_past:  # those that are about to be freed go too
                edge = max(edge, self.group.first_kept_after(total) // self.group.page_size)
            old |= {page for index, page in table.pages.items() if index < edge}
        return old

    def _encode(self, leaving: _Leaving) -> None:
        """Moves exact pages to the packed pools."""
        if not len(leaving.pages):
            return
        for pool, codec, packed in zip(self.streams, self.codecs, self.encoded, strict=True):
            for part, new in zip(packed, codec.encode(pool[leaving.places]), strict=True):
                part.index_copy_(0, leaving.pages, new)
        self._forget(leaving)

    def _forget(self, leaving: _Leaving) -> None:
        """Drops exact pages."""
        if not len(leaving.pages):
            return
        self.exact = leaving.exact
        with torch.inference_mode(False):
            self.streams = tuple(resized(pool[leaving.kept], capacity_for(len(self.exact))) for pool in self.streams)

    def _add_exact(self, exact: Exact, contents: Streams) -> None:
        """Makes these pages exact; `contents` `(num_new, num_heads, page_size, head_dim)` has the last of them."""
        start, self.exact = len(self.exact), exact
        self.streams = tuple(resized(pool, capacity_for(len(exact))) for pool in self.streams)
        for pool, content in zip(self.streams, contents, strict=True):
            pool[start : len(exact)] = content

    def written_rows(self, step: PageStep, rows: Rows) -> Rows:
        """Where in the exact pools lies what pools of all pages have in these rows; makes pages exact for that."""
        key = ("written", self.window, self.head_counts, self.exact, self.streams[0].device)
        missing, exact, rows = step.share(key, lambda: self._make_exact(step, rows))
        if missing.numel():  # they may hold tokens already, if some were taken back
            self._add_exact(exact, self._decode(missing))
        return rows

    def _make_exact(self, step: PageStep, rows: Rows) -> tuple[torch.Tensor, Exact, Rows]:
        """The packed pages that new tokens are written to, the exact pages with these, and the rows there."""
        calls = zip(self.tables(), step.lengths, step.num_new, strict=True)
        written = dict.fromkeys(
            table.pages[index]
            for table, length, num_new in calls
            for index in self.group.written_indices(length, num_new)
        )
        already = set(self.exact)
        missing = [page for page in written if page not in already]
        exact = (*self.exact, *missing)
        return _indices(missing, self.streams[0].device), exact, self._moved(rows, exact)

    def read(self, step: PageStep, columns: range) -> Streams:
        """For each stream, the past in these columns, `(batch, num_heads, num_columns, head_dim)`."""
        rows = self.read_rows(step, columns)
        key = ("pages", self.window, self.head_counts, columns, self.exact, self.streams[0].device)
        packed, places, rows = step.share(key, lambda: self._find_pages(step, rows))
        contents = tuple(pool[places] for pool in self.streams)
        if packed.numel():
            pairs = zip(self._decode(packed), contents, strict=True)
            contents = tuple(torch.cat(pair) for pair in pairs)  # (num_pages, num_heads, page_size, head_dim)
        return self.gather(contents, rows, step)

    def _find_pages(self, step: PageStep, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, Rows]:
        """The packed pages of the past, the places of the exact ones, and the rows where one follows the other."""
        size, held = self.group.page_size, zip(self.tables(), step.lengths, strict=True)
        pages = sorted({page for table, length in held for i, page in table.pages.items() if i * size < length})
        place_of = {page: place for place, page in enumerate(self.exact)}
        packed = [page for page in pages if page not in place_of]
        exact = [page for page in pages if page in place_of]
        places, device = [place_of[page] for page in exact], self.streams[0].device
        return _indices(packed, device), _indices(places, device), self._moved(rows, [*packed, *exact])

    def _decode(self, pages: torch.Tensor) -> Streams:
        """These packed pages `(num_pages,)`, for each stream `(num_pages, num_heads, page_size, head_dim)`."""
        return tuple(
            codec.decode(Quantized(*(part.index_select(0, pages) for part in packed)), pool.dtype)
            for codec, packed, pool in zip(self.codecs, self.encoded, self.streams, strict=True)
        )

    def _moved(self, rows: Rows, pages: Sequence[int]) -> Rows:
        """Rows for flattened pools in which these pages lie one after the other, from rows for pools of all pages."""
        places = torch.zeros(max(1, self.group.allocator.capacity), dtype=torch.long)
        places[list(pages)] = torch.arange(len(pages))
        places, moved = places.to(self.streams[0].device), {}
        for count, each in rows.items():
            size = count * self.group.page_size
            moved[count] = places[each // size] * size + each % size
        return moved

    def saved_pages(self, pages: list[int]) -> dict[str, torch.Tensor]:
        """What these pages hold, `(num_pages, ...)`, and which of them are exact, by their place among them."""
        index_of = {page: index for index, page in enumerate(pages)}
        exact = [(index_of[page], place) for place, page in enumerate(self.exact) if page in index_of]
        indices, places = torch.tensor(exact, dtype=torch.long).view(-1, 2).T
        rows = {name: places.to(self.streams[0].device) for name in self.names}
        saved = {name: tensor[rows.get(name, pages)] for name, tensor in self.tensors().items()}
        return saved | {"exact_pages": indices}

    def restore_pages(self, saved: dict[str, torch.Tensor]) -> None:
        """Fills new pools with what `saved_pages` gave, in its shapes: `(num_pages, ...)`."""
        exact = tuple(saved[name] for name in self.names)
        self.lazy_initialization(*exact)
        for name, pool in self.tensors().items():
            if name not in self.names:
                pool[: saved[name].shape[0]] = saved[name]
        if saved["exact_pages"].numel():
            self._add_exact(tuple(saved["exact_pages"].tolist()), exact)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.exact = ()

    def planned_bytes(self, seq_length: int, batch_size: int, itemsize: int) -> int:
        """What `num_bytes` will be: packed pools with a place for every page, and exact ones for recent tokens."""
        size = self.group.page_size
        first = self.group.first_kept_after(seq_length) // size
        num_exact = -(-seq_length // size) - max(first, (seq_length - self.residual_length) // size)
        num_packed = self.group.num_pages or capacity_for(batch_size * self.group.count_pages(seq_length))
        pairs = zip(self.store.streams, self.codecs, strict=True)
        packed = num_packed * sum(stream.num_heads * codec.num_bytes(size, stream.head_dim) for stream, codec in pairs)
        return packed + capacity_for(batch_size * num_exact) * size * self.store.size * itemsize

    def num_used_bytes(self) -> int:
        """Bytes of the pages that some sequence holds."""
        if not self.is_initialized:
            return 0
        allocator = self.group.allocator
        num_exact = sum(allocator.count_holders(page) > 0 for page in self.exact)
        exact = sum(pool.nbytes // max(1, len(pool)) * num_exact for pool in self.streams)
        packed = sum(part.nbytes for part in chain(*self.encoded))
        return exact + packed // max(1, allocator.capacity) * allocator.num_used


def _resized(packed: Quantized, num_pages: int) -> Quantized:
    """Packed pools with `num_pages` pages."""
    return Quantized(*(resized(part, num_pages) for part in packed))


class QuantizedPagedKVCache(PagedKVCache):
    """The paged cache with old pages in 8, 4 or 2 bits per number.

    Args:
        config: the configuration of the model.
        options: see `lckv.cache.quantized.QuantizedKVCache`; `group_size` is the size of a page too.
        num_pages: pages in each layer's packed pool; `None` for pools that double when full.
    """

    name = "quantized"

    def __init__(self, config: Any, num_pages: int | None = None, **options: Any) -> None:
        self.quantization = QuantizedOptions(**options)
        if self.quantization.layout != "paged":
            raise UserError(f"cache.layout={self.quantization.layout!r}: for pages it is 'paged'")
        super().__init__(config, page_size=self.quantization.group_size, num_pages=num_pages)

    def make_layer(self, store: Store) -> PagedLayer:
        """Makes the empty store of one owner."""
        codecs = self.quantization.codecs(store.streams)
        return QuantizedPagedLayer(store, self, codecs, self.quantization.residual_length)

    def options(self) -> dict[str, Any]:
        """The arguments, beside `config`, that make an empty cache like this one."""
        return {**asdict(self.quantization), "num_pages": self.num_pages}
