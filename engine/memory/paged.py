"""The paged store: an arena of pages and a page table `[slot, layer, index]`, as in vLLM but with a layer axis.

While every layer of a sequence maps the same number of pages (uniform residency), that number is one row; a policy that
parks layers expands it (issue "LayerKV"). No JAX here.
"""

from __future__ import annotations

import numpy as np

from engine.errors import OutOfPages
from engine.memory.host import HostTier
from engine.memory.slots import SlotStore
from engine.memory.staged import Pool

NO_DELTAS = np.empty((0, 4), np.int32)


class PagedStore(SlotStore):
    """Implements `KVStore` over a `PagePool`, or over those of a pipeline's stages."""

    view = "paged"

    def __init__(self, pool: Pool, num_slots: int, page_size: int, max_tokens: int, host: HostTier | None = None):
        super().__init__(num_slots, pool.num_layers, page_size, max_tokens, host)
        self.pool, self.pages_per_chunk = pool, pool.pages_per_chunk
        self.num_pages, self.arena_pages = pool.num_pages, pool.arena_pages
        self.table_width = -(-max_tokens // page_size)  # N
        # The host's copy of the device table. Zero pages of memory are committed by the system on first touch.
        self.table = np.zeros((num_slots, pool.num_layers, self.table_width), np.int32)
        self._growth: list[tuple[int, int, int]] = []  # (slot, first index, pages) mapped since the last deltas
        self._layers = np.arange(pool.num_layers, dtype=np.int32)

    @property
    def num_free_pages(self) -> int:
        """Pages no sequence maps, over all layers."""
        return self.pool.num_free

    @property
    def num_mapped_pages(self) -> int:
        """The others: nothing is reserved ahead."""
        return self.num_pages - self.num_free_pages

    def pages(self, slot: int) -> np.ndarray:
        """Pages that a sequence maps, int32 [L, mapped]; a view of the table."""
        return self.table[slot, :, : self.mapped[slot]]

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether an empty store could hold one sequence of this length."""
        return num_tokens <= self.max_tokens and self.pool.can_ever_fit(self.pages_for(num_tokens))

    def fits(self, num_tokens: int, reserve: int = 0) -> bool:
        """Whether a new sequence of this length fits now, with `reserve` pages left over."""
        return bool(self._slots) and self.pool.fits(self.pages_for(num_tokens), reserve)

    def open(self, num_tokens: int) -> int:
        """Maps a new sequence of `num_tokens` tokens and returns its slot.

        Raises:
          OutOfPages: no slot or not enough pages; nothing was taken.
        """
        if not self._slots:
            raise OutOfPages(f"all {self.num_slots} slots are held")
        self._grow_one(self._slots[-1], num_tokens)
        return self._slots.pop()

    def can_grow(self, slots: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether all these sequences can grow to these lengths together."""
        lacking = int(self.lacking(slots, lengths).sum())
        return lacking == 0 or self.pool.fits(lacking)

    def grow(self, slots: np.ndarray, lengths: np.ndarray) -> None:
        """Maps what sequences `slots` [n] lack for `lengths` [n] tokens, all of them or none.

        Raises:
          OutOfPages: they do not fit together; nothing was mapped.
        """
        if len(slots) == 1:
            return self._grow_one(slots.item(), lengths.item())
        lacking = self.lacking(slots, lengths)
        total = int(np.add.reduce(lacking))
        if total == 0:
            return
        ids = self.pool.allocate(total).reshape(-1, total)
        some, at = lacking.nonzero()[0], 0
        if total == len(some):
            return self._map_one_each(slots[some], ids)
        for slot, pages in zip(slots[some].tolist(), lacking[some].tolist(), strict=True):
            self._map(slot, ids[:, at : at + pages])
            at += pages

    def _grow_one(self, slot: int, num_tokens: int) -> None:
        """`grow` of one sequence, without the arrays that would take most of its time."""
        pages = self.pages_for(num_tokens) - self.mapped.item(slot)
        if pages > 0:
            self._map(slot, self.pool.allocate(pages).reshape(-1, pages))

    def _map(self, slot: int, ids: np.ndarray) -> None:
        """Appends pages [L, n] to a slot. The delta is only noted: `take_deltas` reads it from the table."""
        first, pages = self.mapped.item(slot), ids.shape[1]
        self.table[slot, :, first : first + pages] = ids
        self.mapped[slot] = first + pages
        if self.device_table:
            self._growth.append((slot, first, pages))

    def _map_one_each(self, slots: np.ndarray, ids: np.ndarray) -> None:
        """`_map` of pages [L, n] to n slots, one page of every layer each."""
        first = self.mapped[slots]
        self.table[slots, :, first] = ids.T
        self.mapped[slots] = first + 1
        if self.device_table:
            self._growth += zip(slots.tolist(), first.tolist(), [1] * len(slots), strict=True)

    def _free(self, slot: int, pages: np.ndarray) -> None:
        """See `SlotStore`; the unshared pages are free at once."""
        super()._free(slot, pages)
        self.pool.free(pages)

    def on_device(self, slot: int) -> np.ndarray:
        """Which of the slot's pages are on the device, bool [L, n]: all of them here."""
        return np.ones((self.pool.num_layers, int(self.mapped[slot])), bool)

    def take_deltas(self) -> np.ndarray:
        """Page-table entries changed since the last call, int32 [n, 4]: layer, slot, index, page."""
        if not self._growth:
            return NO_DELTAS
        growth, self._growth = self._growth, []
        slot, first, pages = np.array(growth, np.int32).T
        ahead = np.cumsum(pages) - pages
        total = int(pages.sum())
        slot, index = np.repeat(slot, pages), np.repeat(first - ahead, pages) + np.arange(total)
        deltas = np.empty((self.pool.num_layers, total, 4), np.int32)
        deltas[..., 0], deltas[..., 1], deltas[..., 2] = self._layers[:, None], slot, index
        # A slot closed and opened again between two calls has entries twice; both say what holds now, because a device
        # scatter promises no order.
        deltas[..., 3] = self.table[slot, :, index].T
        return deltas.reshape(-1, 4)

    def unmapped_pages(self) -> np.ndarray:
        """Pages of the arena that no sequence maps and that are not reserved, bool [P]."""
        unmapped = self.pool.refcount == 0
        unmapped[: self.pool.pages_per_chunk] = False
        return unmapped

    def check(self) -> None:
        """Asserts every invariant: pool, slots, owners = references, no page of a layer in another layer's chunk."""
        super().check()
        self.pool.check()
        refcount = self.pool.refcount
        owners = np.zeros_like(refcount)
        for slot in np.flatnonzero(self.mapped).tolist():
            layer, index = np.nonzero(self.on_device(slot))
            pages = self.table[slot, layer, index]
            assert (pages > 0).all(), "a mapped entry points to the zero page"
            if self.pool.pages_per_chunk > 1:
                assert (self.pool.owner[pages // self.pool.pages_per_chunk] == layer).all(), (
                    "a page lies in another layer's chunk"
                )
            np.add.at(owners, pages, 1)
        assert (owners == refcount).all(), "reference counts and owners disagree"
