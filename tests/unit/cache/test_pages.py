"""Who holds which page: every page is either free or held, shared pages are copied before they change."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv.cache.paged.pages import BlockTable, PageAllocator, PageGroup, capacity_for, extend_hashes


def test_pages_are_freed_with_their_last_holder_and_reused():
    allocator = PageAllocator(2)
    first, second = allocator.allocate(), allocator.allocate()
    assert {first, second} == {0, 1} and not allocator.has_room(1)
    allocator.retain(first)
    allocator.release(first)
    assert not allocator.has_room(1)
    allocator.release(first)
    assert allocator.has_room(1) and not allocator.has_room(2)
    assert allocator.allocate() == first


def test_a_growing_pool_doubles_when_it_is_full():
    allocator = PageAllocator(None)
    sizes = []
    for _ in range(9):
        allocator.allocate()
        sizes.append(allocator.capacity)
    assert sizes == [1, 2, 4, 4, 8, 8, 8, 8, 16] == [capacity_for(count) for count in range(1, 10)]
    assert capacity_for(0) == 0


def test_free_pages_are_found_by_their_hash_until_they_are_taken():
    allocator = PageAllocator(2)
    page = allocator.allocate()
    allocator.register(page, b"key")
    allocator.release(page)
    assert allocator.find(b"key") == page and allocator.num_used == 0
    other = allocator.allocate()  # the page that has been free longest
    assert other != page and allocator.find(b"key") == page
    assert allocator.retain(page) == page and not allocator.has_room(1)
    allocator.release(page)
    assert allocator.allocate() == page and allocator.find(b"key") is None


def test_shrinking_moves_pages_down_and_keeps_their_hashes():
    allocator = PageAllocator(None)
    pages = [allocator.allocate() for _ in range(8)]
    for page in pages:
        allocator.register(page, bytes([page]))
    for page in (0, 1, 2, 4, 5, 6):
        allocator.release(page)
    moved = allocator.shrink()
    assert allocator.capacity == 2 and allocator.num_free == 0
    assert set(moved) == {3, 7} and set(moved.values()) == {0, 1}
    assert {key: allocator.find(bytes([key])) for key in range(8)} == {key: moved.get(key) for key in range(8)}


def test_hashes_cover_everything_from_the_start():
    tokens = list(range(10))
    hashes = extend_hashes([], tokens, page_size=4)
    assert len(hashes) == 2
    assert extend_hashes(hashes[:1], tokens, 4) == hashes == extend_hashes([], tokens[:8], 4)
    other = extend_hashes([], [99, *tokens[1:]], 4)
    assert other[0] != hashes[0] and other[1] != hashes[1]
    assert extend_hashes([], [1, 256], 2) != extend_hashes([], [257, 0], 2)


def test_a_window_frees_pages_that_it_has_passed():
    group = PageGroup(page_size=4, num_pages=None, window=6)
    table = BlockTable(group)
    for length in range(30):
        table.reserve(length, 1)
        table.trim(length + 1)
        first = max(0, length + 1 - 6) // 4
        assert sorted(table.pages) == list(range(first, length // 4 + 1))
        assert len(table.pages) == group.count_pages(length + 1) == group.allocator.num_used
    assert group.allocator.capacity == 4


def test_a_long_piece_takes_pages_for_the_window_only():
    group = PageGroup(page_size=4, num_pages=None, window=6)
    assert group.count_needed([(BlockTable(group), 0, 1000)]) == 2
    group.record_past = True
    assert group.count_needed([(BlockTable(group), 0, 1000)]) == 250


def test_equal_beginnings_are_found_in_windowed_layers_if_the_window_is_there():
    group = PageGroup(page_size=2, num_pages=None, window=3)
    table = BlockTable(group)
    table.reserve(0, 8)  # the window keeps tokens 5 to 7, so pages 2 and 3 are written
    table.first_kept = 4
    hashes = extend_hashes([], range(8), 2)
    table.register(hashes)
    # The token behind four pages sees tokens 6 and 7, the one behind three 4 and 5; 2 and 3 were never written.
    assert group.find_beginnings(hashes) == [False, False, True, True]
    adopted = group.adopt(hashes)
    assert adopted.pages == {3: table.pages[3]}
    assert adopted.first_kept == 6 and group.allocator.count_holders(table.pages[3]) == 2


class Model:
    """Sequences with what each of their tokens should be, next to the pages of a group."""

    def __init__(self, page_size, num_pages, window):
        self.group = PageGroup(page_size, num_pages, window)
        self.pool = {}
        self.sequences = []
        self.next_token = 0

    def write(self, sequence, num_new):
        table, tokens = sequence
        length, group = len(tokens), self.group
        if not group.allocator.has_room(group.count_needed([(table, length, num_new)])):
            return
        for source, target in table.reserve(length, num_new):
            for place in range(group.page_size):
                self.pool[target, place] = self.pool.get((source, place))
        first = group.first_written(length, num_new)
        for position in range(length, length + num_new):
            self.next_token += 1
            tokens.append(self.next_token)
            if position >= first:
                page, place = divmod(position, group.page_size)
                self.pool[table.pages[page], place] = self.next_token
        table.settle(length, num_new)

    def check(self):
        group = self.group
        holders = Counter(page for table, _ in self.sequences for page in table.pages.values())
        assert group.allocator.num_used == len(holders)
        assert all(group.allocator.count_holders(page) == count for page, count in holders.items())
        assert group.allocator.num_used + group.allocator.num_free == group.allocator.capacity
        for table, tokens in self.sequences:
            window = group.window or len(tokens)
            assert table.first_kept <= max(0, len(tokens) - window + 1)
            for position in range(max(0, len(tokens) - window + 1), len(tokens)):
                page, place = divmod(position, group.page_size)
                assert self.pool[table.pages[page], place] == tokens[position]


@given(
    page_size=st.integers(1, 4),
    num_pages=st.sampled_from([None, 12]),
    window=st.sampled_from([None, 1, 3, 7]),
    actions=st.lists(st.tuples(st.sampled_from("awwwfcr"), st.integers(0, 9), st.integers(1, 9)), max_size=40),
)
@settings(max_examples=150, deadline=None)
def test_no_sequence_ever_sees_anothers_tokens(page_size, num_pages, window, actions):
    model = Model(page_size, num_pages, window)
    for action, which, amount in actions:
        sequence = model.sequences[which % len(model.sequences)] if model.sequences else None
        if action == "a" or sequence is None:
            model.sequences.append((BlockTable(model.group), []))
        elif action == "w":
            model.write(sequence, amount)
        elif action == "f":
            model.sequences.append((sequence[0].share(), list(sequence[1])))
        elif action == "r":
            sequence[0].cut(0)
            model.sequences = [other for other in model.sequences if other is not sequence]
        elif sequence[0].can_go_back_to(max(0, len(sequence[1]) - amount)):
            del sequence[1][max(0, len(sequence[1]) - amount) :]
            sequence[0].cut(len(sequence[1]))
            sequence[0].trim(len(sequence[1]))
        model.check()


def test_of_two_writers_to_one_page_the_last_keeps_it():
    group = PageGroup(page_size=4, num_pages=2, window=None)
    first = BlockTable(group)
    first.reserve(0, 2)
    other = first.share()
    calls = [(first, 2, 1), (other, 2, 1)]
    assert group.count_needed(calls) == 1
    copies = [pair for table, *call in calls for pair in table.reserve(*call)]
    assert copies == [(0, 1)] and first.pages == {0: 1} and other.pages == {0: 0}
    with pytest.raises(RuntimeError, match="full"):
        group.allocator.allocate()
