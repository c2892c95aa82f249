"""Chunks and pages against a naive model: nothing lost, nothing twice, and exactly what fits is given."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import OutOfPages
from engine.memory.pages import PagePool
from engine.memory.staged import StagedPool


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

    max_stages = 1

    @initialize(chunk=st.sampled_from([1, 4, 32]), data=st.data())
    def make(self, chunk, data):
        sizes = st.tuples(st.integers(1, 24), st.integers(1, 5))  # chunks, layers
        stages = data.draw(st.lists(sizes, min_size=1, max_size=self.max_stages))
        self.stages = [PagePool(chunk * chunks + chunk // 2, layers, chunk) for chunks, layers in stages]
        self.pool = self.stages[0] if self.max_stages == 1 else StagedPool(self.stages)
        self.layers, self.chunk = sum(layers for _, layers in stages), chunk
        self.owners: list[np.ndarray] = []  # one entry per reference held

    def fits_by_hand(self, counts):
        """Every stage has what its layers want."""
        ends = np.cumsum([pool.num_layers for pool in self.stages])
        return all(
            fits_by_hand(pool, counts[end - pool.num_layers : end]) for pool, end in zip(self.stages, ends, strict=True)
        )

    @rule(data=st.data())
    def allocate(self, data):
        counts = data.draw(st.lists(st.integers(0, 2 * self.chunk), min_size=self.layers, max_size=self.layers))
        demand = np.array(counts)
        if data.draw(st.booleans()):
            demand = data.draw(st.integers(0, 2 * self.chunk) | st.integers(1, 2))  # an int: as many for every layer
            counts = [demand] * self.layers
        before = self.pool.num_free
        expected = self.fits_by_hand(counts)
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


class StagedMachine(PoolMachine):
    """The same over the pools of up to three stages."""

    max_stages = 3


TestPool, TestStagedPool = PoolMachine.TestCase, StagedMachine.TestCase
TestPool.settings = TestStagedPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


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


def staged(*stages, chunk=1) -> StagedPool:
    """Pools of (pages, layers)."""
    return StagedPool([PagePool(pages, layers, chunk) for pages, layers in stages])


def test_the_fullest_stage_decides_what_fits():
    """Two layers on 20 pages and one on 4: five pages of each layer fail in the second stage, with 10 pages idle in the
    first; four fit, and then the first stage takes 6 more of its own layers."""
    pool = staged((20, 2), (4, 1))
    assert not pool.fits(5) and pool.fits(4) and pool.can_ever_fit(4) and not pool.can_ever_fit(5)
    with pytest.raises(OutOfPages, match="stage 1 has 4 free pages"):
        pool.allocate(5)
    assert pool.num_free == 24, "nothing was taken from the stage that had room"
    ids = pool.allocate(4)
    assert ids.tolist() == [*sorted(ids[:8]), *range(21, 25)] and pool.num_free == 12
    assert not pool.fits(np.array([0, 0, 1])) and pool.fits(np.array([6, 6, 0])) and not pool.fits(np.array([7, 6, 0]))
    pool.free(ids[8:])
    assert pool.fits(np.array([0, 0, 4]))


def test_page_ids_of_stages_are_disjoint_and_have_one_reserved_chunk():
    """Chunks of 4: page ids 4 to 11 are the first stage's, 12 to 15 the second's; the chunks' layers go on counting."""
    pool = staged((8, 2), (5, 1), chunk=4)
    assert (pool.num_pages, pool.arena_pages, pool.num_layers) == (12, 16, 3)
    assert pool.allocate(np.array([1, 4, 2])).tolist() == [4, 8, 9, 10, 11, 12, 13]
    assert pool.owner.tolist() == [-1, 0, 1, 2]


def test_each_stage_keeps_its_layers_share_of_a_reserve():
    """6 pages over 3 layers: 4 in the stage of two layers, 2 in the other."""
    pool = staged((8, 2), (5, 1))
    assert pool.fits(2, reserve=6) and not pool.fits(3, reserve=6)
    pool.allocate(np.array([0, 0, 2]))
    assert not pool.fits(2, reserve=6) and pool.fits(1, reserve=6)


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
