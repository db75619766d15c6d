"""A cache in pages (PagedAttention, Kwon et al., SOSP 2023): no room is kept for tokens that may never come.

Each owner has a pool of pages for each of its streams, `(num_pages, num_heads, page_size, head_dim)`. Owners that keep
everything share one set of block tables; those whose readers all have a window share another, in which pages that the
window has passed are free again. See `lckv.cache.paged.pages` for who holds which page.

What the model gets is a gather of each row's pages, aligned to the right: rows of different lengths look like a batch
with padding on the left, and all of the model's masks hold as they are. The padding itself is stored nowhere. The
count of columns of that batch before the new ones, padding included, is called the frame here. With a frame of 5 and
two new columns, and a row *b* that takes only one token:

    column   0 1 2 3 4   5 6
    row a    a a a a a   A A     five tokens, two new ones
    row b    . . . b b   b B     three tokens, one new one: its past reaches into the new columns, the call is "ragged"
    row c    . . . . .   . C     a sequence that begins
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Self

import torch

from lckv.cache.base import CACHES, KVCache
from lckv.cache.layers import KVLayer, check_crop
from lckv.cache.paged.book import PageBook
from lckv.cache.paged.layer import PagedLayer
from lckv.cache.paged.pages import PagedSequence, extend_hashes
from lckv.errors import UserError, check_whole_number
from lckv.layout import Store
from lckv.models.configuration_lckv import LCKVLlamaConfig


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

    Attributes:
        book: what the layers share: who takes part in a forward call, and which page each token goes to.

    Raises:
        UserError: if a page would be empty, or there would be none.
    """

    name = "paged"

    def __init__(self, config: Any, page_size: int = 16, num_pages: int | None = None) -> None:
        check_whole_number("cache.page_size", page_size)
        if num_pages is not None:
            check_whole_number("cache.num_pages", num_pages)
        self.page_size, self.num_pages = page_size, num_pages
        self.book = PageBook(page_size, num_pages)
        super().__init__(config)

    def make_layer(self, store: Store) -> KVLayer:
        """Makes the empty store of one owner, in the group of those with an equal window."""
        return self.new_store(store, self.book.group_for(store.window))

    def new_store(self, store: Store, group_idx: int) -> PagedLayer:
        """Makes the empty store of an owner in this group of the book."""
        return PagedLayer(store, self.book, group_idx)

    def options(self) -> dict[str, Any]:
        """The arguments, beside `config`, that make an empty cache like this one."""
        return {"page_size": self.page_size, "num_pages": self.num_pages}

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 while the cache is empty."""
        return len(self.book.rows) or -1

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
            for group in self.book.groups
        )
        return min(self.num_pages // most for most in num_pages)

    def num_used_bytes(self) -> int:
        """Bytes of the pages that some sequence holds, each counted once; `num_bytes` is those of the whole pools."""
        return sum(layer.num_used_bytes() for layer in self.layers if isinstance(layer, PagedLayer))

    def num_used_pages(self) -> int:
        """Pages that some sequence holds, of all pools."""
        return sum(
            group.allocator.num_used * len(layers)
            for group, layers in zip(self.book.groups, self.book.layers, strict=True)
        )

    def begin_forward(self, config: LCKVLlamaConfig, attention_mask: torch.Tensor | None, num_new_tokens: int) -> None:
        """Reserves pages for the coming tokens, but for padding on the left.

        Raises:
            OutOfPagesError: if pools of fixed size have too few; nothing has changed then.
            ValueError: for rows of different lengths without an attention mask that tells them apart.
        """
        super().begin_forward(config, attention_mask, num_new_tokens)
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        self.book.open_step(num_new_tokens, None if mask is None else mask.shape[0], mask)
        if attention_mask is None and self.book.step is not None and len(set(self.book.step.starts)) > 1:
            self.book.discard_step()
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
        book = self.book
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
        if name in self.book.named:
            raise ValueError(f"a second sequence called {name!r}")

    def _check_no_batch(self) -> None:
        if any(row.name is None for row in self.book.rows):
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
        for group, table in zip(self.book.groups, sequence.tables, strict=True):
            group.register(table, sequence.hashes)

    def fork_sequence(self, name: Hashable, new_name: Hashable) -> None:
        """Adds a sequence with the tokens of another. They share pages until one of them writes to a page."""
        self._check_name(new_name)
        self.book.discard_step()
        self.book.named[new_name] = self.book.copy_sequence(self._sequence(name), new_name)

    def remove(self, name: Hashable) -> None:
        """Removes a sequence; pages that no other holds are free at once."""
        book = self.book
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
        return name in self.book.named

    def _sequence(self, name: Hashable) -> PagedSequence:
        if name not in self.book.named:
            raise KeyError(f"no sequence called {name!r}")
        return self.book.named[name]

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
        book = self.book
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
        self.book.check_room([self._sequence(name) for name in num_new], list(num_new.values()))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens of every row, and frees their pages.

        Raises:
            ValueError: unless there are as many.
            RuntimeError: if tokens that are needed again have been dropped; nothing has changed then.
        """
        self.book.discard_step()
        num_removed = check_crop(tokens_to_remove, self.book.frame)
        self.book.check_crop(num_removed)
        self.book.crop(num_removed)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row *i* becomes row `beam_idx[i]`: rows that come from one share its pages until they write."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch, in this order, and frees the pages of the others."""
        rows = torch.arange(len(self.book.rows))
        chosen = rows[indices.cpu() if isinstance(indices, torch.Tensor) else indices]
        self.book.arrange_rows(chosen.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch `repeats` times; the copies share pages until they write."""
        self.book.arrange_rows([row for row in range(len(self.book.rows)) for _ in range(repeats)])

    def reset(self) -> None:
        """Forgets everything, and gives up the pools."""
        super().reset()
        self.book.forget_all()

    def fork(self) -> Self:
        """A cache with the same content; what is done to one from now on does not disturb the other."""
        with torch.inference_mode(False):  # so that the copies can be written to in and outside of that mode
            shared = (self.config, self.plan, self.layout)
            return copy.deepcopy(self, {id(each): each for each in shared})
