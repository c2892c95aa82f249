"""The paged store: an arena of pages and a page table `[slot, layer, index]`, as in vLLM but with a layer axis.

While every layer of a sequence maps the same number of pages (uniform residency), that number is one row; a policy that
parks layers expands it (issue "LayerKV"). No JAX here.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from engine.errors import OutOfPages
from engine.memory.host import HostTier, Owner
from engine.memory.moves import Copy, Move, Stream
from engine.memory.pages import PagePool

NOT_WANTED = -1


class PagedStore:
    """Implements `KVStore` over a `PagePool`."""

    view = "paged"

    def __init__(self, pool: PagePool, num_slots: int, page_size: int, max_tokens: int, host: HostTier | None = None):
        self.pool, self.host = pool, host
        self.page_size = page_size  # S
        self.num_slots = num_slots
        self.num_pages = pool.num_pages
        self.max_tokens = max_tokens
        self.table_width = -(-max_tokens // page_size)  # N
        # The host's copy of the device table. Zero pages of memory are committed by the system on first touch.
        self.table = np.zeros((num_slots, pool.num_layers, self.table_width), np.int32)
        self.mapped = np.zeros(num_slots, np.int32)  # pages of each layer, by slot
        self._slots = list(range(num_slots - 1, -1, -1))
        self._growth: list[tuple[int, int, int]] = []  # (slot, first index, pages) mapped since the last deltas
        self._moves: list[Move] = []
        self._arriving: set[int] = set()  # slots that moves of the coming plan bring pages to
        self._layers = np.arange(pool.num_layers, dtype=np.int32)

    @property
    def num_free_pages(self) -> int:
        """Pages no sequence maps, over all layers."""
        return self.pool.num_free

    @property
    def num_free_slots(self) -> int:
        """Slots no sequence holds."""
        return len(self._slots)

    def pages_for(self, num_tokens):
        """Pages of one layer for so many tokens (an int or an array)."""
        return -(-num_tokens // self.page_size)

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether an empty store could hold one sequence of this length."""
        chunks = -(-self.pages_for(num_tokens) // self.pool.pages_per_chunk) * self.pool.num_layers
        return num_tokens <= self.max_tokens and chunks <= self.pool.num_chunks

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

    def lacking(self, slots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Pages of each layer that these sequences need and do not map for these lengths, int [n]."""
        return np.maximum(self.pages_for(lengths) - self.mapped[slots], 0)

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
        total = int(lacking.sum())
        if total == 0:
            return
        ids = self.pool.allocate(total).reshape(-1, total)
        some, at = np.flatnonzero(lacking), 0
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
        self._growth.append((slot, first, pages))

    def close(self, slot: int) -> None:
        """Unmaps a sequence: its slot and its unshared pages are free at once."""
        if self.mapped[slot] == 0:
            raise RuntimeError(f"slot {slot} is closed already")
        self._free(slot, self.table[slot, :, : self.mapped[slot]].ravel())

    def _free(self, slot: int, pages: np.ndarray) -> None:
        """Frees a slot and its pages on the device; what the coming plan would have brought there is not wanted."""
        if slot in self._arriving:
            for move in self._moves:
                if not move.out:
                    move.pages[np.isin(move.pages, pages)] = NOT_WANTED
            self._arriving.remove(slot)
        self.pool.free(pages)
        self.mapped[slot] = 0
        self._slots.append(slot)

    def on_device(self, slot: int) -> np.ndarray:
        """Which of the slot's pages are on the device, bool [L, n]: all of them here."""
        return np.ones((self.pool.num_layers, int(self.mapped[slot])), bool)

    def streams(self, slots: np.ndarray) -> tuple[Stream, ...]:
        """How a step over sequences `slots` reads pages that are not on the device: here all are."""
        return ()

    def can_swap_out(self, slot: int) -> bool:
        """Whether the host tier can take all pages of a sequence now: copies out go before copies in."""
        room = self.host is not None and self.host.fits(int(self.mapped[slot]) * self.pool.num_layers)
        return room and slot not in self._arriving

    def swap_out(self, slot: int, owner: Owner) -> None:
        """Moves a sequence to the host, tail pages too, one block per layer, and closes its slot. Its pages are free
        at once: whoever reuses them runs after the gather.

        Raises:
          OutOfPages: the host tier is full, or there is none; nothing was moved.
        """
        n = int(self.mapped[slot])
        if not self.can_swap_out(slot):
            raise OutOfPages(f"{n} pages of each layer do not fit the host tier")
        host = cast(HostTier, self.host)
        for layer, pages in enumerate(self.table[slot, :, :n].copy()):
            self._moves.append(Move(True, host.store(layer, [(owner, 0, n)]), layer, pages))
        self.close(slot)

    def can_swap_in(self, owner: Owner, num_tokens: int, reserve: int = 0) -> bool:
        """Whether a swapped sequence has landed on the host and fits the device with `num_tokens` tokens."""
        return cast(HostTier, self.host).landed(owner) and self.fits(num_tokens, reserve)

    def swap_in(self, owner: Owner, num_tokens: int) -> int:
        """Maps `num_tokens` tokens for a swapped sequence and brings its pages back. Returns its slot.

        Raises:
          OutOfPages: no slot or not enough pages; it stays on the host.
        """
        slot = self.open(num_tokens)
        for layer in range(self.pool.num_layers):
            self._fetch(owner, layer, slot)
        cast(HostTier, self.host).drop(owner)
        return slot

    def _fetch(self, owner: Owner, layer: int, slot: int) -> None:
        """Moves a layer's pages on the host to the pages that the slot maps for them."""
        host = cast(HostTier, self.host)
        self._arriving.add(slot)
        for e in host.extents(owner, layer):
            host.begin_fetch(e.block)
            pages = np.full(host.blocks[e.block].num_pages, NOT_WANTED, np.int32)
            pages[e.offset : e.offset + e.end - e.start] = self.table[slot, layer, e.start : e.end]
            self._moves.append(Move(False, e.block, layer, pages, (owner,)))

    def forget(self, owner: Owner) -> None:
        """A swapped sequence is gone: its pages on the host die."""
        cast(HostTier, self.host).drop(owner)

    @property
    def copies_in_flight(self) -> bool:
        """Whether a move of an earlier plan has not ended."""
        return self.host is not None and self.host.busy

    @property
    def num_host_pages(self) -> int:
        """Pages the host tier holds."""
        return self.host.used if self.host else 0

    def copied(self, copy: Copy) -> list[Owner]:
        """A move has ended. Returns the owners whose KV is lost with it, if it failed."""
        return cast(HostTier, self.host).copied(copy)

    def take_freed_blocks(self) -> tuple[int, ...]:
        """Host blocks freed since the last call."""
        return self.host.take_freed() if self.host else ()

    def take_moves(self) -> tuple[Move, ...]:
        """Copies decided since the last call."""
        moves, self._moves = tuple(self._moves), []
        self._arriving.clear()
        return moves

    def take_deltas(self) -> np.ndarray:
        """Page-table entries changed since the last call, int32 [n, 4]: layer, slot, index, page."""
        growth, self._growth = self._growth, []
        if not growth:
            return np.empty((0, 4), np.int32)
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
        self.pool.check()
        if self.host is not None:
            self.host.check()
        held = np.flatnonzero(self.mapped).tolist()
        assert sorted([*held, *self._slots]) == list(range(self.num_slots)), "slots leaked"
        refcount = self.pool.refcount
        owners = np.zeros_like(refcount)
        for slot in held:
            layer, index = np.nonzero(self.on_device(slot))
            pages = self.table[slot, layer, index]
            assert (pages > 0).all(), "a mapped entry points to the zero page"
            if self.pool.pages_per_chunk > 1:
                assert (self.pool.owner[pages // self.pool.pages_per_chunk] == layer).all(), (
                    "a page lies in another layer's chunk"
                )
            np.add.at(owners, pages, 1)
        assert (owners == refcount).all(), "reference counts and owners disagree"
