"""What all layers of a cache in pages share: who takes part in a forward call, and which page each token goes to.

See `lckv.cache.paged.pages` for who holds which page, and `lckv.cache.paged.cache` for what a frame is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from lckv.cache.paged.pages import BlockTable, OutOfPagesError, PagedSequence, PageGroup, capacity_for

T = TypeVar("T")


@dataclass
class PageStep:
    """One forward call: which rows take how many tokens.

    Attributes:
        frame: columns before the new ones.
        num_columns: new columns.
        lengths: tokens of each row before this call.
        num_new: new tokens of each row, in the last of the new columns.
        shared: what has been worked out for several layers.
    """

    frame: int
    num_columns: int
    lengths: list[int]
    num_new: list[int]
    shared: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def totals(self) -> list[int]:
        """Tokens of each row after this call."""
        return [length + num_new for length, num_new in zip(self.lengths, self.num_new, strict=True)]

    @property
    def starts(self) -> list[int]:
        """The column of each row's first token."""
        stop = self.frame + self.num_columns
        return [stop - total for total in self.totals]

    @property
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


class PageStore(Protocol):
    """What the book asks of a layer's pools.

    Attributes:
        seq_length: columns that the layer has seen.
        record_past: whether pages that leave the window stay for a rollback.
    """

    seq_length: int
    record_past: bool

    def resize(self, num_pages: int) -> None:
        """Lets the pools have `num_pages` pages: new ones at the end, or the first of the old ones."""

    def copy_pages(self, copies: Iterable[tuple[int, int]]) -> None:
        """Copies pages within the pools; pairs of from where and where to."""


class PageBook:
    """What all layers of a cache share: sequences, the rows among them, their pages, and the forward call that runs.

    Attributes:
        groups: the kinds of layers, one for each window that occurs.
        layers: of each group.
        rows: the sequences that take part in the next forward call.
        named: those that have a name, rows or not.
        frame: columns of the rows seen as a batch with padding on the left.
        announced: how many new tokens `select` said that each row takes; `None` if it said nothing.
        step: the forward call that runs.

    Args:
        page_size: tokens per page.
        num_pages: pages in each layer's pool; `None` for pools that grow.
    """

    def __init__(self, page_size: int, num_pages: int | None) -> None:
        self.page_size, self.num_pages = page_size, num_pages
        self.groups: list[PageGroup] = []
        self.layers: list[list[PageStore]] = []
        self.forget_all()

    def forget_all(self) -> None:
        """Starts from nothing."""
        self.rows: list[PagedSequence] = []
        self.named: dict[Hashable, PagedSequence] = {}
        self.frame = 0
        self.announced: list[int] | None = None
        self.step: PageStep | None = None
        self.groups[:] = [PageGroup(self.page_size, self.num_pages, group.window) for group in self.groups]

    def group_for(self, window: int | None) -> int:
        """The index of the group whose layers keep as much, which may be a new one."""
        windows = [group.window for group in self.groups]
        if window not in windows:
            self.groups.append(PageGroup(self.page_size, self.num_pages, window))
            self.layers.append([])
            windows.append(window)
        return windows.index(window)

    def all_layers(self) -> Iterator[PageStore]:
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
        new = attention_mask[:, self.frame : self.frame + num_columns].bool()
        num_padding = (new.cumsum(dim=1) == 0).sum(dim=1).tolist()
        return [
            num_columns - (0 if row.length else padding) for row, padding in zip(self.rows, num_padding, strict=True)
        ]

    def _reserve(self, num_new: list[int]) -> None:
        """Gives every row the pages it needs, or none of them any."""
        self.check_room(self.rows, num_new)  # for all groups before the first takes any
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
            return  # until the last layer has written, the call may still break off, and then nothing has happened
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
            del row.hashes[row.length // self.page_size :]
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
        page_size = self.page_size
        starts = self.step.starts
        # Token t of a row lies in column start + t. Columns without one are sent to the nearest token, low or high.
        highs = [max(0, stop - 1) for stop in num_tokens]
        lows = [
            min(high, max(low, columns.start - start)) for low, high, start in zip(lows, highs, starts, strict=True)
        ]
        tables = [
            [row.tables[group_idx].pages.get(index, 0) for index in range(low // page_size, high // page_size + 1)]
            for row, low, high in zip(self.rows, lows, highs, strict=True)
        ]
        # All that the device needs goes there in one piece: three numbers and the pages of each row.
        width = max(map(len, tables))
        rows = [
            [start, low, high] + table + [0] * (width - len(table))
            for start, low, high, table in zip(starts, lows, highs, tables, strict=True)
        ]
        packed = torch.tensor(rows, device=device)
        start, low, high, table = packed[:, 0:1], packed[:, 1:2], packed[:, 2:3], packed[:, 3:]
        positions = torch.arange(columns.start, columns.stop, device=device)[None] - start
        positions = positions.maximum(low).minimum(high)  # (batch, num_columns)
        pages = table.gather(1, positions // page_size - low // page_size)  # tables begin with the page of `low`
        return pages, positions % page_size


def _calls(index: int, sequences: list[PagedSequence], num_new: list[int]) -> list[tuple[BlockTable, int, int]]:
    """Arguments for the pages that a group reserves: each sequence's table, tokens, and new tokens."""
    return [(row.tables[index], row.length, new) for row, new in zip(sequences, num_new, strict=True)]
