"""Chunks and pages against a naive model: nothing lost, nothing twice, and exactly what fits is given."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import OutOfPages
from engine.memory.pages import PagePool


def fits_by_hand(pool: PagePool, counts: list[int]) -> bool:
    """DESIGN's rule, from the reference counts alone: sum over layers of ceil((need - free in own chunks) / C)."""
    c, free_chunks, own_free, refcount = pool.pages_per_chunk, 0, [0] * pool.num_layers, pool.refcount
    for chunk in range(1, pool.num_chunks + 1):
        free = sum(int(refcount[chunk * c + i] == 0) for i in range(c))
        if free == c:
            free_chunks += 1
        else:
            own_free[int(pool.owner[chunk])] += free
    return sum(-(-max(0, n - f) // c) for n, f in zip(counts, own_free, strict=True)) <= free_chunks


class PoolMachine(RuleBasedStateMachine):
    """Random allocate / share / free of ragged and uniform demands, checked after every operation."""

    @initialize(chunk=st.sampled_from([1, 4, 32]), layers=st.integers(1, 5), chunks=st.integers(1, 24))
    def make(self, chunk, layers, chunks):
        self.pool = PagePool(chunk * chunks + chunk // 2, layers, chunk)
        self.layers, self.chunk = layers, chunk
        self.owners: list[np.ndarray] = []  # one entry per reference held

    @rule(data=st.data())
    def allocate(self, data):
        counts = data.draw(st.lists(st.integers(0, 2 * self.chunk), min_size=self.layers, max_size=self.layers))
        demand = np.array(counts)
        if data.draw(st.booleans()):
            demand = data.draw(st.integers(0, 2 * self.chunk) | st.integers(1, 2))  # an int: as many for every layer
            counts = [demand] * self.layers
        before = self.pool.num_free
        expected = fits_by_hand(self.pool, counts)
        assert self.pool.fits(demand) == expected
        live = {int(i) for ids in self.owners for i in ids}
        if not expected:
            with pytest.raises(OutOfPages):
                self.pool.allocate(demand)
            assert self.pool.num_free == before
            return
        ids = self.pool.allocate(demand)
        assert len(ids) == sum(counts) == len(set(ids.tolist())) and not live & set(ids.tolist())
        assert (ids >= self.chunk).all(), "a reserved page was given out"
        if self.chunk > 1:
            layer_of = np.repeat(np.arange(self.layers), counts)
            assert (self.pool.owner[ids // self.chunk] == layer_of).all()
        self.owners.append(ids)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def share(self, data):
        ids = data.draw(st.sampled_from(self.owners))
        self.pool.share(ids)
        self.owners.append(ids)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data):
        ids = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        cut = data.draw(st.integers(0, len(ids)))  # in two parts, as a truncated sequence would
        left = {int(i) for other in self.owners for i in other}
        freed = np.concatenate([self.pool.free(ids[:cut]), self.pool.free(ids[cut:])])
        assert set(freed.tolist()) == set(ids.tolist()) - left

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free_several_at_once(self, data):
        """Some references, the same page maybe more than once, in one call."""
        parts = [self.owners.pop() for _ in range(data.draw(st.integers(1, len(self.owners))))]
        left = {int(i) for other in self.owners for i in other}
        ids = np.concatenate(parts)
        assert sorted(self.pool.free(ids).tolist()) == sorted(set(ids.tolist()) - left)

    @precondition(lambda self: self.owners and len(self.owners[-1]) > 0)
    @rule()
    def double_free_raises_and_changes_nothing(self):
        ids = self.owners.pop()
        owners = int(self.pool.refcount[ids[0]])
        self.pool.free(ids)
        before = self.pool.refcount.copy()
        with pytest.raises(RuntimeError, match="double free"):
            self.pool.free(np.repeat(ids[:1], owners))  # one more than there are
        assert (self.pool.refcount == before).all()

    @rule(data=st.data())
    def a_wrong_free_raises_and_changes_nothing(self, data):
        """Live pages, each as often as it has owners, and among them one once more: live, free or reserved."""
        before = self.pool.refcount
        page = data.draw(st.integers(0, self.pool.arena_pages - 1))
        others = data.draw(st.sampled_from(self.owners)) if self.owners else np.empty(0, np.int32)
        ids = np.concatenate([others[others != page], np.full(before[page] + 1, page)]).astype(np.int32)
        with pytest.raises(RuntimeError, match=f"double free of page {page}$"):
            self.pool.free(data.draw(st.permutations(ids.tolist()).map(lambda ids: np.array(ids, np.int32))))
        assert (self.pool.refcount == before).all()

    @rule(data=st.data())
    def sharing_a_free_page_raises_and_changes_nothing(self, data):
        before = self.pool.refcount
        page = data.draw(st.sampled_from(np.flatnonzero(before == 0).tolist()))
        others = data.draw(st.sampled_from(self.owners)) if self.owners else np.empty(0, np.int32)
        with pytest.raises(RuntimeError, match=f"page {page} is shared but free"):
            self.pool.share(np.append(others, page))
        assert (self.pool.refcount == before).all()

    @invariant()
    def conserved(self):
        if hasattr(self, "pool"):
            self.pool.check()
            count = np.zeros_like(self.pool.refcount)
            for ids in self.owners:
                np.add.at(count, ids, 1)
            assert (count == self.pool.refcount).all()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_fullest_chunk_is_used_first():
    """Two chunks of one layer, 3 and 1 pages free: the next page comes from the fuller one, so the other can drain."""
    pool = PagePool(12, 1, 4)
    ids = pool.allocate(8)
    pool.free(ids[[1, 2, 3, 7]])  # chunk of ids[0]: 3 free, chunk of ids[4]: 1 free
    assert pool.allocate(1).tolist() == [ids[7]]


def test_a_layer_gets_no_page_of_a_chunk_that_another_owns():
    """One chunk, two layers: the first page binds it to layer 0, so layer 1 finds nothing although 3 pages are free."""
    pool = PagePool(4, 2, 4)
    page = pool.allocate(np.array([1, 0]))
    assert not pool.fits(np.array([0, 1])) and pool.fits(np.array([3, 0]))
    pool.free(page)
    assert pool.fits(np.array([0, 1])), "an emptied chunk is global again"


def test_sharing_a_free_page_raises():
    """A page without owners cannot get a second one."""
    pool = PagePool(4, 1)
    ids = pool.allocate(1)
    pool.free(ids)
    with pytest.raises(RuntimeError, match="free"):
        pool.share(ids)


def test_reserve_counts_in_pages():
    """`reserve` is what must be left over: 10 pages, 6 wanted, 4 kept fit; 5 kept do not."""
    pool = PagePool(10, 2)
    assert pool.fits(3, reserve=4) and not pool.fits(3, reserve=5)


@pytest.mark.parametrize("chunk", [1, 4])
def test_all_owners_of_a_shared_page_can_leave_in_one_call(chunk):
    """Three owners of one page and one of another, freed together: both pages are free, and nothing stays counted."""
    pool = PagePool(4, 1, chunk)
    ids = pool.allocate(2)
    pool.share(np.repeat(ids[:1], 2))
    assert sorted(pool.free(ids[[0, 1, 0, 0]]).tolist()) == sorted(ids.tolist())
    pool.check()
    assert pool.num_free == 4


@pytest.mark.parametrize("growth", [1, 3])
def test_small_growth_takes_what_bulk_allocation_would(growth):
    """Pages laid ready are a shortcut, not another order: a pool that grows by an int and one that grows by an array
    (which never uses the shortcut) fill the same chunks, through frees of any kind in between, until both are full."""
    layers, c, rng = 3, 16, np.random.default_rng(growth)
    pools = [PagePool(40 * growth * layers, layers, c) for _ in range(2)]
    held: list[list[np.ndarray]] = []
    refused = 0
    for step in range(400):
        if step % 23 == 22:
            drop = rng.permutation(len(held))[: len(held) // 2]
            for i in range(2):
                pools[i].free(np.concatenate([held[j][i] for j in drop]))
            held = [h for j, h in enumerate(held) if j not in drop]
        fit = pools[0].fits(growth)
        assert fit == pools[1].fits(np.full(layers, growth))
        refused += not fit
        if fit:
            held.append([pools[0].allocate(growth), pools[1].allocate(np.full(layers, growth))])
            assert (held[-1][0] // c == held[-1][1] // c).all()
        for pool in pools:
            pool.check()
    assert 10 < refused < 200
