"""Residency by layer: layers of a running sequence parked on the host, streamed when they are read, brought home.

Of each (sequence, layer) the pages [a, b) may lie on the host; the rest, the partial tail page always, is on the
device. A page leaves the device when its copy has landed, so b follows the copies. A step that reads parked pages gets
them streamed into transient pages, and its rows carry (a, b, transient start) instead of table entries (ours, DESIGN
"Host tier"). No JAX here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from engine.errors import OutOfPages
from engine.memory.host import HostTier, Owner
from engine.memory.moves import Copy, Move, Stream
from engine.memory.paged import PagedStore
from engine.memory.slots import NOT_WANTED
from engine.memory.staged import Pool

# A step that fetches a layer in more blocks than this regathers it. Each block costs a dispatch however small it is (60
# us, as much as a small layer's program), and whole blocks are fetched, dead pages too. Parking makes one block per
# (step, layer), so from one regather to the next at least 8 steps fetch the layer: its bytes out are an eighth of those
# streamed in, in the direction that decoding leaves idle.
MAX_BLOCKS_PER_FETCH = 8


class ParkingStore(PagedStore):
    """A paged store with a host tier and `transient_pages` pages to stream one layer of a step's rows through."""

    parks = True

    def __init__(
        self,
        pool: Pool,
        num_slots: int,
        page_size: int,
        max_tokens: int,
        host: HostTier,
        transient_pages: int = 0,
    ):
        super().__init__(pool, num_slots, page_size, max_tokens, host)
        self.tier, self.transient_pages = host, transient_pages
        self.parked = np.zeros((self.num_slots, self.pool.num_layers, 2), np.int32)  # [a, b) by (slot, layer)
        self._owners: list[Owner | None] = [None] * self.num_slots  # of slots with pages on the host, or on their way
        self._leaving: dict[int, list[tuple[int, Owner, int]]] = {}  # by block: (slot, owner, b once it has landed)
        self._homecomings: list[tuple[int, int, int, int]] = []  # (layer, slot, a, b) mapped since the last deltas

    def park(self, layer: int, slots: Sequence[int], owners: Sequence[Owner], ends: Sequence[int]) -> int:
        """Sends pages up to `ends[i]` of one layer of each sequence to the host in one block. They must be written by
        steps submitted before; a sequence to which the coming plan brings pages stays. Returns how many pages leave.

        Raises:
          OutOfPages: the host tier is full; nothing was sent.
        """
        parts, pages, leaving = [], [], []
        for slot, owner, end in zip(slots, owners, ends, strict=True):
            start = self._covered(owner, layer)
            if end > start and slot not in self._arriving:
                parts.append((owner, start, end))
                pages.append(self.table[slot, layer, start:end])
                leaving.append((slot, owner, end))
        if not parts:
            return 0
        block = self.tier.store(layer, parts)
        for slot, owner, _ in leaving:
            self._owners[slot] = owner
        self._leaving[block] = leaving
        self._moves.append(Move(True, block, layer, np.concatenate(pages)))
        return len(self._moves[-1].pages)

    def bring_home(self, slot: int, layer: int) -> None:
        """Maps device pages for what is parked of a layer and fetches it.

        Raises:
          OutOfPages: they do not fit; it stays parked.
        """
        owner, (a, b) = self._owners[slot], self.parked[slot, layer].tolist()
        if owner is None or a == b or self._covered(owner, layer) > b:
            raise RuntimeError(f"layer {layer} of slot {slot} is not parked, or still leaving")
        counts = np.zeros(self.pool.num_layers, np.int64)
        counts[layer] = b - a
        self.table[slot, layer, a:b] = self.pool.allocate(counts)
        self._homecomings.append((layer, slot, a, b))
        self._fetch(owner, layer, slot)
        self.tier.drop(owner, layer)
        self.parked[slot, layer] = 0

    def streams(self, slots: np.ndarray) -> tuple[Stream, ...]:
        """How a step over sequences `slots` [n] reads their parked pages: one stream per layer that has some.

        Raises:
          OutOfPages: more than the transient pages hold; test `transient_need` first.
        """
        ranges = self.parked[slots]  # [n, L, 2]
        sizes = ranges[..., 1] - ranges[..., 0]
        if not sizes.any():
            return ()
        if sizes.sum(0).max() > self.transient_pages:
            raise OutOfPages(f"{sizes.sum(0).max()} parked pages of a layer, {self.transient_pages} transient pages")
        streams = []
        for layer in np.flatnonzero(sizes.any(0)).tolist():
            some = np.flatnonzero(sizes[:, layer])
            size = sizes[some, layer]
            start = np.cumsum(size) - size
            rows = np.column_stack([slots[some], ranges[some, layer], start]).astype(np.int32)
            fetches = self._fetches(layer, rows)
            streams.append(Stream(layer, rows, fetches, self._regather(layer, rows, len(fetches))))
        return tuple(streams)

    def transient_need(self, slots: np.ndarray) -> int:
        """Transient pages that a step over these sequences takes."""
        return int((self.parked[slots, :, 1] - self.parked[slots, :, 0]).sum(0).max(initial=0))

    def _fetches(self, layer: int, rows: np.ndarray) -> tuple[Move, ...]:
        """Blocks that bring a stream's pages; page i of a block goes to a transient page, counted from the first."""
        wanted: dict[int, np.ndarray] = {}
        owners: dict[int, list[Owner]] = {}
        for slot, a, b, start in rows.tolist():
            owner = self._owners[slot]
            for e in self.tier.extents(owner, layer):
                if e.start < b:
                    pages = wanted.setdefault(
                        e.block, np.full(self.tier.blocks[e.block].num_pages, NOT_WANTED, np.int32)
                    )
                    pages[e.offset : e.offset + e.end - e.start] = start - a + np.arange(e.start, e.end)
                    owners.setdefault(e.block, []).append(owner)
        for block in wanted:
            self.tier.begin_fetch(block)
        return tuple(Move(False, i, layer, pages, tuple(owners[i]), transient=True) for i, pages in wanted.items())

    def _regather(self, layer: int, rows: np.ndarray, num_blocks: int) -> Move | None:
        """Has the pages of a stream that took too many blocks leave again in one, from the transient pages where they
        are next to each other now. The step itself fetches the pieces; those that come after the copy has landed fetch
        the new block, and the pieces die with their last reader. None: few enough, one is on its way, or no room."""
        total = int((rows[:, 2] - rows[:, 1]).sum())
        if num_blocks <= MAX_BLOCKS_PER_FETCH or self.tier.regathering(layer) or not self.tier.fits(total):
            return None
        parts = [(cast(Owner, self._owners[slot]), a, b) for slot, a, b, _ in rows.tolist()]
        return Move(True, self.tier.regather(layer, parts), layer, np.arange(total, dtype=np.int32), transient=True)

    def _covered(self, owner: Owner, layer: int) -> int:
        """Pages of a layer that are on the host or on their way: [0, n)."""
        extents = self.tier.extents(owner, layer) if self.tier.holds(owner) else []
        return extents[-1].end if extents else 0

    def copied(self, copy: Copy) -> list[Owner]:
        """See `PagedStore`. Pages whose copy has landed leave the device."""
        leaving, block = self._leaving.pop(copy.block, ()) if copy.out else (), self.tier.blocks[copy.block]
        leaving = [part for part in leaving if part[1] in block.owners]  # the rest were dropped on the way
        lost = super().copied(copy)
        for slot, owner, end in leaving:
            if copy.ok and self._owners[slot] == owner:
                begin = self.parked[slot, copy.layer, 1]
                self.pool.free(self.table[slot, copy.layer, begin:end])
                self.parked[slot, copy.layer, 1] = end
        return lost

    def swap_out(self, slot: int, owner: Owner) -> None:
        """See `PagedStore`; what is parked already stays where it is."""
        n = int(self.mapped[slot])
        if not self.can_swap_out(slot):
            raise OutOfPages(f"{n} pages of each layer do not fit the host tier")
        for layer in range(self.pool.num_layers):
            start = self._covered(owner, layer)
            if start < n:
                pages = self.table[slot, layer, start:n].copy()
                self._moves.append(Move(True, self.tier.store(layer, [(owner, start, n)]), layer, pages))
        self._owners[slot] = None  # the pages on the host are not the slot's any more
        self.close(slot)

    def close(self, slot: int) -> None:
        """See `PagedStore`; parked pages die."""
        if self.mapped[slot] == 0:
            raise RuntimeError(f"slot {slot} is closed already")
        owner = self._owners[slot]
        if owner is not None:
            self.tier.drop(owner)
        self._free(slot, self.table[slot, :, : self.mapped[slot]][self.on_device(slot)])
        self.parked[slot], self._owners[slot] = 0, None

    def on_device(self, slot: int) -> np.ndarray:
        """See `PagedStore`: all but [a, b) of each layer."""
        index, ranges = np.arange(self.mapped[slot]), self.parked[slot]  # [n], [L, 2]
        return (index < ranges[:, :1]) | (index >= ranges[:, 1:])

    def take_deltas(self) -> np.ndarray:
        """See `PagedStore`: these too say what holds now."""
        deltas, homecomings, self._homecomings = [super().take_deltas()], self._homecomings, []
        for layer, slot, a, b in homecomings:
            delta = np.empty((b - a, 4), np.int32)
            delta[:, :2], delta[:, 2], delta[:, 3] = (layer, slot), np.arange(a, b), self.table[slot, layer, a:b]
            deltas.append(delta)
        return np.concatenate(deltas) if homecomings else deltas[0]
