"""A pool for each stage of a pipeline behind the interface of one: a sequence fits when every stage has its pages.

Stages own neighbouring layers. Page ids run through the pools one after another, behind one reserved chunk, so that a
store, a page table and an arena know nothing of stages. No JAX here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engine.config import cdiv
from engine.errors import OutOfPages
from engine.memory.pages import PagePool


class StagedPool:
    """What `PagePool` is to a store, over the pools of stages; a layer finds pages in its own stage's only."""

    def __init__(self, pools: Sequence[PagePool]):
        """`pools`, of as many pages per chunk, in the order of their layers."""
        self.pools = tuple(pools)
        self.pages_per_chunk = pools[0].pages_per_chunk  # C
        assert all(pool.pages_per_chunk == self.pages_per_chunk for pool in pools)
        self.num_layers = sum(pool.num_layers for pool in pools)  # L
        self.num_chunks = sum(pool.num_chunks for pool in pools)
        self.num_pages = self.num_chunks * self.pages_per_chunk
        self.arena_pages = self.num_pages + self.pages_per_chunk  # P: one reserved chunk serves all stages
        sizes = [pool.num_pages for pool in pools]
        self._offsets = np.cumsum([0, *sizes[:-1]]).astype(np.int32)  # from a pool's ids to these
        self._first_layers = np.cumsum([pool.num_layers for pool in pools])[:-1]  # of all stages but the first

    @property
    def num_free(self) -> int:
        """Pages no sequence maps, over all layers."""
        return sum(pool.num_free for pool in self.pools)

    @property
    def refcount(self) -> np.ndarray:
        """Owners of each page, int32 [P], 0 = free. Made from scratch: for tests and debug mode."""
        return self.owners(np.arange(self.arena_pages))

    @property
    def owner(self) -> np.ndarray:
        """Layer of each chunk, int32 [chunks + 1], -1 = free; kept only when C > 1."""
        owners, layer = [self.pools[0].owner[:1]], 0
        for pool in self.pools:
            owners.append(np.where(pool.owner[1:] < 0, -1, pool.owner[1:] + layer))
            layer += pool.num_layers
        return np.concatenate(owners).astype(np.int32)

    def owners(self, ids: np.ndarray) -> np.ndarray:
        """Owners of these pages, int32 [n]."""
        counts = np.zeros(len(ids), np.int32)
        for pool, offset, mine in self._by_stage(ids):
            counts[mine] = pool.owners(ids[mine] - offset)
        return counts

    def can_ever_fit(self, count: int) -> bool:
        """Whether `count` pages of every layer fit when all stages are empty."""
        return all(pool.can_ever_fit(count) for pool in self.pools)

    def fits(self, counts: np.ndarray | int, reserve: int = 0) -> bool:
        """See `PagePool`. Of `reserve`, each stage leaves its layers' share."""
        shares = [cdiv(reserve * pool.num_layers, self.num_layers) for pool in self.pools]
        return all(map(PagePool.fits, self.pools, self._split(counts), shares))

    def allocate(self, counts: np.ndarray | int) -> np.ndarray:
        """See `PagePool`; all stages or none.

        Raises:
          OutOfPages: a stage has not enough; nothing was taken.
        """
        parts = self._split(counts)
        for stage, (pool, part) in enumerate(zip(self.pools, parts, strict=True)):
            if not pool.fits(part):
                raise OutOfPages(f"stage {stage} has {pool.num_free} free pages, not enough for the step")
        taken = zip(self.pools, parts, self._offsets, strict=True)
        return np.concatenate([pool.allocate(part) + offset for pool, part, offset in taken])

    def share(self, ids: np.ndarray) -> None:
        """Adds one owner to each live page. Raises RuntimeError when one of them is free."""
        free = self.owners(ids) == 0
        if free.any():
            raise RuntimeError(f"page {int(ids[free][0])} is shared but free")
        for pool, offset, mine in self._by_stage(ids):
            pool.share(ids[mine] - offset)

    def free(self, ids: np.ndarray) -> np.ndarray:
        """See `PagePool`.

        Raises:
          RuntimeError: a double free, in any stage; nothing was changed.
        """
        pages, drops = np.unique(ids, return_counts=True)
        wrong = drops > self.owners(pages)
        if wrong.any():
            raise RuntimeError(f"double free of page {int(pages[wrong][0])}")
        freed = [pool.free(ids[mine] - offset) + offset for pool, offset, mine in self._by_stage(ids)]
        return np.concatenate(freed) if freed else ids

    def check(self) -> None:
        """Asserts every invariant of every stage's pool (debug mode and tests)."""
        for pool in self.pools:
            pool.check()

    def _split(self, counts: np.ndarray | int) -> Sequence[np.ndarray | int]:
        """Pages of every layer, or of each one, stage by stage."""
        if isinstance(counts, np.ndarray):
            return np.split(counts, self._first_layers)
        return [counts] * len(self.pools)

    def _by_stage(self, ids: np.ndarray) -> Iterator[tuple[PagePool, np.int32, np.ndarray]]:
        """Each pool that has some of `ids`, its offset, and which ones, bool [n]; the reserved chunk is the first's."""
        stage = np.searchsorted(self._offsets, ids - self.pages_per_chunk, side="right") - 1
        for s, (pool, offset) in enumerate(zip(self.pools, self._offsets, strict=True)):
            mine = np.maximum(stage, 0) == s
            if mine.any():
                yield pool, offset, mine


Pool = PagePool | StagedPool
