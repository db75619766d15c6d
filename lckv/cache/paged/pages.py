"""Bookkeeping for a cache in pages (PagedAttention, Kwon et al., SOSP 2023): who holds which page. No tensors here.

Keys and values lie in pools of pages, `page_size` tokens each. A sequence has a block table that says which page holds
its tokens `i * page_size` to `(i + 1) * page_size - 1`. Pages are counted: several sequences may hold one, and who
wants to write to such a page gets a copy first. Pages are found again by a hash of all tokens up to their end, so that
a sequence that begins like another one, or like one that is gone and whose pages nobody has taken yet, starts with
its pages.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lckv.errors import UserError

if TYPE_CHECKING:
    from lckv.cache.paged.layer import PagedLayer


class OutOfPagesError(UserError):
    """A pool of fixed size has too few free pages for what the coming tokens need. Nothing has been written.

    Args:
        sequence: the name of the first sequence that goes without.
        length: tokens that the sequence has.
        num_new: tokens that it was about to take.
        num_needed: pages that all sequences of the forward call need together.
        group: the pool.
    """

    def __init__(self, sequence: str, length: int, num_new: int, num_needed: int, group: PageGroup) -> None:
        window = "" if group.window is None else f" with a window of {group.window} tokens"
        super().__init__(
            f"out of pages: {sequence} has {length} tokens and takes {num_new} more; the forward call needs "
            f"{num_needed} new pages of {group.page_size} tokens per layer{window}, and of "
            f"num_pages={group.allocator.num_pages} there are {group.allocator.num_free} free"
        )


class PageAllocator:
    """Counts who holds each page of a pool, and hands out free ones.

    Args:
        num_pages: size of the pool; `None` if it grows to the next power of two whenever it is full.
    """

    def __init__(self, num_pages: int | None) -> None:
        self.num_pages = num_pages
        self.capacity = num_pages or 0
        self._num_holders: dict[int, int] = {}
        self._free = dict.fromkeys(range(self.capacity))  # in the order in which they became free
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return len(self._num_holders)

    @property
    def num_free(self) -> int:
        """Pages of the pool that nobody holds."""
        return len(self._free)

    def has_room(self, num_pages: int) -> bool:
        """Whether as many pages can be had."""
        return self.num_pages is None or num_pages <= self.num_free

    def allocate(self) -> int:
        """Takes a free page, the one that has been free longest; what it held cannot be found any more."""
        if not self._free:
            self._grow()
        page = next(iter(self._free))
        self.forget(page)
        return self.retain(page)

    def _grow(self) -> None:
        if self.num_pages is not None:
            raise RuntimeError("the pool is full, which reserving pages should have found out")
        grown = capacity_for(self.capacity + 1)
        self._free.update(dict.fromkeys(range(self.capacity, grown)))
        self.capacity = grown

    def retain(self, page: int) -> int:
        """Adds a holder; the page may have been free."""
        self._free.pop(page, None)
        self._num_holders[page] = self._num_holders.get(page, 0) + 1
        return page

    def release(self, page: int) -> None:
        """Takes a holder away. A page without any is free at once, and found by its hash until it is taken."""
        self._num_holders[page] -= 1
        if self._num_holders[page] == 0:
            del self._num_holders[page]
            self._free[page] = None

    def count_holders(self, page: int) -> int:
        """How many sequences hold the page; with more than one, none may write to it."""
        return self._num_holders.get(page, 0)

    def register(self, page: int, key: bytes) -> None:
        """Lets `find` give this page for `key`, unless it knows an equal one."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def forget(self, page: int) -> None:
        """Takes back `register`: the page is about to change."""
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]

    def find(self, key: bytes) -> int | None:
        """The page whose tokens, and all before them, have this hash."""
        return self._page_of.get(key)

    def shrink(self) -> dict[int, int]:
        """Gives up free pages, so that the pool is no larger than one that never held more than it does now.

        Returns:
            Where the pages that lay behind the pool's new end are now.
        """
        capacity = capacity_for(self.num_used)
        free = [page for page in self._free if page < capacity]
        moved = dict(zip((page for page in self._num_holders if page >= capacity), free, strict=False))
        for page in [*moved.values(), *(page for page in self._free if page >= capacity)]:
            self.forget(page)
        self._num_holders = {moved.get(page, page): count for page, count in self._num_holders.items()}
        self._key_of = {moved.get(page, page): key for page, key in self._key_of.items()}
        self._page_of = {key: page for page, key in self._key_of.items()}
        self._free = dict.fromkeys(free[len(moved) :])
        self.capacity = capacity
        return moved


def capacity_for(num_pages: int) -> int:
    """Pages of a growing pool that holds `num_pages`: the next power of two."""
    return 1 << (num_pages - 1).bit_length() if num_pages else 0


class PageGroup:
    """Layers that keep the same tokens, so that one allocator and one block table per sequence serve them all.

    Args:
        page_size: tokens per page.
        num_pages: pages of each layer's pool; `None` for pools that grow.
        window: how many of the last tokens the layers keep; `None` for all.

    Attributes:
        layers: whose pools these are.
        record_past: whether pages that leave the window stay for a rollback.
    """

    def __init__(self, page_size: int, num_pages: int | None, window: int | None) -> None:
        self.page_size, self.num_pages, self.window = page_size, num_pages, window
        self.layers: list[PagedLayer] = []
        self.reset()

    def reset(self) -> None:
        """Starts from nothing."""
        self.allocator = PageAllocator(self.num_pages)
        self.record_past = False

    def first_kept_after(self, length: int) -> int:
        """The first token that has to stay when a sequence has `length` tokens."""
        return 0 if self.window is None else max(0, length - self.window)

    def first_written(self, length: int, num_new: int) -> int:
        """The first of the new tokens that is worth writing, with those that fill its page, for others to find."""
        if self.record_past:
            return length
        # A long piece passes a window's worth of itself by: what the window has left when the piece ends is not
        # written, but for the rest of the page in which the window begins, as only full pages can be found again.
        return max(length, self.first_kept_after(length + num_new) // self.page_size * self.page_size)

    def written_indices(self, length: int, num_new: int) -> range:
        """Which entries of the block table the new tokens are written to."""
        stop = -(-(length + num_new) // self.page_size)
        return range(self.first_written(length, num_new) // self.page_size, stop) if num_new else range(0)

    def count_pages(self, length: int) -> int:
        """How many pages a sequence of `length` tokens holds."""
        return -(-length // self.page_size) - self.first_kept_after(length) // self.page_size

    def count_needed(self, calls: Sequence[tuple[BlockTable, int, int]]) -> int:
        """How many pages will be allocated if each table takes so many tokens behind so many that it has.

        Of the sequences that share a page and write to it now, the last one keeps it if nobody else holds it.
        """
        num_missing = 0
        num_writers: Counter[int] = Counter()
        for table, length, num_new in calls:
            for index in self.written_indices(length, num_new):
                if index in table.pages:
                    num_writers[table.pages[index]] += 1
                else:
                    num_missing += 1
        return num_missing + sum(
            count - (count == self.allocator.count_holders(page)) for page, count in num_writers.items()
        )

    def check_room(self, sequences: list[PagedSequence], num_new: list[int]) -> None:
        """Finds out whether these sequences can take as many tokens together.

        Raises:
            OutOfPagesError: if not; it names the first one that goes without.
        """
        self.record_past = any(layer.record_past for layer in self.layers)
        calls = self._calls(sequences, num_new)
        num_needed = self.count_needed(calls)
        if self.allocator.has_room(num_needed):
            return
        has_room = (self.allocator.has_room(self.count_needed(calls[: row + 1])) for row in range(len(calls)))
        row = list(has_room).index(False)
        name = f"row {row}" if sequences[row].name is None else f"sequence {sequences[row].name!r}"
        _, length, new = calls[row]
        raise OutOfPagesError(name, length, new, num_needed, self)

    def reserve(self, sequences: list[PagedSequence], num_new: list[int]) -> None:
        """Gives every sequence the pages that it needs, with what they hold already; `check_room` has said yes."""
        copies = [pair for table, *call in self._calls(sequences, num_new) for pair in table.reserve(*call)]
        for layer in self.layers:
            layer.resize(self.allocator.capacity)
            layer.copy_pages(copies)

    def _calls(self, sequences: list[PagedSequence], num_new: list[int]) -> list[tuple[BlockTable, int, int]]:
        """Each sequence's table, its tokens, and new tokens."""
        return [(row.tables[self.window], row.length, new) for row, new in zip(sequences, num_new, strict=True)]

    def has_spare(self, factor: int) -> bool:
        """Whether the pools, if they grow, are larger than what they hold needs by more than this factor."""
        capacity, num_used = self.allocator.capacity, self.allocator.num_used
        return self.num_pages is None and capacity > factor * capacity_for(num_used)

    def shrink(self, sequences: list[PagedSequence]) -> None:
        """Gives memory back that these sequences, which are all that hold pages, do not need."""
        allocator = self.allocator
        moved = allocator.shrink()
        for sequence in sequences:
            pages = sequence.tables[self.window].pages
            pages.update({place: moved[page] for place, page in pages.items() if page in moved})
        for layer in self.layers:
            layer.copy_pages(moved.items())
            layer.resize(allocator.capacity)

    def load(self, tables: Sequence[BlockTable], num_pages: int) -> None:
        """Takes on block tables in which pages 0 to `num_pages - 1` occur; this group must be new."""
        pages = [self.allocator.allocate() for _ in range(num_pages)]
        for table in tables:
            table.share()
        for page in pages:
            self.allocator.release(page)

    def _first_needed(self, num_pages: int) -> int:
        """The first page that a sequence needs which begins with as many full pages."""
        return 0 if self.window is None else max(0, num_pages * self.page_size - self.window + 1) // self.page_size

    def find_beginnings(self, hashes: Sequence[bytes]) -> list[bool]:
        """Whether all that a sequence needs is there if it begins with the first page, the first two, and so on."""
        num_found, beginnings = 0, []  # without a gap, the last one included
        for num_pages, key in enumerate(hashes, 1):
            num_found = 0 if self.allocator.find(key) is None else num_found + 1
            beginnings.append(num_found >= num_pages - self._first_needed(num_pages))
        return beginnings

    def adopt(self, hashes: Sequence[bytes]) -> BlockTable:
        """A table of a new sequence that begins with these full pages; `find_beginnings` has found them."""
        table = BlockTable(self)
        for index in range(self._first_needed(len(hashes)), len(hashes)):
            page = self.allocator.find(hashes[index])
            assert page is not None
            table.pages[index] = self.allocator.retain(page)
        table.first_kept = min(table.pages, default=0) * self.page_size
        return table


@dataclass
class BlockTable:
    """Where one sequence's tokens lie in the pools of one group.

    Attributes:
        group: whose pools.
        pages: the page that holds the tokens from `i * page_size` on, by *i*.
        first_kept: the first token whose keys and values are there; those after it are too.
    """

    group: PageGroup
    pages: dict[int, int] = field(default_factory=dict)
    first_kept: int = 0

    def reserve(self, length: int, num_new: int) -> list[tuple[int, int]]:
        """Gives the sequence a page of its own for each place that the new tokens will be written to.

        Returns:
            Pages whose content has to be copied, and where to.
        """
        copies, allocator = [], self.group.allocator
        for index in self.group.written_indices(length, num_new):
            page = self.pages.get(index)
            if page is None:
                self.pages[index] = allocator.allocate()
            elif allocator.count_holders(page) > 1:  # others hold what is there: write to a copy
                self.pages[index] = allocator.allocate()
                allocator.release(page)
                copies.append((page, self.pages[index]))
            else:
                allocator.forget(page)  # its hash is about to be wrong
        return copies

    def cut(self, length: int) -> None:
        """Frees the pages behind the first `length` tokens."""
        for index in [index for index in self.pages if index * self.group.page_size >= length]:
            self.group.allocator.release(self.pages.pop(index))

    def trim(self, length: int) -> None:
        """Frees the pages that lie wholly before the window of a sequence of `length` tokens."""
        first_index = self.group.first_kept_after(length) // self.group.page_size
        for index in [index for index in self.pages if index < first_index]:
            self.group.allocator.release(self.pages.pop(index))
        self.first_kept = max(self.first_kept, first_index * self.group.page_size)

    def settle(self, length: int, num_new: int) -> None:
        """Once the new tokens are written, frees the pages that the window has passed."""
        first_written = self.group.first_written(length, num_new)
        if first_written > length:
            self.first_kept = first_written
        if not self.group.record_past:
            self.trim(length + num_new)

    def share(self) -> BlockTable:
        """A table of another sequence that holds the same pages."""
        for page in self.pages.values():
            self.group.allocator.retain(page)
        return BlockTable(self.group, dict(self.pages), self.first_kept)

    def can_go_back_to(self, length: int) -> bool:
        """Whether all that a token behind `length` tokens sees is there."""
        return self.group.window is None or self.first_kept <= max(0, length - self.group.window + 1)

    def register(self, hashes: Sequence[bytes]) -> None:
        """Lets other sequences find the full pages of this one; `hashes[i]` stands for the tokens up to page *i*."""
        for index, page in self.pages.items():
            if index < len(hashes) and index * self.group.page_size >= self.first_kept:
                self.group.allocator.register(page, hashes[index])


@dataclass
class PagedSequence:
    """One sequence: a row of the batch, or one that waits.

    Attributes:
        name: what the user calls it; `None` for the rows of a batch, which have only a number.
        tables: where its tokens lie, for the group of each window.
        length: how many tokens it has, padding not counted.
        hashes: of its full pages, as far as its token ids are known.
    """

    name: Hashable | None
    tables: dict[int | None, BlockTable]
    length: int = 0
    hashes: list[bytes] = field(default_factory=list)

    def share(self, name: Hashable | None) -> PagedSequence:
        """A sequence that holds the same pages."""
        tables = {window: table.share() for window, table in self.tables.items()}
        return PagedSequence(name, tables, self.length, list(self.hashes))

    def cut(self, length: int) -> None:
        """Frees the pages behind the first `length` tokens; with 0, all that no other sequence holds."""
        for table in self.tables.values():
            table.cut(length)


def extend_hashes(hashes: list[bytes], token_ids: Sequence[int], page_size: int) -> list[bytes]:
    """Hashes of all full pages of a sequence.

    Each covers the page before it too, so that equal hashes mean equal tokens from the start on. A strong hash,
    because a false match would show one user's text to another.

    Args:
        hashes: those of the first pages, which are kept.
        token_ids: of the sequence from its start.
        page_size: tokens per page.
    """
    hashes = list(hashes)
    for index in range(len(hashes), len(token_ids) // page_size):
        tokens = token_ids[index * page_size : (index + 1) * page_size]
        content = b"".join(int(token).to_bytes(8, "little", signed=True) for token in tokens)
        hashes.append(hashlib.blake2b((hashes[-1] if hashes else b"") + content, digest_size=16).digest())
    return hashes
