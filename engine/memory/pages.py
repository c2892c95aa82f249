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

SMALL = 4  # growth of up to a quarter of a chunk takes what lies ready


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
        self._partial = np.zeros(self.num_chunks + 1, bool)  # owned chunks with free pages, and some that are full
        self._own_free = np.zeros(num_layers, np.int64)  # [L] free pages in chunks a layer owns
        # Growth comes often, frees and full chunks seldom: the free pages of the fullest chunks are laid ready once.
        self._stack = np.zeros(num_layers * pages_per_chunk, np.int32)  # [L * C] of each layer's fullest chunk
        self._next = np.zeros(num_layers, np.intp)  # [L] where each layer's next page lies in it
        self._ready = 0  # pages of every layer that can be taken there

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
        if isinstance(counts, int) and 0 < counts <= self.pages_per_chunk // SMALL and self._make_ready(counts):
            return self._take_ready(counts)
        chunks = self._free_chunks.take(self._new_chunks(counts))
        if self.pages_per_chunk == 1:
            return chunks
        self._ready = 0
        counts = np.broadcast_to(np.asarray(counts, np.int64), (self.num_layers,))
        own = np.minimum(counts, self._own_free)  # from chunks that the layers have already
        if len(chunks) == 0:
            return self._take_from_own(own)
        if not own.any():
            return self._take_from_new(counts, chunks)
        ids = np.concatenate([self._take_from_own(own), self._take_from_new(counts - own, chunks)])
        layer = np.repeat(np.tile(np.arange(self.num_layers), 2), np.concatenate([own, counts - own]))
        return ids[np.argsort(layer, kind="stable")]

    def _make_ready(self, count: int) -> bool:
        """Lays `count` pages of every layer ready, out of its fullest chunk: True, and the caller takes them at once.
        False when some layers have such a chunk and others have none, or too full a one."""
        if self._ready >= count:
            return True
        self._ready = 0
        if self._own_free.all():
            chunks, layer, free = self._own_chunks()
            fullest = np.flatnonzero(np.diff(layer, prepend=-1))
            chunks, ready = chunks[fullest], int(free[fullest].min())
            if ready < count:
                return False
            column = np.argsort(self._live[chunks], 1, kind="stable")  # free pages come first
        elif not self._own_free.any() and len(self._free_chunks) >= self.num_layers:
            chunks, ready = self._free_chunks.take(self.num_layers), self.pages_per_chunk
            column = np.arange(ready)
            self.owner[chunks] = np.arange(self.num_layers)
            self._partial[chunks] = True
            self._own_free += ready
        else:
            return False
        self._stack = (chunks[:, None] * np.int32(self.pages_per_chunk) + column.astype(np.int32)).reshape(-1)
        self._next = np.arange(self.num_layers) * self.pages_per_chunk
        self._ready = ready
        return True

    def _take_ready(self, count: int) -> np.ndarray:
        """`count` pages of every layer that lie ready, in a few vector operations over L."""
        ids = self._stack[self._next if count == 1 else (self._next[:, None] + np.arange(count)).reshape(-1)]
        self._next += count
        self._ready -= count
        self._live.reshape(-1)[ids] = True
        self._own_free -= count
        return ids

    def _own_chunks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Owned chunks with free pages, their layers and how many are free: layer after layer, fullest first."""
        chunks = np.flatnonzero(self._partial)
        free = self.pages_per_chunk - self._live[chunks].sum(1)
        full = free == 0
        if full.any():  # since pages that lay ready were taken
            self._partial[chunks[full]] = False
            chunks, free = chunks[~full], free[~full]
        order = np.argsort(self.owner[chunks] * (self.pages_per_chunk + 1) + free, kind="stable")
        return chunks[order], self.owner[chunks[order]], free[order]

    def _take_from_own(self, counts: np.ndarray) -> np.ndarray:
        """Pages out of chunks that the layers own already, fullest first. counts [L] -> ids, layer after layer."""
        c = self.pages_per_chunk
        chunks, layer, free = self._own_chunks()
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
        self._ready = 0  # another chunk may be the fullest now
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
            assert not self._partial[is_free].any(), "a free chunk is labelled partial"
            assert self._partial[~is_free & (free > 0)].all(), "a chunk with free pages is not labelled partial"
            ahead = self._stack[self._next[:, None] + np.arange(self._ready)]
            assert not self._is_live(ahead).any(), "a page that lies ready has an owner"
            layer = np.arange(self.num_layers)[:, None]
            assert (self.owner[ahead // c] == layer).all(), "a page of another layer lies ready"
            own_free = np.bincount(self.owner[~is_free], free[~is_free], self.num_layers)
            assert (self._own_free == own_free).all(), "free pages of a layer are miscounted"
        assert self.num_free + int(live.sum()) == self.num_pages, "pages leaked"
