"""One suite for all stores: what the device would read agrees with a dictionary, whatever the order of operations.

The device is two arrays: the page table, which knows only the deltas, and the arena, in which every page holds a mark
of its (sequence, layer, page). The marks must be where the table says, also after a sequence went to the host and came
back elsewhere.
"""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import OutOfPages
from engine.memory.host import HostTier
from engine.memory.moves import Copy
from engine.memory.paged import PagedStore
from engine.memory.pages import PagePool
from engine.memory.stores import make_store

PAGES = 16  # of one layer in the longest sequence
MARK = np.dtype([("owner", np.int32), ("layer", np.int32), ("page", np.int32)])


class StoreMachine(RuleBasedStateMachine):
    """Opens, grows and closes sequences, moves them out and in, and carries plans out on the device described above."""

    name: str

    @initialize(chunk=st.sampled_from([1, 4, 32]), layers=st.integers(1, 4), size=st.sampled_from([1, 16, 64]))
    def make(self, chunk, layers, size):
        self.host = HostTier(20 * layers)
        pages, slots = (40 * chunk, 4) if self.name == "paged" else (3 * layers * PAGES, 3)
        self.store = make_store(self.name, pages, layers, chunk, slots, size, PAGES * size, self.host)
        self.layers, self.size, self.named = layers, size, 0
        self.open_: dict[int, tuple[int, int]] = {}  # slot: owner, length
        self.written: dict[int, int] = {}  # slot: pages of each layer
        self.hosted: dict[int, int] = {}  # owner: length
        self.table = np.zeros((layers, slots, self.store.table_width), np.int32)
        self.arena = np.zeros(self.store.arena_pages, MARK)
        self.blocks: dict[int, np.ndarray] = {}
        self.copies: list[Copy] = []

    def taken(self, length: int) -> int:
        """Pages that a sequence of this length keeps from others, over all layers."""
        raise NotImplementedError

    def pages_of(self, length: int) -> int:
        return -(-length // self.size)

    def lengths(self, data) -> int:
        return data.draw(st.integers(1, PAGES * self.size))

    def marks(self, owner: int, length: int) -> np.ndarray:
        """What the pages of a sequence hold, [L, n]."""
        marks = np.zeros((self.layers, self.pages_of(length)), MARK)
        marks["owner"], marks["layer"] = owner, np.arange(self.layers)[:, None]
        marks["page"] = np.arange(marks.shape[1])
        return marks

    def refuses(self, action, *args) -> None:
        before = self.store.num_free_pages, self.store.num_free_slots, self.store.mapped.copy(), self.host.used
        with pytest.raises(OutOfPages):
            action(*args)
        after = self.store.num_free_pages, self.store.num_free_slots, self.store.mapped, self.host.used
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))

    @rule(data=st.data())
    def open(self, data):
        length = self.lengths(data)
        if not self.store.fits(length):
            return self.refuses(self.store.open, length)
        slot = self.store.open(length)
        assert slot not in self.open_
        self.named += 1
        self.open_[slot], self.written[slot] = (self.named, length), 0
        self.step(data)

    @precondition(lambda self: self.open_)
    @rule(data=st.data())
    def grow(self, data):
        slots = data.draw(st.lists(st.sampled_from(sorted(self.open_)), unique=True, min_size=1))
        most = PAGES * self.size
        lengths = [min(self.open_[s][1] + data.draw(st.integers(0, 40)), most) for s in slots]
        args = np.array(slots, np.int32), np.array(lengths)
        lacking = [self.pages_of(n) - self.pages_of(self.open_[s][1]) for s, n in zip(slots, lengths, strict=True)]
        assert self.store.lacking(*args).tolist() == lacking
        if not self.store.can_grow(*args):
            return self.refuses(self.store.grow, *args)
        self.store.grow(*args)
        for slot, length in zip(slots, lengths, strict=True):
            self.open_[slot] = self.open_[slot][0], length
        self.step(data)

    @precondition(lambda self: self.open_)
    @rule(data=st.data())
    def close(self, data):
        slot = data.draw(st.sampled_from(sorted(self.open_)))
        self.store.close(slot)
        del self.open_[slot]
        with pytest.raises(RuntimeError, match="closed already"):
            self.store.close(slot)

    @precondition(lambda self: self.open_)
    @rule(data=st.data())
    def swap_out(self, data):
        """Now and then the slot is opened again before the device hears of either."""
        slot = data.draw(st.sampled_from(sorted(self.open_)))
        owner, length = self.open_[slot]
        assert self.store.can_swap_out(slot) == (
            self.host.used + self.pages_of(length) * self.layers <= 20 * self.layers
        )
        if not self.store.can_swap_out(slot):
            return self.refuses(self.store.swap_out, slot, owner)
        self.store.swap_out(slot, owner)
        del self.open_[slot]
        self.hosted[owner] = length
        if data.draw(st.booleans()):
            self.open(data)
        self.step(data)

    @precondition(lambda self: self.hosted)
    @rule(data=st.data())
    def swap_in(self, data):
        owner = data.draw(st.sampled_from(sorted(self.hosted)))
        length = min(self.hosted[owner] + data.draw(st.integers(0, 1)), PAGES * self.size)
        landed = not any(c.out and owner in self.host.blocks[c.block].owners for c in self.copies)
        assert self.store.can_swap_in(owner, length) == (landed and self.store.fits(length))
        if not landed:
            return
        if not self.store.fits(length):
            return self.refuses(self.store.swap_in, owner, length)
        slot = self.store.swap_in(owner, length)
        assert slot not in self.open_
        self.open_[slot], self.written[slot] = (owner, length), self.pages_of(self.hosted.pop(owner))
        self.step(data)

    @precondition(lambda self: self.hosted)
    @rule(data=st.data())
    def forget(self, data):
        owner = data.draw(st.sampled_from(sorted(self.hosted)))
        self.store.forget(owner)
        del self.hosted[owner]

    @precondition(lambda self: self.copies)
    @rule(data=st.data())
    def all_copies_land(self, data):
        while self.copies:
            self.one_copy_ends(data, ok=True)

    @precondition(lambda self: self.copies)
    @rule(data=st.data(), ok=st.booleans())
    def one_copy_ends(self, data, ok):
        """In any order; a failed one loses the sequences it was for."""
        copy = self.copies.pop(data.draw(st.integers(0, len(self.copies) - 1)))
        lost = self.store.copied(Copy(copy.out, copy.block, copy.layer, ok, 0, 0.0, 0.0))
        assert not (ok and lost)
        for owner in lost:
            self.hosted.pop(owner, None)
            for slot in [s for s, (name, _) in self.open_.items() if name == owner]:
                self.store.close(slot)
                del self.open_[slot]

    def step(self, data) -> None:
        """What an executor does with a plan: deltas in any order, copies out, copies in, then the step's writes."""
        for layer, slot, index, page in data.draw(st.permutations(self.store.take_deltas().tolist())):
            self.table[layer, slot, index] = page
        for move in self.store.take_moves():
            if move.out:
                self.blocks[move.block] = self.arena[move.pages]
            else:
                wanted = move.pages >= 0
                self.arena[move.pages[wanted]] = self.blocks[move.block][wanted]
            self.copies.append(Copy(move.out, move.block, move.layer, True, 0, 0.0, 0.0))
        for block in self.store.take_freed_blocks():
            del self.blocks[block]
        for slot, (owner, length) in self.open_.items():
            new = slice(self.written[slot], None)
            self.arena[self.store.pages(slot)[:, new]] = self.marks(owner, length)[:, new]
            self.written[slot] = self.pages_of(length)

    @invariant()
    def the_device_finds_every_page(self):
        self.store.check()
        unmapped = self.store.unmapped_pages()
        for slot, (owner, length) in self.open_.items():
            n = self.pages_of(length)
            first = self.table[:, slot, :1] + np.arange(n) if self.store.view == "run" else self.table[:, slot, :n]
            assert (first == self.store.pages(slot)).all()
            assert (self.arena[first] == self.marks(owner, length)).all()
            assert not unmapped[first].any()
        mapped = sum(self.pages_of(n) for _, n in self.open_.values()) * self.layers
        assert self.store.num_mapped_pages == mapped == self.store.num_pages - int(unmapped.sum())
        assert all(self.host.holds(owner) == (owner in self.hosted) for owner in range(self.named + 1))
        assert self.store.num_pages - self.store.num_free_pages == sum(self.taken(n) for _, n in self.open_.values())


class PagedMachine(StoreMachine):
    name = "paged"

    def taken(self, length):
        return self.pages_of(length) * self.layers


class NativeMachine(StoreMachine):
    name = "native"

    def taken(self, length):
        return PAGES * self.layers


TestPaged, TestNative = PagedMachine.TestCase, NativeMachine.TestCase
TestPaged.settings = TestNative.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_deltas_of_a_reopened_slot_name_its_present_pages():
    """A slot closed and reopened between two plans: a scatter without order must still leave the present page."""
    store = PagedStore(PagePool(8, 1), num_slots=1, page_size=16, max_tokens=64)
    store.open(16)
    other = store.pool.allocate(1)  # so that the slot comes back with another page
    store.close(0)
    store.pool.free(other)
    store.open(16)
    deltas = store.take_deltas()
    assert len(deltas) == 2 and set(deltas[:, 3].tolist()) == {int(store.table[0, 0, 0])}


@pytest.mark.parametrize("chunk, fits", [(1, True), (4, True), (8, False)])
def test_what_can_ever_be_held_counts_whole_chunks(chunk, fits):
    """Four pages in each of 4 layers of a 16-page pool: chunks of 8 pages leave two chunks for four layers."""
    store = PagedStore(PagePool(16, 4, chunk), num_slots=1, page_size=16, max_tokens=1024)
    assert store.can_ever_hold(64) == fits
    assert not store.can_ever_hold(65) and not store.can_ever_hold(2048)


def test_native_runs_lie_layer_after_layer_behind_the_zero_page():
    """3 layers, 2 slots, runs of 4 pages: dense, disjoint, and the whole arena."""
    store = make_store("native", 24, 3, 1, num_slots=2, page_size=16, max_tokens=50)
    slots = [store.open(50), store.open(50)]
    pages = np.concatenate([store.pages(s) for s in sorted(slots)], 1)  # [L, 2 * 4]
    assert pages.tolist() == [[1 + 8 * layer + i for i in range(8)] for layer in range(3)]
    assert store.arena_pages == 25 and store.num_free_pages == 0 and not store.fits(1)


def test_a_native_sequence_fits_whatever_is_reserved_and_ends_with_its_run():
    """The watermark protects growth, which a run has room for already; beyond it nothing grows."""
    store = make_store("native", 8, 1, 1, num_slots=2, page_size=16, max_tokens=50)
    assert store.fits(50, reserve=10**6) and store.can_ever_hold(50)
    assert not store.fits(51) and not store.can_ever_hold(51)
    slot = np.array([store.open(1)])
    assert store.can_grow(slot, np.array([50])) and not store.can_grow(slot, np.array([51]))
    with pytest.raises(OutOfPages, match="51 tokens in a run of 50"):
        store.grow(slot, np.array([51]))
