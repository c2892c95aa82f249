"""Chunks and pages of the device tier: who owns what, and what fits.

A **page** is `page_size` tokens of one layer (K and V), the unit of mapping. A **chunk** is `pages_per_chunk`
neighbouring pages, the unit of ownership: it is bound to one layer while any of its pages is live, and free chunks are
global. So any layer can use any memory, while each layer's KV stays physically dense (ours; the chunk is vTensor's
physical chunk).

Everything is vectorised over layers: cost does not multiply by L in Python. No JAX here.
"""

from __future__ import annotations

import numpy as np

from engine.config import cdiv
from engine.errors import OutOfPages


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
        chunks = self.num_chunks + 1  # with the reserved one
        self.refcount = np.zeros(chunks * pages_per_chunk, np.int32)  # [P], 0 = free
        self.owner = np.full(chunks, -1, np.int32)  # layer of each chunk, -1 = free
        self._free_in_chunk = np.full(chunks, pages_per_chunk, np.int32)
        self._partial = np.zeros(chunks, bool)  # owned chunks with free pages
        self._own_free = np.zeros(num_layers, np.int64)  # [L] free pages in chunks a layer owns
        self._stack = np.arange(chunks - 1, 0, -1, dtype=np.int32)  # free chunks, last out first
        self._top = self.num_chunks  # how many of them are there

    @property
    def arena_pages(self) -> int:
        """P: pages of the arena, the reserved chunk included."""
        return len(self.refcount)

    @property
    def num_free(self) -> int:
        """Pages no sequence maps, over all layers."""
        return self._top * self.pages_per_chunk + int(self._own_free.sum())

    def _new_chunks(self, counts: np.ndarray | int) -> np.ndarray:
        """Chunks each layer must take to give `counts` pages: ceil((need - free in own chunks) / C). [L]"""
        lacking = np.maximum(counts - self._own_free, 0)
        return lacking if self.pages_per_chunk == 1 else -(-lacking // self.pages_per_chunk)

    def fits(self, counts: np.ndarray | int, reserve: int = 0) -> bool:
        """Whether `counts` pages of every layer (or `counts[l]` of layer l) can be allocated with `reserve` pages
        left over. The one test of what fits; no policy does its own arithmetic."""
        return int(self._new_chunks(counts).sum()) + cdiv(reserve, self.pages_per_chunk) <= self._top

    def allocate(self, counts: np.ndarray | int) -> np.ndarray:
        """Takes `counts[l]` pages for each layer l (an int: as many for every layer), fullest chunks first.

        Returns page ids, int32 [sum(counts)], layer after layer; each has one owner.

        Raises:
          OutOfPages: they do not fit; nothing was taken.
        """
        new = self._new_chunks(counts)
        num_new = int(new.sum())
        if num_new > self._top:
            raise OutOfPages(f"{num_new} chunks wanted, {self._top} free")
        chunks = self._stack[self._top - num_new : self._top][::-1].copy()
        self._top -= num_new
        self.owner[chunks] = np.repeat(np.arange(self.num_layers, dtype=np.int32), new)
        if self.pages_per_chunk == 1:
            ids = chunks
        else:
            self._free_in_chunk[chunks] = self.pages_per_chunk
            self._partial[chunks] = True
            self._own_free += new * self.pages_per_chunk
            ids = self._take_from_own(np.broadcast_to(np.asarray(counts, np.int64), (self.num_layers,)))
        self.refcount[ids] = 1
        return ids

    def _take_from_own(self, counts: np.ndarray) -> np.ndarray:
        """Pages out of chunks that the layers own already, fullest first. counts [L] -> ids, layer after layer."""
        c = self.pages_per_chunk
        chunks = np.flatnonzero(self._partial)
        # A chunk's key: its layer, then how many free pages it has.
        chunks = chunks[np.argsort(self.owner[chunks] * (c + 1) + self._free_in_chunk[chunks], kind="stable")]
        layer, free = self.owner[chunks], self._free_in_chunk[chunks].astype(np.int64)
        before = np.cumsum(free) - free  # free pages in chunks ahead, all layers
        first = np.searchsorted(layer, np.arange(self.num_layers))  # of each layer
        before -= before[np.minimum(first, len(before) - 1)][layer] if len(before) else 0
        take = np.clip(counts[layer] - before, 0, free)
        chunks, take = chunks[take > 0], take[take > 0]
        is_free = self.refcount.reshape(-1, c)[chunks] == 0  # [chunks, C]
        row, column = np.nonzero(is_free & (np.cumsum(is_free, 1) <= take[:, None]))
        self._free_in_chunk[chunks] -= take.astype(np.int32)
        self._partial[chunks] = self._free_in_chunk[chunks] > 0
        self._own_free -= counts
        return (chunks[row] * c + column).astype(np.int32)

    def share(self, ids: np.ndarray) -> None:
        """Adds one owner to each live page. Raises RuntimeError when one of them is free."""
        if len(ids) and self.refcount[ids].min() < 1:
            raise RuntimeError(f"page {int(ids[self.refcount[ids].argmin()])} is shared but free")
        np.add.at(self.refcount, ids, 1)

    def free(self, ids: np.ndarray) -> np.ndarray:
        """Drops one owner of each page; a page without owners is free at once. Returns the ids that became free.

        Raises:
          RuntimeError: a double free; nothing was changed.
        """
        before = self.refcount[ids]
        np.subtract.at(self.refcount, ids, 1)
        after = self.refcount[ids]
        if len(ids) and after.min() < 0:
            np.add.at(self.refcount, ids, 1)
            raise RuntimeError(f"double free of page {int(ids[after.argmin()])}")
        freed = ids[after == 0]
        if len(before) and before.max() > 1:
            freed = np.unique(freed)
        if self.pages_per_chunk == 1:
            self._push(freed)
            return freed
        chunks, count = np.unique(freed // self.pages_per_chunk, return_counts=True)
        self._free_in_chunk[chunks] += count.astype(np.int32)
        np.add.at(self._own_free, self.owner[chunks], count)
        empty = self._free_in_chunk[chunks] == self.pages_per_chunk
        self._partial[chunks] = ~empty
        np.subtract.at(self._own_free, self.owner[chunks[empty]], self.pages_per_chunk)
        self._push(chunks[empty])
        return freed

    def _push(self, chunks: np.ndarray) -> None:
        self._stack[self._top : self._top + len(chunks)] = chunks
        self._top += len(chunks)
        self.owner[chunks] = -1

    def check(self) -> None:
        """Asserts every invariant of the pool from scratch (debug mode and tests)."""
        c = self.pages_per_chunk
        live = self.refcount.reshape(-1, c) > 0
        assert (self.refcount >= 0).all(), "negative reference count"
        assert not live[0].any() and self.owner[0] == -1, "the reserved chunk is in use"
        stack = self._stack[: self._top]
        assert len(np.unique(stack)) == len(stack) and (self.owner[stack] == -1).all(), "free chunks are not free"
        assert int((self.owner[1:] == -1).sum()) == self._top, "a chunk is neither owned nor free"
        assert (live.any(1) == (self.owner >= 0)).all(), "owned chunks and live pages disagree"
        if c > 1:
            owned = self.owner >= 0
            free = c - live.sum(1)
            assert (self._free_in_chunk[owned] == free[owned]).all(), "free pages of a chunk are miscounted"
            assert (self._partial == (owned & (free > 0))).all(), "partial chunks are mislabelled"
            own_free = np.bincount(self.owner[owned], free[owned], self.num_layers)
            assert (self._own_free == own_free).all(), "free pages of a layer are miscounted"
        assert self.num_free + int((self.refcount > 0).sum()) == self.num_pages, "pages leaked"
