"""The suite of `test_stores.py` with layers of running sequences parked on the host, in few pieces and in many."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from engine.errors import OutOfPages
from engine.memory import parking
from engine.memory.host import HostTier
from engine.memory.moves import Copy
from engine.memory.pages import PagePool
from engine.memory.parking import MAX_BLOCKS_PER_FETCH, ParkingStore
from tests.engine.memory.test_stores import MARK, PAGES, SLOTS, StoreMachine, staged_pool


class ParkingMachine(StoreMachine):
    """Parks any written pages of any layer, reads them through the transient pages, and brings layers home. Opens
    sequences with layers away, whose full pages the next step writes for the host, and extends them chunk by chunk.
    Copies end late, in any order, and fail."""

    seen: Counter  # what happened, over all examples

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.away: dict[int, np.ndarray] = {}  # slot: its layers whose pages are written for the host, bool [L]
        self.chunked: set[int] = set()  # slots with layers away that have more tokens to come
        self.due: dict[int, int] = {}  # slot: the first page that the next step writes for the host
        self.awaited: dict[int, set[int]] = {}  # owners of away pages, by block

    def make_store(self, chunk, layers, size, host):
        return ParkingStore(PagePool(30 * chunk, layers, chunk), SLOTS, size, PAGES * size, host, SLOTS * PAGES)

    @initialize(limit=st.sampled_from([1, 2, 3]))
    def choose_when_to_regather(self, limit):
        self.patch.setattr(parking, "MAX_BLOCKS_PER_FETCH", limit)
        self.limit = limit

    def teardown(self):
        self.patch.undo()

    def seat(self, slot, owner, length, written):
        super().seat(slot, owner, length, written)
        self.away[slot] = np.zeros(self.layers, bool)

    def unseat(self, slot):
        super().unseat(slot)
        del self.away[slot]
        self.chunked.discard(slot)
        self.due.pop(slot, None)

    def waits(self, slot: int) -> bool:
        """Whether pages of a sequence that were never on the device are still on their way to the host."""
        in_flight = {copy.block for copy in self.copies if copy.out}
        return any(self.open_[slot][0] in self.awaited.get(block, ()) for block in in_flight)

    def computed(self):
        return [slot for slot in sorted(self.open_) if not self.waits(slot)]

    def can_grow(self):
        return [slot for slot in self.computed() if slot not in self.chunked and slot not in self.due]

    def can_leave(self):
        return [slot for slot in sorted(self.open_) if slot not in self.due]

    def host_room(self):
        return super().host_room() - sum(self.to_host(slot, first) for slot, first in self.due.items())

    def to_host(self, slot: int, first: int) -> int:
        """Full pages from page `first` on of the layers that are away."""
        return max(self.open_[slot][1] // self.size - first, 0) * int(self.away[slot].sum())

    def draw_chunk(self, data, first: int) -> tuple[int, bool]:
        """Tokens that a sequence has with its next chunk, if pages up to `first` are written; whether it is not the
        last: then they end with a page."""
        most = min(PAGES, data.draw(st.sampled_from([first + 3, PAGES])))
        if data.draw(st.booleans()):
            return self.size * data.draw(st.integers(first + 1, most)), True
        return data.draw(st.integers(first * self.size + 1, most * self.size)), False

    def room_for(self, first: int, length: int, away: np.ndarray) -> bool:
        """Whether a sequence of `first` pages can have so many tokens: full pages of layers that are away go to the
        host, and the last page, if it is not full, is on the device."""
        pages, full = self.pages_of(length), length // self.size
        counts = np.where(away, pages - full, pages - first)
        return self.host_room() >= (full - first) * int(away.sum()) and self.store.pool.fits(counts)

    @rule(data=st.data())
    def open_away(self, data):
        length, more = self.draw_chunk(data, 0)
        away = np.array(data.draw(st.lists(st.booleans(), min_size=self.layers, max_size=self.layers)))
        fits = len(self.open_) < SLOTS and self.room_for(0, length, away)
        assert self.store.fits_away(length, away) == fits
        if not fits:
            return self.refuses(self.store.open_away, length, self.named + 1, away)
        self.named += 1
        slot = self.store.open_away(length, self.named, away)
        self.seat(slot, self.named, length, 0)
        self.away[slot] = away
        self.extended(slot, 0, more)

    @precondition(lambda self: self.chunked & {*self.computed()} - {*self.due})
    @rule(data=st.data())
    def extend(self, data):
        """The next chunk of a sequence, when the one before has landed."""
        slot = data.draw(st.sampled_from(sorted(self.chunked & {*self.computed()} - {*self.due})))
        first = self.open_[slot][1] // self.size
        if first == PAGES:
            self.chunked.remove(slot)
            return
        length, more = self.draw_chunk(data, first)
        fits = self.room_for(first, length, self.away[slot])
        assert self.store.can_extend(slot, length) == fits
        if not fits:
            return self.refuses(self.store.extend, slot, length)
        self.store.extend(slot, length)
        self.open_[slot] = self.open_[slot][0], length
        self.extended(slot, first, more)
        self.seen["extended"] += 1

    def extended(self, slot: int, first: int, more: bool) -> None:
        self.sent[slot, self.away[slot]] = self.open_[slot][1] // self.size
        if more and self.away[slot].any():
            self.chunked.add(slot)
        else:
            self.chunked.discard(slot)
        if self.to_host(slot, first):
            self.due[slot] = first

    @precondition(lambda self: self.can_grow())
    @rule(data=st.data())
    def extend_to_no_more_than_there_is(self, data):
        """A sequence that came back from the host is mapped whole, whatever of it the next step computes."""
        slot = data.draw(st.sampled_from(self.can_grow()))
        before = self.store.num_free_pages, self.host.used
        length = data.draw(st.integers(1, self.open_[slot][1]))
        assert self.store.can_extend(slot, length)
        self.store.extend(slot, length)
        assert before == (self.store.num_free_pages, self.host.used)

    @precondition(lambda self: self.open_)
    @rule(data=st.data(), rounds=st.sampled_from([4, 1]))
    def park(self, data, rounds):
        """Pages leave, some of these sequences' at a time."""
        layer = data.draw(st.integers(0, self.layers - 1))
        for _ in range(rounds):
            self.step(data.draw(st.randoms()))
            while self.copies and data.draw(st.sampled_from([True, True, True, False])):
                self.one_copy_ends(data, ok=True)
            self.park_some(data, layer)

    def park_some(self, data, layer: int) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.open_)), unique=True, min_size=1))
        ends = [min(self.written[s], int(self.sent[s, layer]) + data.draw(st.sampled_from([1, 2, 0]))) for s in slots]
        leaving = [(s, e) for s, e in zip(slots, ends, strict=True) if s not in self.arriving]
        total = sum(max(0, e - int(self.sent[s, layer])) for s, e in leaving)
        args = layer, slots, [self.open_[s][0] for s in slots], ends
        if total > self.host_room():
            return self.refuses(self.store.park, *args)
        assert self.store.park(*args) == total
        for slot, end in leaving:
            self.sent[slot, layer] = max(end, self.sent[slot, layer])
        self.seen["parked"] += total > 0

    @precondition(lambda self: any(self.sent[slot].any() for slot in self.open_))
    @rule(data=st.data())
    def bring_home(self, data):
        places = [(s, i) for s in sorted(self.open_) for i in range(self.layers) if self.sent[s, i]]
        slot, layer = data.draw(st.sampled_from(places))
        parked = int(self.store.parked[slot, layer, 1])
        if parked < self.sent[slot, layer] or slot in self.due or self.waits(slot):
            with pytest.raises(RuntimeError, match="still leaving"):
                self.store.bring_home(slot, layer)
        elif not self.store.pool.fits(parked * np.eye(self.layers, dtype=int)[layer]):
            self.refuses(self.store.bring_home, slot, layer)
        else:
            self.store.bring_home(slot, layer)
            self.sent[slot, layer], self.away[slot][layer] = 0, False
            if not self.away[slot].any():
                self.chunked.discard(slot)
            self.arriving.add(slot)
            self.seen["came home"] += 1

    def lose(self, owner, copy):
        super().lose(owner, copy)
        self.seen["lost on the way"] += copy.block in self.awaited

    def on_device(self, slot):
        on_device = np.ones_like(super().on_device(slot))
        for layer, (a, b) in enumerate(self.store.parked[slot].tolist()):
            assert a == 0 and b <= self.sent[slot, layer]
            on_device[layer, a:b] = False
        return on_device

    def streamed(self):
        slots = self.computed()
        assert [slot for slot in sorted(self.open_) if self.store.ready(np.array(slot))] == slots
        found = {s: np.zeros((self.layers, self.pages_of(self.open_[s][1])), MARK) for s in slots}
        under_way = {copy.layer for copy in self.copies if copy.out and copy.block in self.regathers}
        for stream in self.store.streams(np.array(slots, np.int32)):
            transient = np.zeros(self.store.transient_pages, MARK)
            for move in stream.fetches:
                assert move.block in self.landed and move.layer == stream.layer
                wanted = move.pages >= 0
                transient[move.pages[wanted]] = self.blocks[move.block][wanted]
                self.begin(move)
            written = set()
            for slot, a, b, start in stream.rows.tolist():
                found[slot][stream.layer, a:b] = transient[start : start + b - a]
                if slot in self.due and self.away[slot][stream.layer]:
                    first, owner = self.due[slot], self.open_[slot][0]
                    transient[start - a + first : start - a + b] = self.marks(owner, b)[stream.layer, first:]
                    written.add(owner)
            self.sends(stream, transient, written, stream.layer in under_way)
        self.due.clear()
        return found

    def sends(self, stream, transient, written: set[int], under_way: bool) -> None:
        """What was written for the host leaves in one block. Otherwise all is regathered, exactly when many blocks were
        fetched, no regathered block is on its way and there is room."""
        move, many = next(iter(stream.sends), None), len(stream.fetches) > self.limit
        if move is None:
            total = int((stream.rows[:, 2] - stream.rows[:, 1]).sum())
            assert not written and (not many or under_way or total > super().host_room())
            return
        assert len(stream.sends) == 1 and move.out and move.transient and move.layer == stream.layer
        assert written or (many and not under_way)
        self.blocks[move.block] = transient[move.pages]
        if written:
            owners = self.blocks[move.block]["owner"]
            assert {*owners.tolist()} == written == {*self.host.blocks[move.block].owners}
            self.awaited[move.block] = written
            self.seen["written for the host"] += 1
        else:
            self.regathers.add(move.block)
            self.seen["regathered"] += 1
        self.begin(move)


class StagedParkingMachine(ParkingMachine):
    """Over the pools of two stages."""

    def make_store(self, chunk, layers, size, host):
        return ParkingStore(staged_pool(chunk, layers), SLOTS, size, PAGES * size, host, SLOTS * PAGES)


KINDS = pytest.mark.parametrize("kind", [ParkingMachine, StagedParkingMachine], ids=["one", "staged"])
OFTEN = ("regathered", "parked", "came home", "written for the host")
RARE = ("extended", "lost on the way")  # by few examples perhaps never


def run(kind, **options) -> Counter:
    """Runs a machine and returns what happened how often."""
    machine = type("Machine", (kind,), {"seen": Counter()})
    quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}  # a busy machine is no failure
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=50, **quiet, **options))
    return machine.seen


@KINDS
def test_any_order_of_everything(kind):
    """With most in it that this machine adds. (Examples depend on what other tests have imported.)"""
    seen = run(kind, max_examples=120, derandomize=True)
    assert all(seen[what] for what in OFTEN), seen


@pytest.mark.long
@KINDS
def test_any_order_of_everything_at_length(kind):
    """The same, over many more examples, other ones each time."""
    seen = run(kind, max_examples=2000)
    assert all(seen[what] >= 20 for what in (*OFTEN, *RARE)), seen


def regather_of(stream):
    """What a stream regathers, if anything."""
    return next(iter(stream.sends), None)


def in_pieces(num_pieces: int, host_pages: int = 100, others: int = 0) -> ParkingStore:
    """A sequence "a" of 40 pages in one layer, the first of them parked one by one, all landed; and so many others with
    one page parked each."""
    store = ParkingStore(PagePool(64, 1), 4, 16, 640, HostTier(host_pages), transient_pages=64)
    store.open(640)
    for end in range(1, num_pieces + 1):
        store.park(0, [0], ["a"], [end])
    for name in "bcd"[:others]:
        slot = store.open(32)
        store.park(0, [slot], [name], [1])
    for move in store.take_moves():
        ended(store, move)
    return store


def ended(store: ParkingStore, move, ok: bool = True) -> list[str]:
    """A copy of one layer ends."""
    return store.copied(Copy(move.out, move.block, 0, ok, 0, 0.0, 0.0, move.owners, move.transient))


def stream(store: ParkingStore, slots=(0,)):
    """The stream of a step over these slots, its fetches done."""
    (found,) = store.streams(np.array(slots, np.int32))
    for move in found.fetches:
        ended(store, move)
    store.check()
    return found


@pytest.mark.parametrize("num_pieces, others, regathered", [(8, 0, False), (9, 0, True), (5, 3, False), (6, 3, True)])
def test_more_than_eight_blocks_are_put_together(num_pieces, others, regathered):
    """However many sequences they belong to. Once the new block has landed, the layer is one fetch, and the pieces are
    gone: the host holds each page once again."""
    assert MAX_BLOCKS_PER_FETCH == 8
    store, slots = in_pieces(num_pieces, others=others), range(1 + others)
    held, first = store.num_host_pages, stream(store, slots)
    assert len(first.fetches) == num_pieces + others and (regather_of(first) is not None) == regathered
    if not regathered:
        return
    assert regather_of(first).pages.tolist() == list(range(num_pieces + others))
    assert store.num_host_pages == 2 * held
    again = stream(store, slots)
    assert len(again.fetches) == num_pieces + others and regather_of(again) is None, "one at a time"
    assert ended(store, regather_of(first)) == []
    store.check()
    assert store.num_host_pages == held and len(store.take_freed_blocks()) == num_pieces + others
    (fetch,) = stream(store, slots).fetches
    assert fetch.block == regather_of(first).block and fetch.pages.tolist() == list(range(num_pieces + others))


def test_pieces_that_leave_meanwhile_come_after_the_new_block():
    """A layer goes on leaving while it is regathered."""
    store = in_pieces(9)
    regather = regather_of(stream(store))
    store.park(0, [0], ["a"], [11])
    (late,) = store.take_moves()
    ended(store, regather)
    assert [(e.start, e.end) for e in store.tier.extents("a", 0)] == [(0, 9), (9, 11)]
    assert len(stream(store).fetches) == 1
    ended(store, late)
    assert [move.block for move in stream(store).fetches] == [regather.block, late.block]


def test_a_regather_that_fails_loses_nothing():
    """The pieces stay, and the next step tries again."""
    store = in_pieces(9)
    regather, held = regather_of(stream(store)), store.num_host_pages
    assert ended(store, regather, ok=False) == []
    store.check()
    assert store.num_host_pages == held - 9 and store.take_freed_blocks() == (regather.block,)
    again = stream(store)
    assert len(again.fetches) == 9 and regather_of(again) is not None


def test_without_room_on_the_host_the_pieces_stay():
    """The cap holds: 9 pages are there, 9 more must fit."""
    assert regather_of(stream(in_pieces(9, host_pages=17))) is None
    assert regather_of(stream(in_pieces(9, host_pages=18))) is not None


@pytest.mark.parametrize("end", ["close", "bring_home", "swap_out"])
def test_a_sequence_that_goes_takes_its_share_of_a_regather_with_it(end):
    """Its pages in the block under way are nobody's; those of the other sequence stay."""
    store = in_pieces(8, others=1)
    regather = regather_of(stream(store, (0, 1)))
    if end == "close":
        store.close(0)
    elif end == "bring_home":
        store.bring_home(0, 0)
    else:
        store.swap_out(0, "a")
    for move in store.take_moves():
        ended(store, move)
    store.check()
    ended(store, regather)
    store.check()
    assert [e.block for e in store.tier.extents("b", 0)] == [regather.block]
    if end == "swap_out":
        assert [e.start for e in store.tier.extents("a", 0)] == [0, 8]
        slot = store.swap_in("a", 640)
        moves = [move for move in store.take_moves() if not move.out]
        assert len(moves) == 2 and sorted(p for m in moves for p in m.pages if p >= 0) == sorted(
            store.pages(slot)[0].tolist()
        )
    else:
        assert not store.tier.holds("a")
    store.close(1)
    assert not store.tier.holds("b")


def test_a_name_used_again_is_another_sequence():
    """ "a" ends while its pages are regathered, and a new "a" is parked before the copy lands."""
    store = in_pieces(9)
    regather = regather_of(stream(store))
    store.close(0)
    slot = store.open(64)
    store.park(0, [slot], ["a"], [2])
    (move,) = store.take_moves()
    ended(store, regather)
    ended(store, move)
    assert [e.block for e in store.tier.extents("a", 0)] == [move.block] and store.num_host_pages == 2
    with pytest.raises(OutOfPages):
        store.tier.regather(0, [("a", 0, 99)])
    store.check()
