"""The paged store: tables, deltas and slots agree with a dictionary, whatever the order of operations."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import OutOfPages
from engine.memory.paged import PagedStore
from engine.memory.pages import PagePool


class StoreMachine(RuleBasedStateMachine):
    """Opens, grows and closes sequences; replays the deltas into a table of its own."""

    @initialize(chunk=st.sampled_from([1, 4, 32]), layers=st.integers(1, 4), size=st.sampled_from([1, 16, 64]))
    def make(self, chunk, layers, size):
        self.store = PagedStore(PagePool(40 * chunk, layers, chunk), num_slots=4, page_size=size, max_tokens=16 * size)
        self.lengths: dict[int, int] = {}
        self.replayed = np.zeros_like(self.store.table)

    def pages(self, length):
        return -(-length // self.store.page_size)

    @rule(data=st.data())
    def open(self, data):
        length = data.draw(st.integers(1, self.store.max_tokens))
        fits, free = self.store.fits(length), self.store.num_free_pages
        if not fits:
            with pytest.raises(OutOfPages):
                self.store.open(length)
            assert self.store.num_free_pages == free
            return
        slot = self.store.open(length)
        assert slot not in self.lengths
        assert free - self.store.num_free_pages == self.pages(length) * self.store.pool.num_layers
        self.lengths[slot] = length

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def grow(self, data):
        slots = data.draw(st.lists(st.sampled_from(sorted(self.lengths)), unique=True, min_size=1))
        lengths = [min(self.lengths[s] + data.draw(st.integers(0, 40)), self.store.max_tokens) for s in slots]
        args = np.array(slots, np.int32), np.array(lengths)
        before = self.store.mapped.copy()
        if self.store.can_grow(*args):
            self.store.grow(*args)
            self.lengths.update(zip(slots, lengths, strict=True))
        else:
            with pytest.raises(OutOfPages):
                self.store.grow(*args)
            assert (self.store.mapped == before).all()

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def close(self, data):
        slot = data.draw(st.sampled_from(sorted(self.lengths)))
        self.store.close(slot)
        del self.lengths[slot]

    @rule(rng=st.randoms())
    def replay_deltas_in_any_order(self, rng):
        deltas = self.store.take_deltas().tolist()
        rng.shuffle(deltas)
        for layer, slot, index, page in deltas:
            self.replayed[slot, layer, index] = page
        for slot, length in self.lengths.items():
            n = self.pages(length)
            assert self.store.mapped[slot] == n
            assert (self.replayed[slot, :, :n] == self.store.table[slot, :, :n]).all()

    @invariant()
    def consistent(self):
        if hasattr(self, "store"):
            self.store.check()
            used = sum(self.pages(n) for n in self.lengths.values()) * self.store.pool.num_layers
            mapped = self.store.num_pages - int(self.store.unmapped_pages().sum())
            assert mapped == used


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


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


def test_closing_twice_raises():
    """A slot is closed once."""
    store = PagedStore(PagePool(8, 1), num_slots=1, page_size=16, max_tokens=64)
    slot = store.open(1)
    store.close(slot)
    with pytest.raises(RuntimeError, match="closed already"):
        store.close(slot)


@pytest.mark.parametrize("chunk, fits", [(1, True), (4, True), (8, False)])
def test_what_can_ever_be_held_counts_whole_chunks(chunk, fits):
    """Four pages in each of 4 layers of a 16-page pool: chunks of 8 pages leave two chunks for four layers."""
    store = PagedStore(PagePool(16, 4, chunk), num_slots=1, page_size=16, max_tokens=1024)
    assert store.can_ever_hold(64) == fits
    assert not store.can_ever_hold(65) and not store.can_ever_hold(2048)
