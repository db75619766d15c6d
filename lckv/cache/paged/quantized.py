"""The quantised cache in pages: a page is a group of tokens, and is encoded as a whole once it is full and old.

Which sequence holds which page is as in `lckv.cache.paged.cache`, with copies on writing and shared beginnings. Each
owner's layer has two kinds of pools: one of packed pages with a place for every page, and a small one of pages as they
are, for those that are recent or not full. Sequences that share a page share its codes; where one of them has gone on
far enough for it to be encoded, it is encoded for all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lckv.cache.paged.book import PageBook, PageStep
from lckv.cache.paged.cache import PagedKVCache
from lckv.cache.paged.layer import PagedLayer
from lckv.cache.paged.pages import capacity_for
from lckv.cache.quantization import GroupCodec, Quantized
from lckv.cache.quantized import QuantizedLayer, QuantizedOptions
from lckv.errors import UserError
from lckv.models.iteration import KeyValue


@dataclass(frozen=True)
class ExactPages:
    """Which pages lie as they are, in their order in the pools for those. It never changes, so that layers share it.

    Attributes:
        pages: their numbers.
    """

    pages: tuple[int, ...] = ()

    @cached_property
    def place_of(self) -> dict[int, int]:
        """Where each of them lies."""
        return {page: place for place, page in enumerate(self.pages)}

    def joined_by(self, pages: Iterable[int]) -> ExactPages:
        """These, and others behind them."""
        return ExactPages((*self.pages, *pages))


@dataclass(frozen=True)
class _Leaving:
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
    exact: ExactPages

    @classmethod
    def among(cls, exact: ExactPages, pages: Collection[int], device: torch.device) -> _Leaving:
        """Lets those of the `pages` leave that are exact."""
        leaving = set(pages)
        gone = [(page, place) for page, place in exact.place_of.items() if page in leaving]
        kept = [(page, place) for page, place in exact.place_of.items() if page not in leaving]
        return cls(
            pages=_indices([page for page, _ in gone], device),
            places=_indices([place for _, place in gone], device),
            kept=_indices([place for _, place in kept], device),
            exact=ExactPages(tuple(page for page, _ in kept)),
        )

    @property
    def num_pages(self) -> int:
        """How many leave."""
        return len(self.pages)


def _indices(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=device)


class QuantizedPagedLayer(PagedLayer):
    """The pools of one layer that computes KV.

    Attributes:
        keys: of exact pages, `(num_exact_pages, num_kv_heads, page_size, head_dim)`.
        values: as `keys`.
        exact: which pages those are; all others are read from the packed pools.

    Args:
        book: what the cache's layers share.
        group_idx: which of its groups the layer belongs to.
        codecs: for keys and values.
        residual_length: the fewest recent tokens that stay as they are.
    """

    tensor_names = QuantizedLayer.tensor_names

    def __init__(
        self, book: PageBook, group_idx: int, codecs: tuple[GroupCodec, GroupCodec], residual_length: int
    ) -> None:
        super().__init__(book, group_idx)
        self.codecs, self.residual_length = codecs, residual_length
        self.exact = ExactPages()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the pools."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.exact = ExactPages()
        for names, codec, states in zip(self._names(), self.codecs, (key_states, value_states), strict=True):
            nothing = self.new_pool(states, 0)
            setattr(self, names[0], nothing)
            with torch.inference_mode(False):
                for name, tensor in zip(names[1:], codec.encode(nothing), strict=True):
                    setattr(self, name, _resized(tensor, self.group.allocator.capacity))
        self.is_initialized = True

    def resize(self, num_pages: int) -> None:
        """Lets the packed pools have `num_pages` pages: new ones at the end, or the first of the old ones."""
        if not self.is_initialized or len(getattr(self, self._packed_names()[0])) == num_pages:
            return
        held = self.group.allocator.count_holders
        found_again = [page for page in self.exact.pages if page < num_pages and not held(page)]
        self._encode(_Leaving.among(self.exact, found_again, self.keys.device))
        for name in self._packed_names():
            setattr(self, name, _resized(getattr(self, name), num_pages))
        gone = [page for page in self.exact.pages if page >= num_pages]
        self._forget(_Leaving.among(self.exact, gone, self.keys.device))

    def copy_pages(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies pages within the pools; pairs of from where and where to."""
        pairs = list(copies)
        if not pairs or not self.is_initialized:
            return
        source, target = torch.tensor(pairs, device=self.keys.device).T
        for name in self._packed_names():
            pool = getattr(self, name)
            pool.index_copy_(0, target, pool.index_select(0, source))
        self._forget(_Leaving.among(self.exact, [copy for _, copy in pairs], self.keys.device))
        exact = [(self.exact.place_of[page], copy) for page, copy in pairs if page in self.exact.place_of]
        if exact:
            places, pages = zip(*exact, strict=True)
            self._add_exact(self.exact.joined_by(pages), (self.keys[list(places)], self.values[list(places)]))

    def end_step(self, step: PageStep) -> None:
        """Encodes pages that are old."""
        device = self.keys.device
        key = ("encode", self.group_idx, self.exact, self.record_past, device)
        self._encode(step.share(key, lambda: _Leaving.among(self.exact, self._old_pages(step), device)))

    def _old_pages(self, step: PageStep) -> set[int]:
        """The pages that are full and older than the recent ones of some row, and exact ones that nobody holds."""
        held = self.group.allocator.count_holders
        old = {page for page in self.exact.pages if not held(page)}
        for row, total in zip(self.book.rows, step.totals, strict=True):
            edge = (total - self.residual_length) // self.group.page_size
            if not self.record_past:  # those that are about to be freed go too
                edge = max(edge, self.group.first_kept_after(total) // self.group.page_size)
            old |= {page for index, page in row.tables[self.group_idx].pages.items() if index < edge}
        return old

    def _encode(self, leaving: _Leaving) -> None:
        """Moves exact pages to the packed pools."""
        if not leaving.num_pages:
            return
        for names, codec in zip(self._names(), self.codecs, strict=True):
            encoded = codec.encode(getattr(self, names[0])[leaving.places])
            for name, tensor in zip(names[1:], encoded, strict=True):
                getattr(self, name).index_copy_(0, leaving.pages, tensor)
        self._forget(leaving)

    def _forget(self, leaving: _Leaving) -> None:
        """Drops exact pages."""
        if not leaving.num_pages:
            return
        self.exact = leaving.exact
        with torch.inference_mode(False):
            for names in self._names():
                pool = getattr(self, names[0])[leaving.kept]
                setattr(self, names[0], _resized(pool, capacity_for(len(self.exact.pages))))

    def _add_exact(self, exact: ExactPages, contents: KeyValue) -> None:
        """Makes these pages exact; `contents` `(num_new, num_kv_heads, page_size, head_dim)` has the last of them."""
        start, self.exact = len(self.exact.pages), exact
        for names, content in zip(self._names(), contents, strict=True):
            pool = _resized(getattr(self, names[0]), capacity_for(len(exact.pages)))
            pool[start : len(exact.pages)] = content
            setattr(self, names[0], pool)

    def write_slots(self, step: PageStep, slots: torch.Tensor) -> torch.Tensor:
        """Where in the exact pools lies what pools of all pages have in these slots; makes pages exact for that."""
        key = ("write", self.group_idx, self.exact, self.keys.device)
        missing, exact, slots = step.share(key, lambda: self._make_exact(step, slots))
        if missing.numel():  # they may hold tokens already, if some were taken back
            self._add_exact(exact, (self._decode(missing, 0), self._decode(missing, 1)))
        return slots

    def _make_exact(self, step: PageStep, slots: torch.Tensor) -> tuple[torch.Tensor, ExactPages, torch.Tensor]:
        """The packed pages that new tokens are written to, the exact pages with these, and the slots there."""
        calls = zip(self.book.rows, step.lengths, step.num_new, strict=True)
        written = dict.fromkeys(
            row.tables[self.group_idx].pages[index]
            for row, length, num_new in calls
            for index in self.group.written_indices(length, num_new)
        )
        missing = [page for page in written if page not in self.exact.place_of]
        exact = self.exact.joined_by(missing)
        return _indices(missing, slots.device), exact, self._moved(slots, exact.pages)

    def read(self, step: PageStep, columns: range, num_tokens: list[int]) -> KeyValue:
        """Keys and values of these columns, `(batch, num_kv_heads, num_columns, head_dim)`; zeros for empty rows."""
        slots = self.read_slots(step, columns, num_tokens)
        key = ("pages", self.group_idx, columns, tuple(num_tokens), self.exact, self.keys.device)
        packed, places, slots = step.share(key, lambda: self._find_pages(slots))
        if not packed.numel() + places.numel():
            shape = (*slots.shape, self.keys.shape[3])
            return self.keys.new_zeros(shape), self.values.new_zeros(shape)
        return self.gather((self._content(packed, places, 0), self._content(packed, places, 1)), slots, num_tokens)

    def _find_pages(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The packed pages of all rows, the places of the exact ones, and the slots where one follows the other."""
        tables = [row.tables[self.group_idx] for row in self.book.rows]
        pages = sorted({page for table in tables for page in table.pages.values()})
        packed = [page for page in pages if page not in self.exact.place_of]
        exact = [page for page in pages if page in self.exact.place_of]
        places = [self.exact.place_of[page] for page in exact]
        moved = self._moved(slots, [*packed, *exact]) if pages else slots
        return _indices(packed, slots.device), _indices(places, slots.device), moved

    def _content(self, packed: torch.Tensor, places: torch.Tensor, which: int) -> torch.Tensor:
        """Keys (0) or values (1) of packed, then of exact pages, `(num_pages, num_kv_heads, page_size, head_dim)`.

        Args:
            packed: places of pages in the packed pools, `(num_packed,)`.
            places: in the exact ones, `(num_exact,)`.
            which: of the two.
        """
        exact = getattr(self, self._names()[which][0])[places]
        return torch.cat([self._decode(packed, which), exact]) if packed.numel() else exact

    def _decode(self, pages: torch.Tensor, which: int) -> torch.Tensor:
        """Keys (0) or values (1) of packed pages, `(num_pages, num_kv_heads, page_size, head_dim)`."""
        names, codec = self._names()[which], self.codecs[which]
        encoded = Quantized(*(getattr(self, name).index_select(0, pages) for name in names[1:]))
        return codec.decode(encoded, getattr(self, names[0]).dtype)

    def _moved(self, slots: torch.Tensor, pages: Sequence[int]) -> torch.Tensor:
        """Flat places for a pool in which these pages lie one after the other."""
        block = self.keys.shape[1] * self.keys.shape[2]
        places = torch.zeros(max(1, self.group.allocator.capacity), dtype=torch.long)
        places[list(pages)] = torch.arange(len(pages))
        return places.to(slots.device)[slots // block] * block + slots % block

    def saved_pages(self, pages: list[int]) -> dict[str, torch.Tensor]:
        """What these pages hold, and which of them are exact, by their place among them."""
        index_of = {page: index for index, page in enumerate(pages)}
        exact = [(index_of[page], place) for place, page in enumerate(self.exact.pages) if page in index_of]
        indices, places = torch.tensor(exact, dtype=torch.long).view(-1, 2).T
        saved = {name: getattr(self, name)[pages] for name in self._packed_names()}
        saved |= {names[0]: getattr(self, names[0])[places.to(self.keys.device)] for names in self._names()}
        return saved | {"exact_pages": indices}

    def restore_pages(self, saved: dict[str, torch.Tensor]) -> None:
        """Fills new pools with what `saved_pages` gave."""
        self.lazy_initialization(saved["keys"], saved["values"])
        for name in self._packed_names():
            getattr(self, name)[: saved[name].shape[0]] = saved[name]
        if saved["exact_pages"].numel():
            exact = self.exact.joined_by(saved["exact_pages"].tolist())
            self._add_exact(exact, (saved["keys"], saved["values"]))

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.exact = ExactPages()

    def planned_bytes(self, seq_length: int, batch_size: int, num_pages: int | None, like: tuple[int, int]) -> int:
        """Bytes per head after `seq_length` tokens of each row; `like` is the head's size and bytes per number."""
        size, (head_dim, itemsize) = self.group.page_size, like
        first = self.group.first_kept_after(seq_length) // size
        num_exact = -(-seq_length // size) - max(first, (seq_length - self.residual_length) // size)
        packed = num_pages or capacity_for(batch_size * self.group.count_pages(seq_length))
        exact = capacity_for(batch_size * num_exact) * 2 * size * head_dim * itemsize
        return packed * sum(codec.num_bytes(size, head_dim) for codec in self.codecs) + exact

    def num_used_bytes(self) -> int:
        """Bytes of the pages that some sequence holds."""
        allocator = self.group.allocator
        num_exact = sum(allocator.count_holders(page) > 0 for page in self.exact.pages)
        exact = sum(pool.nbytes // max(1, len(pool)) * num_exact for pool in (self.keys, self.values))
        packed = sum(getattr(self, name).nbytes for name in self._packed_names())
        return exact + packed // max(1, allocator.capacity) * allocator.num_used

    def _names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The attributes for keys and for values: the exact pool, then the packed ones."""
        return self.tensor_names[:4], self.tensor_names[4:]

    def _packed_names(self) -> list[str]:
        return [name for names in self._names() for name in names[1:]]


def _resized(pool: torch.Tensor, num_pages: int) -> torch.Tensor:
    """A pool with `num_pages` pages, zeros behind the old ones; it can be written to in inference mode and outside."""
    if len(pool) == num_pages and not pool.is_inference():
        return pool
    with torch.inference_mode(False):
        resized = torch.zeros(num_pages, *pool.shape[1:], dtype=pool.dtype, device=pool.device)
        resized[:num_pages][: len(pool)] = pool[:num_pages]
    return resized


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

    def new_store(self, group_idx: int) -> PagedLayer:
        """Makes the empty store of a layer in this group of the book."""
        codecs = self.quantization.codecs(self.config.head_dim)
        return QuantizedPagedLayer(self.book, group_idx, codecs, self.quantization.residual_length)

    def options(self) -> dict[str, Any]:
        """The arguments, beside `config`, that make an empty cache like this one."""
        return {**self.quantization.as_dict(), "num_pages": self.num_pages}

    def planned_bytes(self, seq_length: int, batch_size: int, dtype: torch.dtype) -> int:
        """Bytes that `num_bytes` will report once the cache has seen this much, by arithmetic.

        Args:
            seq_length: tokens of each sequence, none of them padding.
            batch_size: number of sequences.
            dtype: type of the keys and values that the model computes.
        """
        if seq_length == 0:
            return 0
        like = (self.config.head_dim, dtype.itemsize)
        return self.config.num_key_value_heads * sum(
            layer.planned_bytes(seq_length, batch_size, self.num_pages, like) for layer in self._layers()
        )

    def num_used_bytes(self) -> int:
        """Bytes of the pages that some sequence holds, each counted once; `num_bytes` is those of the whole pools."""
        return sum(layer.num_used_bytes() for layer in self._layers() if layer.is_initialized)

    def _layers(self) -> list[QuantizedPagedLayer]:
        return [layer for layer in self.owners().values() if isinstance(layer, QuantizedPagedLayer)]
