"""Chunks and pages of the device tier: who owns what, and what fits.

A **page** is `page_size` tokens of one layer (K and V), the unit of mapping. A **chunk** is `pages_per_chunk`
neighbouring pages, the unit of ownership: it is bound to one layer while any of its pages is live, and free chunks are
global. So any layer can use any memory, while each layer's KV stays physically dense (ours; the chunk is vTensor's
physical chunk). With one page per chunk nothing need be bound: every free page serves every layer.

Costs, in pages: allocating writes nothing when C = 1 and one bit when C > 1; the reference count of a page is 1 unless
it is shared, so only what is shared is counted. Everything is vectorised over layers. No JAX here.
"""

from __future__ import annotations

import numpy as np

from engine.config import cdiv
from engine.memory.free_set import FreeSet


class PagePool:
    """Allocates pages of all layers, counts references, frees.

    Page ids run over the whole arena; the first chunk is reserved (page 0 is the zero page that padding points to).
    """

    def __init__(self, num_pages: int, num_layers: int, pages_per_chunk: int = 1):
        """`num_pages` usable pages over all layers, rounded down to whole chunks."""
        self.num_layers = num_layers  # L
        self.pages_per_chunk = pages_per_chunk  # C
        self.num_chunks = num_pages // pages_per_chunk
        self.num_pages = self.num_chunks * pages_per_chunk
        self.arena_pages = self.num_pages + pages_per_chunk  # P: the reserved chunk included
        self._free_chunks = FreeSet(self.num_chunks)
        self._extra = np.zeros(self.arena_pages, np.int32)  # [P] owners of a page beyond its first
        self._num_extra = 0  # the sum of them
        # The rest is kept only when C > 1.
        self.owner = np.full(self.num_chunks + 1, -1, np.int32)  # layer of each chunk, -1 = free
        self._live = np.zeros((self.num_chunks + 1, pages_per_chunk), bool)  # pages with an owner
        self._partial = np.zeros(self.num_chunks + 1, bool)  # owned chunks with free pages
        self._own_free = np.zeros(num_layers, np.int64)  # [L] free pages in chunks a layer owns

    @property
    def num_free(self) -> int:
        """Pages no sequence maps, over all layers."""
        free = len(self._free_chunks) * self.pages_per_chunk
        return free if self.pages_per_chunk == 1 else free + int(self._own_free.sum())

    @property
    def refcount(self) -> np.ndarray:
        """Owners of each page, int32 [P], 0 = free. Made from scratch: for tests and debug mode."""
        return self.owners(np.arange(self.arena_pages))

    def owners(self, ids: np.ndarray) -> np.ndarray:
        """Owners of these pages, int32 [n]."""
        return self._is_live(ids) + self._extra[ids]

    def _is_live(self, ids: np.ndarray) -> np.ndarray:
        return ~self._free_chunks.contains(ids) if self.pages_per_chunk == 1 else self._live.reshape(-1)[ids]

    def _new_chunks(self, counts: np.ndarray | int) -> int:
        """Free chunks that `counts` pages take: the sum over layers of ceil((need - free in own chunks) / C)."""
        if self.pages_per_chunk == 1:
            return int(counts.sum()) if isinstance(counts, np.ndarray) else counts * self.num_layers
        lacking = np.maximum(counts - self._own_free, 0)
        return int((-(-lacking // self.pages_per_chunk)).sum())

    def can_ever_fit(self, count: int) -> bool:
        """Whether `count` pages of every layer fit an empty pool."""
        return cdiv(count, self.pages_per_chunk) * self.num_layers <= self.num_chunks

    def fits(self, counts: np.ndarray | int, reserve: int = 0) -> bool:
        """Whether `counts` pages of every layer (or `counts[l]` of layer l) can be allocated with `reserve` pages
        left over. The one test of what fits; no policy does its own arithmetic."""
        return self._new_chunks(counts) + cdiv(reserve, self.pages_per_chunk) <= len(self._free_chunks)

    def allocate(self, counts: np.ndarray | int) -> np.ndarray:
        """Takes `counts[l]` pages for each layer l (an int: as many for every layer), fullest chunks first.

        Returns page ids, int32 [sum(counts)], layer after layer; each has one owner.

        Raises:
          OutOfPages: they do not fit; nothing was taken.
        """
        chunks = self._free_chunks.take(self._new_chunks(counts))
        if self.pages_per_chunk == 1:
            return chunks
        counts = np.broadcast_to(np.asarray(counts, np.int64), (self.num_layers,))
        own = np.minimum(counts, self._own_free)  # from chunks that the layers have already
        if len(chunks) == 0:
            return self._take_from_own(own)
        if not own.any():
            return self._take_from_new(counts, chunks)
        ids = np.concatenate([self._take_from_own(own), self._take_from_new(counts - own, chunks)])
        layer = np.repeat(np.tile(np.arange(self.num_layers), 2), np.concatenate([own, counts - own]))
        return ids[np.argsort(layer, kind="stable")]

    def _take_from_own(self, counts: np.ndarray) -> np.ndarray:
        """Pages out of chunks that the layers own already, fullest first. counts [L] -> ids, layer after layer."""
        c = self.pages_per_chunk
        chunks = np.flatnonzero(self._partial)
        free = c - self._live[chunks].sum(1)
        order = np.argsort(self.owner[chunks] * (c + 1) + free, kind="stable")  # by layer, then by free pages
        chunks, free = chunks[order], free[order]
        layer = self.owner[chunks]
        ahead = np.cumsum(free) - free  # free pages in chunks ahead, all layers
        first = np.searchsorted(layer, np.arange(self.num_layers))  # of each layer
        ahead -= ahead[first[layer]]
        take = np.clip(counts[layer] - ahead, 0, free)
        is_free = ~self._live[chunks]
        row, column = np.nonzero(is_free & (np.cumsum(is_free, 1) <= take[:, None]))
        self._live[chunks[row], column] = True
        self._partial[chunks] = take < free
        self._own_free -= counts
        return (chunks[row] * c + column).astype(np.int32)

    def _take_from_new(self, counts: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        """Pages out of `chunks`, just taken, layer after layer: whole ones, but for the last of each layer."""
        c = self.pages_per_chunk
        new = -(-counts // c)  # [L] chunks
        self.owner[chunks] = np.repeat(np.arange(self.num_layers), new)
        left = new * c - counts  # [L] pages that stay free in a layer's last chunk
        last = np.cumsum(new)[left > 0] - 1
        wanted = np.ones((len(chunks), c), bool)
        wanted[last] = np.arange(c) < c - left[left > 0, None]
        self._live[chunks] = wanted
        self._partial[chunks[last]] = True
        self._own_free += left
        ids = chunks[:, None] * np.int32(c) + np.arange(c, dtype=np.int32)
        return ids[wanted] if len(last) else ids.reshape(-1)

    def share(self, ids: np.ndarray) -> None:
        """Adds one owner to each live page. Raises RuntimeError when one of them is free."""
        free = ~self._is_live(ids)
        if free.any():
            raise RuntimeError(f"page {int(ids[free][0])} is shared but free")
        np.add.at(self._extra, ids, 1)
        self._num_extra += len(ids)

    def free(self, ids: np.ndarray) -> np.ndarray:
        """Drops one owner of each page; a page without owners is free at once. Returns the ids that became free.

        Raises:
          RuntimeError: a double free; nothing was changed.
        """
        if self._num_extra == 0:
            self._release(ids)
            return ids
        shared = self._extra[ids] > 0
        pages, drops = np.unique(ids[shared], return_counts=True)
        left = self._extra[pages] + 1 - drops  # owners
        if (left < 0).any():
            raise RuntimeError(f"double free of page {int(pages[left < 0][0])}")
        last = np.concatenate([ids[~shared], pages[left == 0]])
        self._release(last)
        self._extra[pages] = np.maximum(left - 1, 0)
        self._num_extra -= int(drops.sum() - (left == 0).sum())
        return last

    def _release(self, ids: np.ndarray) -> None:
        """Frees pages with one owner. Raises RuntimeError as `free` does."""
        c = self.pages_per_chunk
        if c == 1:
            return self._free_chunks.put(ids)
        ids = np.sort(ids)
        wrong = ~self._is_live(ids)
        wrong[1:] |= ids[1:] == ids[:-1]
        if wrong.any():
            raise RuntimeError(f"double free of page {int(ids[wrong][0])}")
        self._live.reshape(-1)[ids] = False
        chunk = ids // c
        self._own_free += np.bincount(self.owner[chunk], minlength=self.num_layers)
        chunks = chunk[np.diff(chunk, prepend=-1) > 0]
        empty = ~self._live[chunks].any(1)
        self._partial[chunks] = ~empty
        chunks = chunks[empty]
        self._own_free -= c * np.bincount(self.owner[chunks], minlength=self.num_layers)
        self.owner[chunks] = -1
        self._free_chunks.put(chunks)

    def check(self) -> None:
        """Asserts every invariant of the pool from scratch (debug mode and tests)."""
        c, refcount = self.pages_per_chunk, self.refcount
        live = self._is_live(np.arange(self.arena_pages)).reshape(-1, c)
        self._free_chunks.check()
        assert (self._extra >= 0).all() and self._extra.sum() == self._num_extra, "extra owners are miscounted"
        assert ((refcount > 0).reshape(-1, c) == live).all(), "a free page has owners"
        assert not live[0].any(), "the reserved chunk is in use"
        is_free = self._free_chunks.contains(np.arange(self.num_chunks + 1))
        assert (live.any(1) != is_free).all(), "a chunk is neither free nor in use"
        if c > 1:
            free = c - live.sum(1)
            assert ((self.owner < 0) == is_free).all(), "owned chunks and live pages disagree"
            assert (self._partial == (~is_free & (free > 0))).all(), "partial chunks are mislabelled"
            own_free = np.bincount(self.owner[~is_free], free[~is_free], self.num_layers)
            assert (self._own_free == own_free).all(), "free pages of a layer are miscounted"
        assert self.num_free + int(live.sum()) == self.num_pages, "pages leaked"
