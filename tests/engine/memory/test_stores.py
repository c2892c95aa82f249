"""One suite for all stores: what the device would read agrees with a dictionary, whatever the order of operations.

The device is two arrays: the page table, which knows only the deltas, and the arena, in which every page holds a mark
of its (sequence, layer, page). At every step the marks written before must be where the table says, also those of
sequences that went to the host and came back elsewhere. `test_parking_store.py` runs it with layers parked on the host.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import OutOfPages
from engine.memory.host import HostTier
from engine.memory.moves import Copy
from engine.memory.native import NativeStore
from engine.memory.paged import PagedStore
from engine.memory.pages import PagePool
from engine.memory.staged import StagedPool

PAGES = 16  # of one layer in the longest sequence
HOST_PAGES = 20  # of one layer
SLOTS = 3
MARK = np.dtype([("owner", np.int32), ("layer", np.int32), ("page", np.int32)])


class StoreMachine(RuleBasedStateMachine):
    """Opens, grows and closes sequences, moves them out and in, and carries plans out on the device described above."""

    whole_runs = False  # whether a sequence takes PAGES pages of every layer, however short it is

    def make_store(self, chunk: int, layers: int, size: int, host: HostTier):
        raise NotImplementedError

    @initialize(chunk=st.sampled_from([1, 4, 32]), layers=st.integers(1, 4), size=st.sampled_from([1, 16, 64]))
    def make(self, chunk, layers, size):
        self.host = HostTier(HOST_PAGES * layers)
        self.store = self.make_store(chunk, layers, size, self.host)
        self.layers, self.size, self.named = layers, size, 0
        self.open_: dict[int, tuple[int, int]] = {}  # slot: owner, length
        self.hosted: dict[int, tuple[int, int]] = {}  # owner: length, pages written
        self.written: dict[int, int] = {}  # slot: pages of each layer
        self.arriving: set[int] = set()  # slots to which the next step brings pages
        self.sent = np.zeros((SLOTS, layers), int)  # pages parked, or on their way, by (slot, layer)
        self.table = np.zeros((layers, SLOTS, self.store.table_width), np.int32)
        self.arena = np.zeros(self.store.arena_pages, MARK)
        self.blocks: dict[int, np.ndarray] = {}  # by id, on the host
        self.copies: list[Copy] = []  # in flight
        self.regathers: set[int] = set()  # blocks
        self.landed: set[int] = set()  # blocks

    def pages_of(self, length: int) -> int:
        return -(-length // self.size)

    def marks(self, owner: int, num_pages: int) -> np.ndarray:
        """What the first pages of a sequence hold, [L, n]."""
        marks = np.zeros((self.layers, num_pages), MARK)
        marks["owner"], marks["layer"], marks["page"] = owner, np.arange(self.layers)[:, None], np.arange(num_pages)
        return marks

    def refuses(self, action, *args) -> None:
        before = self.store.num_free_pages, self.store.num_free_slots, self.store.mapped.copy(), self.host.used
        with pytest.raises(OutOfPages):
            action(*args)
        after = self.store.num_free_pages, self.store.num_free_slots, self.store.mapped, self.host.used
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))

    @rule(data=st.data())
    def open(self, data):
        length = data.draw(st.integers(1, data.draw(st.sampled_from([4, PAGES])) * self.size))
        if not self.store.fits(length):
            return self.refuses(self.store.open, length)
        self.named += 1
        self.seat(self.store.open(length), self.named, length, 0)

    def seat(self, slot: int, owner: int, length: int, written: int) -> None:
        assert slot not in self.open_
        self.open_[slot], self.written[slot], self.sent[slot] = (owner, length), written, 0

    @precondition(lambda self: self.can_grow())
    @rule(data=st.data())
    def grow(self, data):
        slots = data.draw(st.lists(st.sampled_from(self.can_grow()), unique=True, min_size=1))
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

    @precondition(lambda self: self.open_)
    @rule(data=st.data())
    def close(self, data):
        slot = data.draw(st.sampled_from(sorted(self.open_)))
        self.store.close(slot)
        self.unseat(slot)
        with pytest.raises(RuntimeError, match="closed already"):
            self.store.close(slot)

    def unseat(self, slot: int) -> None:
        del self.open_[slot]
        self.arriving.discard(slot)

    def can_grow(self) -> list[int]:
        """Slots of sequences that may grow: all."""
        return sorted(self.open_)

    @precondition(lambda self: self.can_leave())
    @rule(data=st.data())
    def swap_out(self, data):
        slot = data.draw(st.sampled_from(self.can_leave()))
        owner, length = self.open_[slot]
        room = self.host_room() >= self.pages_of(length) * self.layers
        assert self.store.can_swap_out(slot) == (room and slot not in self.arriving)
        if not self.store.can_swap_out(slot):
            return self.refuses(self.store.swap_out, slot, owner)
        self.store.swap_out(slot, owner)
        self.unseat(slot)
        self.hosted[owner] = length, self.written[slot]
        if data.draw(st.booleans()):
            self.settle(data)

    def can_leave(self) -> list[int]:
        """Slots of sequences that may be swapped out: all."""
        return sorted(self.open_)

    @precondition(lambda self: self.hosted)
    @rule(data=st.data())
    def swap_in(self, data):
        owner = data.draw(st.sampled_from(sorted(self.hosted)))
        (length, written), layers = self.hosted[owner], range(self.layers)
        length = min(length + data.draw(st.integers(0, 1)), PAGES * self.size)
        landed = all(e.block in self.landed for layer in layers for e in self.host.extents(owner, layer))
        assert self.store.can_swap_in(owner, length) == (landed and self.store.fits(length))
        if not self.store.can_swap_in(owner, length):
            return self.refuses(self.store.swap_in, owner, length) if landed else None
        slot = self.store.swap_in(owner, length)
        del self.hosted[owner]
        self.seat(slot, owner, length, written)
        self.arriving.add(slot)
        if data.draw(st.booleans()):
            self.settle(data)

    @precondition(lambda self: self.hosted)
    @rule(data=st.data())
    def forget(self, data):
        owner = data.draw(st.sampled_from(sorted(self.hosted)))
        self.store.forget(owner)
        del self.hosted[owner]

    @rule(data=st.data())
    def settle(self, data):
        """A step, and all copies land."""
        self.step(data.draw(st.randoms()))
        while self.copies:
            self.one_copy_ends(data, ok=True)

    @precondition(lambda self: self.copies)
    @rule(data=st.data(), ok=st.booleans())
    def one_copy_ends(self, data, ok):
        """In any order; a failed one loses the sequences it was for."""
        copy = self.copies.pop(data.draw(st.integers(0, len(self.copies) - 1)))
        expected = list(self.host.blocks[copy.block].owners if copy.out else copy.owners)
        if ok or (copy.out and copy.block in self.regathers):  # of a regathered block the pieces are left
            expected = []
        lost = self.store.copied(replace(copy, ok=ok))
        assert lost == expected
        if ok and copy.out:
            self.landed.add(copy.block)
        for owner in lost:
            self.lose(owner, copy)

    def lose(self, owner: int, copy: Copy) -> None:
        """A sequence for which a failed copy was."""
        self.hosted.pop(owner, None)
        for slot in [s for s, (name, _) in self.open_.items() if name == owner]:
            self.store.close(slot)
            self.unseat(slot)

    def host_room(self) -> int:
        """Pages that the host tier can take."""
        return HOST_PAGES * self.layers - self.host.used

    @rule(rng=st.randoms())
    def step(self, rng):
        """What an executor does with a plan: deltas in any order, copies out, copies in; then the step reads what was
        written and writes the rest."""
        deltas = self.store.take_deltas().tolist()
        rng.shuffle(deltas)
        for layer, slot, index, page in deltas:
            self.table[layer, slot, index] = page
        unmapped = self.store.unmapped_pages()
        for move in sorted(self.store.take_moves(), key=lambda m: not m.out):
            if move.out:
                self.blocks[move.block] = self.arena[move.pages]
            else:
                wanted = move.pages >= 0
                assert not unmapped[move.pages[wanted]].any(), "a closed sequence is still fetched"
                self.arena[move.pages[wanted]] = self.blocks[move.block][wanted]
            self.begin(move)
        computed, streamed = self.computed(), self.streamed()
        for block in self.store.take_freed_blocks():
            del self.blocks[block]
        self.arriving.clear()
        for slot in computed:
            (owner, length), written = self.open_[slot], self.written[slot]
            n = self.pages_of(length)
            start = self.table[:, slot]
            pages = start[:, :1] + np.arange(n) if self.store.view == "run" else start[:, :n]  # [L, n]
            here = self.on_device(slot)
            assert (pages == self.store.pages(slot))[here].all() and not unmapped[pages[here]].any()
            found = np.where(here, self.arena[pages], streamed.get(slot, np.zeros((), MARK)))
            assert (found[:, :written] == self.marks(owner, written)).all()
            self.arena[pages[here]] = self.marks(owner, n)[here]
            self.written[slot] = n

    def computed(self) -> list[int]:
        """Slots of the sequences in a step: all."""
        return sorted(self.open_)

    def begin(self, move) -> None:
        """A copy is on its way."""
        copy = Copy(move.out, move.block, move.layer, True, 0, 0.0, 0.0, move.owners, move.transient)
        self.copies.append(copy)

    def on_device(self, slot: int) -> np.ndarray:
        """Which pages of a running sequence are there, bool [L, n]: all."""
        return np.ones((self.layers, self.pages_of(self.open_[slot][1])), bool)

    def streamed(self) -> dict[int, np.ndarray]:
        """What the step finds of the others, [L, n] by slot."""
        return {}

    @invariant()
    def the_books_are_right(self):
        self.store.check()
        counts = [self.pages_of(length) for _, length in self.open_.values()]
        mapped = self.store.num_pages - int(self.store.unmapped_pages().sum())
        assert self.store.num_mapped_pages == mapped == sum(int(self.on_device(slot).sum()) for slot in self.open_)
        taken = PAGES * len(counts) * self.layers if self.whole_runs else mapped
        assert self.store.num_pages - self.store.num_free_pages == taken
        assert self.store.num_free_slots == SLOTS - len(counts)
        parked = [slot for slot in self.open_ if self.sent[slot].any() and self.written[slot]]
        hosted = {*self.hosted, *(self.open_[slot][0] for slot in parked)}
        assert all(self.host.holds(owner) == (owner in hosted) for owner in range(self.named + 1))


class PagedMachine(StoreMachine):
    def make_store(self, chunk, layers, size, host):
        return PagedStore(PagePool(30 * chunk, layers, chunk), SLOTS, size, PAGES * size, host)


def staged_pool(chunk: int, layers: int) -> StagedPool:
    """Two stages, if there are layers for two; the second has less room."""
    sizes = [(18 * chunk, layers - layers // 2), (12 * chunk, layers // 2)]
    return StagedPool([PagePool(pages, n, chunk) for pages, n in sizes if n])


class StagedMachine(StoreMachine):
    def make_store(self, chunk, layers, size, host):
        return PagedStore(staged_pool(chunk, layers), SLOTS, size, PAGES * size, host)


class NativeMachine(StoreMachine):
    whole_runs = True

    def make_store(self, chunk, layers, size, host):
        return NativeStore(SLOTS, layers, size, PAGES * size, host)


TestPaged, TestStaged, TestNative = PagedMachine.TestCase, StagedMachine.TestCase, NativeMachine.TestCase
TestPaged.settings = TestStaged.settings = TestNative.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None
)


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
    store = NativeStore(num_slots=2, num_layers=3, page_size=16, max_tokens=50)
    slots = [store.open(50), store.open(50)]
    pages = np.concatenate([store.pages(s) for s in sorted(slots)], 1)  # [L, 2 * 4]
    assert pages.tolist() == [[1 + 8 * layer + i for i in range(8)] for layer in range(3)]
    assert store.arena_pages == 25 and store.num_free_pages == 0 and not store.fits(1)


def test_a_native_sequence_fits_whatever_is_reserved_and_ends_with_its_run():
    """The watermark protects growth, which a run has room for already; beyond it nothing grows."""
    store = NativeStore(num_slots=2, num_layers=1, page_size=16, max_tokens=50)
    assert store.fits(50, reserve=10**6) and store.can_ever_hold(50)
    assert not store.fits(51) and not store.can_ever_hold(51)
    slot = np.array([store.open(1)])
    assert store.can_grow(slot, np.array([50])) and not store.can_grow(slot, np.array([51]))
    with pytest.raises(OutOfPages, match="51 tokens in a run of 50"):
        store.grow(slot, np.array([51]))
