"""The quantised cache in pages: a page is a group of tokens, and is encoded as a whole once it is full and old.

Which sequence holds which page is as in `lckv.cache.paged`, with copies on writing and shared beginnings. Each owner's
layer has two kinds of pools: one of packed pages with a place for every page, and a small one of pages as they are,
for those that are recent or not full. Sequences that share a page share its codes; where one of them has gone on far
enough for it to be encoded, it is encoded for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from lckv.cache.base import KVLayer
from lckv.cache.paged import PagedKVCache, PagedLayer, _Book, _Step
from lckv.cache.pages import capacity_for
from lckv.cache.quantization import GroupCodec, Quantized
from lckv.cache.quantized import QuantizedLayer, QuantizedOptions
from lckv.errors import UserError
from lckv.models.iteration import KeyValue


class QuantizedPagedLayer(PagedLayer):
    """The pools of one layer that computes KV.

    Attributes:
        keys: of exact pages, `(num_exact_pages, num_kv_heads, page_size, head_dim)`.
        values: as `keys`.
        exact: which pages those are, in their order in the pools; all others are read from the packed pools.

    Args:
        book: what the cache's layers share.
        group_idx: which of its groups the layer belongs to.
        codecs: for keys and values.
        residual_length: the fewest recent tokens that stay as they are.
    """

    tensor_names = QuantizedLayer.tensor_names

    def __init__(
        self, book: _Book, group_idx: int, codecs: tuple[GroupCodec, GroupCodec], residual_length: int
    ) -> None:
        super().__init__(book, group_idx)
        self.codecs, self.residual_length = codecs, residual_length
        self.exact: list[int] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes the pools."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.exact = []
        for names, codec, states in zip(self._names(), self.codecs, (key_states, value_states), strict=True):
            nothing = self._new_pool(states, 0)
            setattr(self, names[0], nothing)
            with torch.inference_mode(False):
                for name, tensor in zip(names[1:], codec.encode(nothing), strict=True):
                    setattr(self, name, _resized(tensor, self.group.allocator.capacity))
        self.is_initialized = True

    def resize(self, num_pages: int) -> None:
        """Lets the packed pools have `num_pages` pages: new ones at the end, or the first of the old ones."""
        if not self.is_initialized:
            return
        held = self.group.allocator.count_holders
        self._encode([page for page in self.exact if page < num_pages and not held(page)])  # they may be found again
        for name in self._packed_names():
            setattr(self, name, _resized(getattr(self, name), num_pages))
        self._keep_exact([page for page in self.exact if page < num_pages])

    def copy_pages(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies pages within the pools; pairs of from where and where to."""
        pairs = list(copies)
        if not pairs or not self.is_initialized:
            return
        source, target = torch.tensor(pairs, device=self.keys.device).T
        for name in self._packed_names():
            pool = getattr(self, name)
            pool.index_copy_(0, target, pool.index_select(0, source))
        targets = {page for _, page in pairs}
        self._keep_exact([page for page in self.exact if page not in targets])
        exact = [(self.exact.index(page), copy) for page, copy in pairs if page in self.exact]
        if exact:
            places = [place for place, _ in exact]
            self._add_exact([page for _, page in exact], (self.keys[places], self.values[places]))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KeyValue:
        """Writes the new tokens to their pages, returns what their queries see, and encodes pages that are old."""
        step = self._open_step(key_states, writes=True)
        totals = [length + num_new for length, num_new in zip(step.lengths, step.num_new, strict=True)]
        rows = list(zip(self.book.rows, totals, strict=True))
        states = super().update(key_states, value_states)
        old = {page for row, total in rows for page in self._old_pages(row.tables[self.group_idx].pages, total)}
        held = self.group.allocator.count_holders
        self._encode([page for page in self.exact if page in old or not held(page)])
        return states

    def _old_pages(self, pages: dict[int, int], length: int) -> list[int]:
        """The pages of a sequence of `length` tokens that are full and older than the recent ones."""
        edge = (length - self.residual_length) // self.group.page_size
        if not self.record_past:  # those that are about to be freed go too
            edge = max(edge, self.group.first_kept_after(length) // self.group.page_size)
        return [page for index, page in pages.items() if index < edge]

    def _encode(self, pages: list[int]) -> None:
        """Moves exact pages to the packed pools."""
        if not pages:
            return
        places = [self.exact.index(page) for page in pages]
        target = torch.tensor(pages, device=self.keys.device)
        for names, codec in zip(self._names(), self.codecs, strict=True):
            encoded = codec.encode(getattr(self, names[0])[places])
            for name, tensor in zip(names[1:], encoded, strict=True):
                getattr(self, name).index_copy_(0, target, tensor)
        self._keep_exact([page for page in self.exact if page not in pages])

    def _keep_exact(self, pages: list[int]) -> None:
        """Leaves only these of the exact pages."""
        places = [self.exact.index(page) for page in pages]
        if len(places) < len(self.exact):
            with torch.inference_mode(False):
                for names in self._names():
                    pool = getattr(self, names[0])[places]
                    setattr(self, names[0], _resized(pool, capacity_for(len(pages))))
            self.exact = list(pages)

    def _add_exact(self, pages: list[int], contents: KeyValue) -> None:
        """Makes more pages exact, with these keys and values `(num_pages, num_kv_heads, page_size, head_dim)`."""
        start, self.exact = len(self.exact), [*self.exact, *pages]
        for names, content in zip(self._names(), contents, strict=True):
            pool = _resized(getattr(self, names[0]), capacity_for(len(self.exact)))
            pool[start : len(self.exact)] = content
            setattr(self, names[0], pool)

    def _write_slots(self, step: _Step, width: int, firsts: list[int], totals: list[int]) -> torch.Tensor:
        """Places `(batch, num_kv_heads, width)` for the last `width` new columns, in exact pages."""
        slots = super()._write_slots(step, width, firsts, totals)
        size = self.group.page_size
        written = dict.fromkeys(
            row.tables[self.group_idx].pages[index]
            for row, first, total in zip(self.book.rows, firsts, totals, strict=True)
            for index in range(first // size, -(-total // size) if first < total else 0)
        )
        missing = [page for page in written if page not in self.exact]
        if missing:  # they may hold tokens already, if some were taken back
            self._add_exact(missing, (self._content(missing, 0), self._content(missing, 1)))
        return self._moved(slots, self.exact)

    def _read(self, slots: torch.Tensor, num_tokens: list[int]) -> KeyValue:
        """Keys and values in these places, `(batch, num_kv_heads, num_columns, head_dim)`; zeros for empty rows."""
        tables = [row.tables[self.group_idx] for row in self.book.rows]
        pages = sorted({page for table in tables for page in table.pages.values()})
        if not pages:
            shape = (*slots.shape, self.keys.shape[3])
            return self.keys.new_zeros(shape), self.values.new_zeros(shape)
        contents = (self._content(pages, 0), self._content(pages, 1))
        return self._gather(contents, self._moved(slots, pages), num_tokens)

    def _content(self, pages: list[int], which: int) -> torch.Tensor:
        """Keys (0) or values (1) of these pages, `(num_pages, num_kv_heads, page_size, head_dim)`."""
        names, codec = self._names()[which], self.codecs[which]
        pool = getattr(self, names[0])
        content = pool.new_empty(len(pages), *pool.shape[1:])
        place_of = {page: place for place, page in enumerate(self.exact)}
        exact = [(index, place_of[page]) for index, page in enumerate(pages) if page in place_of]
        packed = [(index, page) for index, page in enumerate(pages) if page not in place_of]
        if exact:
            index, source = torch.tensor(exact, device=pool.device).T
            content.index_copy_(0, index, pool.index_select(0, source))
        if packed:
            index, source = torch.tensor(packed, device=pool.device).T
            encoded = Quantized(*(getattr(self, name).index_select(0, source) for name in names[1:]))
            content.index_copy_(0, index, codec.decode(encoded, pool.dtype))
        return content

    def _moved(self, slots: torch.Tensor, pages: list[int]) -> torch.Tensor:
        """Flat places for a pool in which these pages lie one after the other."""
        block = self.keys.shape[1] * self.keys.shape[2]
        places = torch.zeros(max(1, self.group.allocator.capacity), dtype=torch.long)
        places[pages] = torch.arange(len(pages))
        return places.to(slots.device)[slots // block] * block + slots % block

    def _saved(self, pages: list[int]) -> dict[str, torch.Tensor]:
        """What these pages hold, and which of them are exact, by their place among them."""
        exact = [page for page in self.exact if page in pages]
        places = [self.exact.index(page) for page in exact]
        saved = {name: getattr(self, name)[pages] for name in self._packed_names()}
        saved |= {names[0]: getattr(self, names[0])[places] for names in self._names()}
        return saved | {"exact_pages": torch.tensor([pages.index(page) for page in exact], dtype=torch.long)}

    def _restore(self, saved: dict[str, torch.Tensor]) -> None:
        """Fills new pools with what `_saved` gave."""
        self.lazy_initialization(saved["keys"], saved["values"])
        for name in self._packed_names():
            getattr(self, name)[: saved[name].shape[0]] = saved[name]
        if saved["exact_pages"].numel():
            self._add_exact(saved["exact_pages"].tolist(), (saved["keys"], saved["values"]))

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.exact = []

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
        num_exact = sum(allocator.count_holders(page) > 0 for page in self.exact)
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

    def make_layer(self, layer_idx: int, window: int | None) -> KVLayer:
        """Makes the store of one owner, in the group of those with an equal window."""
        plain = super().make_layer(layer_idx, window)
        assert isinstance(plain, PagedLayer)
        self._book.layers[plain.group_idx].remove(plain)
        codecs = self.quantization.codecs(self.config.head_dim)
        return QuantizedPagedLayer(self._book, plain.group_idx, codecs, self.quantization.residual_length)

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
