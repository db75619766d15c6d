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
from lckv.cache.paged.layer import PagedLayer, PageStep
from lckv.cache.paged.pages import BlockTable, PagedSequence, PageGroup, extend_hashes
from lckv.errors import UserError, check_whole_number
from lckv.models.configuration_lckv import LCKVLlamaConfig
from lckv.sharing.layout import Store
from lckv.utils.padding import count_padding


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
        groups: of layers that keep the same tokens, one for each window that occurs.
        rows: the sequences that take part in the next forward call.
        named: those that have a name, rows or not.
        frame: columns of the rows seen as a batch with padding on the left.
        announced: how many new tokens `select` said that each row takes; `None` if it said nothing.
        step: the forward call that runs.

    Raises:
        UserError: if a page would be empty, or there would be none.
    """

    name = "paged"

    def __init__(self, config: Any, page_size: int = 16, num_pages: int | None = None) -> None:
        check_whole_number("cache.page_size", page_size)
        if num_pages is not None:
            check_whole_number("cache.num_pages", num_pages)
        self.page_size, self.num_pages = page_size, num_pages
        self.groups: dict[int | None, PageGroup] = {}
        self._forget_sequences()
        super().__init__(config)

    def _forget_sequences(self) -> None:
        self.rows: list[PagedSequence] = []
        self.named: dict[Hashable, PagedSequence] = {}
        self.frame = 0
        self.announced: list[int] | None = None
        self.step: PageStep | None = None

    def make_layer(self, store: Store) -> KVLayer:
        """Makes the empty store of one owner."""
        return PagedLayer(store, self)

    def group_for(self, window: int | None) -> PageGroup:
        """The group of the layers that keep as much."""
        if window not in self.groups:
            self.groups[window] = PageGroup(self.page_size, self.num_pages, window)
        return self.groups[window]

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 while the cache is empty."""
        return len(self.rows) or -1

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
            for group in self.groups.values()
        )
        return min(self.num_pages // most for most in num_pages)

    def num_used_bytes(self) -> int:
        """Bytes of the pages that some sequence holds, each counted once; `num_bytes` is those of the whole pools."""
        return sum(layer.num_used_bytes() for layer in self.layers if isinstance(layer, PagedLayer))

    def num_used_pages(self) -> int:
        """Pages that some sequence holds, of all pools."""
        return sum(group.allocator.num_used * len(group.layers) for group in self.groups.values())

    def begin_forward(self, config: LCKVLlamaConfig, attention_mask: torch.Tensor | None, num_new_tokens: int) -> None:
        """Reserves pages for the coming tokens, but for padding on the left: `(batch, past + q_len)`.

        Raises:
            OutOfPagesError: if pools of fixed size have too few; nothing has changed then.
            ValueError: for rows of different lengths without an attention mask that tells them apart.
        """
        super().begin_forward(config, attention_mask, num_new_tokens)
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        self.open_step(num_new_tokens, None if mask is None else mask.shape[0], mask)
        if attention_mask is None and self.step is not None and len(set(self.step.starts)) > 1:
            self._discard_step()
            raise ValueError(
                "the cached sequences have different lengths: give the attention_mask that select() returns"
            )

    def open_step(self, num_columns: int, batch_size: int | None, attention_mask: torch.Tensor | None) -> None:
        """Prepares for new tokens: works out which are padding, and reserves pages for the others.

        Args:
            num_columns: number of new tokens of each row, padding included.
            batch_size: number of rows; `None` if not known yet, as long as there are none.
            attention_mask: `(batch, past + q_len)` with zeros at padding; `None` if nothing is padding.

        Raises:
            OutOfPagesError: if there are not enough; nothing has changed then.
        """
        self._discard_step()
        if not self.rows:
            if batch_size is None:
                return
            if self.named:
                raise ValueError("no sequence takes part in this forward call: select() those that do")
            self.rows = [self._new_sequence(None) for _ in range(batch_size)]
        if batch_size is not None:
            self.check_batch(batch_size)
        num_new = self._count_new(num_columns, attention_mask)
        self._check_room(self.rows, num_new)  # for all groups before the first takes any
        for group in self.groups.values():
            group.reserve(self.rows, num_new)
        self.step = PageStep(self.frame, num_columns, [row.length for row in self.rows], num_new)

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
        num_padding = count_padding(attention_mask[:, self.frame : self.frame + num_columns])
        return [
            num_columns - (0 if row.length else padding) for row, padding in zip(self.rows, num_padding, strict=True)
        ]

    def end_layer(self, step: PageStep) -> None:
        """Once every layer has the new tokens, counts them, and frees the pages that windows have passed."""
        step.num_written += 1
        if step.num_written < len(self.layout.stores):
            return  # until the last layer has written, the call may still break off, and then nothing has happened
        self.step = self.announced = None
        self._set_frame(step.stop)
        for row, num_new in zip(self.rows, step.num_new, strict=True):
            for table in row.tables.values():
                table.settle(row.length, num_new)
            row.length += num_new
        self._shrink_after_change()

    def _discard_step(self) -> None:
        """Forgets a forward call that did not end; what some layers have written of it does not count."""
        if self.step is None:
            return
        for row in self.rows:
            row.cut(row.length)
        self.step = None
        self._set_frame(self.frame)

    def _set_frame(self, frame: int) -> None:
        """Says how many columns there are, for all layers."""
        self.frame = frame
        for group in self.groups.values():
            for layer in group.layers:
                layer.seq_length = frame

    def first_column(self) -> int:
        """The first column in which some row has a token."""
        if self.step is not None:
            return max(0, min(self.step.starts))
        return self.frame - max((row.length for row in self.rows), default=self.frame)

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
        self._check_name(name)
        self._check_no_batch()
        hashes = [] if token_ids is None else extend_hashes([], token_ids[:-1], self.page_size)
        sequence = self._new_sequence(name)
        known = zip(*(group.find_beginnings(hashes) for group in self.groups.values()), strict=True)
        num_pages = max((num for num, is_known in enumerate(known, 1) if all(is_known)), default=0)
        if num_pages:
            sequence.hashes, sequence.length = hashes[:num_pages], num_pages * self.page_size
            sequence.tables = {window: group.adopt(sequence.hashes) for window, group in self.groups.items()}
        self.named[name] = sequence
        return sequence.length

    def _new_sequence(self, name: Hashable | None) -> PagedSequence:
        """A sequence without tokens."""
        return PagedSequence(name, {window: BlockTable(group) for window, group in self.groups.items()})

    def _check_name(self, name: object) -> None:
        """Refuses names that are taken, and those that a file would not give back as they are."""
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise UserError(f"a sequence called {name!r}: allowed are text and whole numbers")
        if name in self.named:
            raise ValueError(f"a second sequence called {name!r}")

    def _check_no_batch(self) -> None:
        if any(row.name is None for row in self.rows):
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
        for table in sequence.tables.values():
            table.register(sequence.hashes)

    def fork_sequence(self, name: Hashable, new_name: Hashable) -> None:
        """Adds a sequence with the tokens of another. They share pages until one of them writes to a page."""
        self._check_name(new_name)
        self._discard_step()
        self.named[new_name] = self._sequence(name).share(new_name)

    def remove(self, name: Hashable) -> None:
        """Removes a sequence; pages that no other holds are free at once."""
        sequence = self._sequence(name)
        self._discard_step()
        del self.named[name]
        self.rows = [row for row in self.rows if row is not sequence]
        self.announced = None
        sequence.cut(0)
        self._shrink_pools(spare=4)

    def length(self, name: Hashable) -> int:
        """Tokens of a sequence."""
        return self._sequence(name).length

    def __contains__(self, name: object) -> bool:
        """Whether there is a sequence of that name."""
        return name in self.named

    def _sequence(self, name: Hashable) -> PagedSequence:
        if name not in self.named:
            raise KeyError(f"no sequence called {name!r}")
        return self.named[name]

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
        self._check_no_batch()
        self._discard_step()
        rows = [self._sequence(name) for name in names]
        if not rows or len(set(names)) < len(rows):
            raise ValueError(f"select({list(names)!r}): allowed are one or more sequences, each once")
        num_new = [1] * len(rows) if num_new is None else list(num_new)
        totals = torch.tensor([row.length + new for row, new in zip(rows, num_new, strict=True)])[:, None]
        num_columns, width = max(num_new), int(totals.max())
        self.rows, self.announced = rows, num_new
        self._set_frame(width - num_columns)
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
        self._check_room([self._sequence(name) for name in num_new], list(num_new.values()))

    def _check_room(self, sequences: list[PagedSequence], num_new: list[int]) -> None:
        for group in self.groups.values():
            group.check_room(sequences, num_new)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens of every row, and frees their pages.

        Raises:
            ValueError: unless there are as many.
            RuntimeError: if tokens that are needed again have been dropped; nothing has changed then.
        """
        self._discard_step()
        num_removed = check_crop(tokens_to_remove, self.frame)
        lengths = [max(0, row.length - num_removed) for row in self.rows]
        for row, length in zip(self.rows, lengths, strict=True):
            for window, table in row.tables.items():
                if not table.can_go_back_to(length):
                    raise RuntimeError(
                        f"a window of {window} tokens has dropped what taking back {num_removed} of {row.length} "
                        "tokens needs; call activate_past_recording() before the tokens that may be taken back"
                    )
        for row, length in zip(self.rows, lengths, strict=True):
            row.length = length
            row.cut(length)
            for table in row.tables.values():
                table.trim(length)
            del row.hashes[length // self.page_size :]
        self._set_frame(self.frame - num_removed)
        self._shrink_after_change()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row *i* becomes row `beam_idx[i]`, `(batch,)`: rows that come from one share its pages until they write."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch, `(new_batch,)`, in this order, and frees the pages of the others."""
        if not self.rows:
            return  # like every cache that is empty
        rows = torch.arange(len(self.rows))
        self._arrange_rows(rows[indices.cpu() if isinstance(indices, torch.Tensor) else indices].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch `repeats` times; the copies share pages until they write."""
        self._arrange_rows([row for row in range(len(self.rows)) for _ in range(repeats)])

    def _arrange_rows(self, indices: list[int]) -> None:
        """Row *i* becomes what row `indices[i]` was. Nothing is copied until somebody writes."""
        self._discard_step()
        rows, taken = [], set()
        for index in indices:
            row = self.rows[index]
            rows.append(row.share(None) if index in taken else row)
            taken.add(index)
        for index, row in enumerate(self.rows):
            if index not in taken and row.name is None:
                row.cut(0)
        self.rows, self.announced = rows, None
        self._shrink_after_change()

    def _shrink_after_change(self) -> None:
        # Sequences that come and go would make pools grow and shrink all the time: for them only `remove` lets go.
        if not self.named:
            self._shrink_pools()

    def _shrink_pools(self, spare: int = 1) -> None:
        for group in self.groups.values():
            if group.has_spare(spare):
                group.shrink(self.sequences())

    def sequences(self) -> list[PagedSequence]:
        """All there are: the rows of the batch, then those that wait."""
        return list({id(sequence): sequence for sequence in [*self.rows, *self.named.values()]}.values())

    def load_sequences(self, names: list[Any], lengths: list[int], num_rows: int) -> None:
        """Takes on the sequences of another cache, without their pages; this one must be new."""
        if self.rows or self.named:
            return  # another layer has brought them
        sequences = [self._new_sequence(name) for name in names]
        for sequence, length in zip(sequences, lengths, strict=True):
            sequence.length = length
        self.rows = sequences[:num_rows]
        self.named = {sequence.name: sequence for sequence in sequences if sequence.name is not None}

    def reset(self) -> None:
        """Forgets everything, and gives up the pools."""
        super().reset()
        self._forget_sequences()
        for group in self.groups.values():
            group.reset()

    def fork(self) -> Self:
        """A cache with the same content; what is done to one from now on does not disturb the other."""
        with torch.inference_mode(False):  # so that the copies can be written to in and outside of that mode
            shared = (self.config, self.plan, self.layout)
            return copy.deepcopy(self, {id(each): each for each in shared})
