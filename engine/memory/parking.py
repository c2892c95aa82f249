"""Residency by layer: layers of a running sequence parked on the host, streamed when they are read, brought home.

Of each (sequence, layer) the pages [a, b) may lie on the host; the rest, the partial tail page always, is on the
device. There are two ways to the host. Pages on the device are sent, and leave it when their copy has landed: b follows
the copies. Full pages of a layer that is *away* never have a place there: the step that computes them writes them into
transient pages, from where they leave behind the layer, and until they have landed nobody can read them. A step that
reads parked pages gets them streamed into transient pages; its rows carry (a, b, transient start) instead of table
entries (ours, DESIGN "Host tier"). No JAX here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(slots=True, eq=False)
class Leaving:
    """Pages of a sequence's layer, up to page `end`, on their way to the host."""

    slot: int
    owner: Owner
    end: int
    away: bool  # never on the device
    landed: bool = False


Part = tuple[int, int, int]  # of a block: offset, pages, the first transient page that they go to
Wanted = tuple[int, tuple[Part, ...]]  # pages in the block, and what is wanted of them


def _stream_rows(slots: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Rows of a `Stream` over those of `slots` [n] whose [a, b) in `ranges` [n, 2] is not empty."""
    sizes = ranges[:, 1] - ranges[:, 0]
    some = np.flatnonzero(sizes)
    size = sizes[some]
    rows = np.empty((len(some), 4), np.int32)
    rows[:, 0], rows[:, 1:3], rows[:, 3] = slots[some], ranges[some], np.cumsum(size) - size
    return rows


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
        self.tier, self.transient_pages, layers = host, transient_pages, pool.num_layers
        self.parked = np.zeros((num_slots, layers, 2), np.int32)  # [a, b) by (slot, layer)
        self.sent = np.zeros((num_slots, layers), np.int32)  # [0, n) is on the host, on its way or written for it
        self.away = np.zeros((num_slots, layers), bool)
        self.unlanded = np.zeros(num_slots, np.int32)  # blocks of away layers on their way
        self._owners: list[Owner | None] = [None] * num_slots  # of slots with pages on the host, or on their way
        self._leaving: dict[int, list[Leaving]] = {}  # by block
        self._queues: dict[tuple[int, int], list[Leaving]] = {}  # by (slot, layer): on the device until they land
        self._homecomings: list[tuple[int, int, int, int]] = []  # (layer, slot, a, b) mapped since the last deltas
        self._written: dict[int, int] = {}  # by slot: the first page that the coming step writes for the host

    def ready(self, slots: np.ndarray) -> np.ndarray:
        """Which of these sequences a step can compute: what is parked of them has landed. bool [n]."""
        return self.unlanded[slots] == 0

    def fits_away(self, num_tokens: int, away: np.ndarray, reserve: int = 0) -> bool:
        """Whether a new sequence of this length fits now with the layers of `away` bool [L] written for the host; see
        `fits`. Its transient pages are a matter of the whole step: `transient_need`."""
        counts, to_host = self._needs(0, num_tokens, away)
        return bool(self._slots) and self.tier.fits(to_host) and self.pool.fits(counts, reserve)

    def _needs(self, first: int, num_tokens: int, away: np.ndarray) -> tuple[np.ndarray, int]:
        """Pages from page `first` on that a sequence takes of each layer on the device, int [L], and on the host. It
        may have more than it needs: what came back from the host is mapped whole."""
        full, pages = num_tokens // self.page_size, max(self.pages_for(num_tokens), first)
        counts = np.where(away, pages - max(full, first), pages - first)
        return counts, max(full - first, 0) * int(np.count_nonzero(away))

    def open_away(self, num_tokens: int, owner: Owner, away: np.ndarray) -> int:
        """Maps a new sequence whose layers `away` bool [L] are written for the host; the coming step must compute all
        of `num_tokens`. Returns its slot.

        Raises:
          OutOfPages: it does not fit; nothing was taken.
        """
        if not self._slots:
            raise OutOfPages(f"all {self.num_slots} slots are held")
        slot = self._slots[-1]
        self.away[slot] = away
        try:
            self.extend(slot, num_tokens)
        except OutOfPages:
            self.away[slot] = False
            raise
        self._owners[slot] = owner
        return self._slots.pop()

    def can_extend(self, slot: int, num_tokens: int) -> bool:
        """Whether `extend` would succeed."""
        counts, to_host = self._needs(int(self.mapped[slot]), num_tokens, self.away[slot])
        return self.tier.fits(to_host) and self.pool.fits(counts)

    def extend(self, slot: int, num_tokens: int) -> None:
        """Maps what a sequence, perhaps with layers away, lacks for `num_tokens` tokens. The coming step must compute
        all of them, and with layers away what is computed already ends with a page.

        Raises:
          OutOfPages: they do not fit; nothing was taken.
        """
        first, away = int(self.mapped[slot]), self.away[slot]
        counts, to_host = self._needs(first, num_tokens, away)
        if not self.tier.fits(to_host):
            raise OutOfPages(f"{to_host} pages do not fit the host tier")
        pages = max(self.pages_for(num_tokens), first)
        ids = self.pool.allocate(counts)
        mapped = np.zeros((len(away), pages - first), np.int32)  # away: the zero page
        mapped[np.arange(first, pages) >= pages - counts[:, None]] = ids
        self.table[slot, :, first:pages] = mapped
        self.mapped[slot] = pages
        if self.device_table:
            self._growth.append((slot, first, pages - first))
        if to_host:
            assert (self.sent[slot, away] == first).all(), "a page is written by two steps"
            self.parked[slot, away, 1] = self.sent[slot, away] = num_tokens // self.page_size
            self._written[slot] = first
            self.tier.promised += to_host

    def park(self, layer: int, slots: Sequence[int], owners: Sequence[Owner], ends: Sequence[int]) -> int:
        """Sends pages up to `ends[i]` of one layer of each sequence to the host in one block. They must be written by
        steps submitted before; a sequence to which the coming plan brings pages stays. Returns how many pages leave.

        Raises:
          OutOfPages: the host tier is full; nothing was sent.
        """
        parts, pages, leaving = [], [], []
        for slot, owner, end in zip(slots, owners, ends, strict=True):
            start = int(self.sent[slot, layer])
            if end > start and slot not in self._arriving:
                parts.append((owner, start, end))
                pages.append(self.table[slot, layer, start:end])
                leaving.append(Leaving(slot, owner, end, away=False))
        if not parts:
            return 0
        block = self.tier.store(layer, parts)
        for part in leaving:
            self._owners[part.slot], self.sent[part.slot, layer] = part.owner, part.end
            self._queues.setdefault((part.slot, layer), []).append(part)
        self._leaving[block] = leaving
        self._moves.append(Move(True, block, layer, np.concatenate(pages)))
        return len(self._moves[-1].pages)

    def is_parked(self, slot: int, layer: int) -> bool:
        """Whether pages of the layer are on the host, and none is on its way there or about to be written for it:
        `bring_home` may have it."""
        a, b = self.parked[slot, layer].tolist()
        return a < b == self.sent[slot, layer] and not self.unlanded[slot] and slot not in self._written

    def bring_home(self, slot: int, layer: int) -> None:
        """Maps device pages for what is parked of a layer and fetches it.

        Raises:
          OutOfPages: they do not fit; it stays parked.
        """
        if not self.is_parked(slot, layer):
            raise RuntimeError(f"layer {layer} of slot {slot} is not parked, or still leaving")
        owner, (a, b) = cast(Owner, self._owners[slot]), self.parked[slot, layer].tolist()
        counts = np.zeros(self.pool.num_layers, np.int64)
        counts[layer] = b - a
        self.table[slot, layer, a:b] = self.pool.allocate(counts)
        self._homecomings.append((layer, slot, a, b))
        self._fetch(owner, layer, slot)
        self.tier.drop(owner, layer)
        self.parked[slot, layer] = self.sent[slot, layer] = 0
        self.away[slot, layer] = False

    def streams(self, slots: np.ndarray) -> tuple[Stream, ...]:
        """How a step over sequences `slots` [n] reads their parked pages, and writes those of away layers: one stream
        per layer that has some.

        Raises:
          OutOfPages: more than the transient pages hold; test `transient_need` first.
        """
        ranges = self.parked[slots]  # [n, L, 2]
        sizes = ranges[..., 1] - ranges[..., 0]
        if not sizes.any():
            return ()
        if sizes.sum(0).max() > self.transient_pages:
            raise OutOfPages(f"{sizes.sum(0).max()} parked pages of a layer, {self.transient_pages} transient pages")
        streams: list[Stream] = []
        known: dict[bytes, np.ndarray] = {}
        wanted: dict[Wanted, np.ndarray] = {}
        for layer in np.flatnonzero(sizes.any(0)).tolist():
            key = ranges[:, layer].tobytes()  # most layers are alike
            if (rows := known.get(key)) is None:
                rows = known[key] = _stream_rows(slots, ranges[:, layer])
            fetches = self._fetches(layer, rows, wanted)
            sends = self._written_pages(layer, rows) if self._written else ()
            streams.append(Stream(layer, rows, fetches, sends or self._regather(layer, rows, len(fetches))))
        self._written.clear()
        return tuple(streams)

    def transient_need(self, slots: np.ndarray) -> int:
        """Transient pages that a step over these sequences takes."""
        return int((self.parked[slots, :, 1] - self.parked[slots, :, 0]).sum(0).max(initial=0))

    def _fetches(self, layer: int, rows: np.ndarray, wanted: dict[Wanted, np.ndarray]) -> tuple[Move, ...]:
        """Blocks that bring a stream's pages; page i of a block goes to a transient page, counted from the first.
        `wanted`: pages by what is wanted of a block, of the layers before: most layers are alike."""
        parts: dict[int, list[Part]] = {}
        owners: dict[int, list[Owner]] = {}
        for slot, a, b, start in rows.tolist():
            owner = cast(Owner, self._owners[slot])
            for e in self.tier.extents(owner, layer):
                if e.start < b:
                    parts.setdefault(e.block, []).append((e.offset, e.end - e.start, start - a + e.start))
                    owners.setdefault(e.block, []).append(owner)
        moves = []
        for block, of in parts.items():
            self.tier.begin_fetch(block)
            key = self.tier.blocks[block].num_pages, tuple(of)
            if (pages := wanted.get(key)) is None:
                pages = wanted[key] = np.full(key[0], NOT_WANTED, np.int32)
                for offset, count, first in of:
                    pages[offset : offset + count] = np.arange(first, first + count)
            moves.append(Move(False, block, layer, pages, tuple(owners[block]), transient=True))
        return tuple(moves)

    def _written_pages(self, layer: int, rows: np.ndarray) -> tuple[Move, ...]:
        """Has the pages that the step writes into a stream's transient pages leave in one block."""
        parts, pages, leaving = [], [], []
        for slot, a, b, start in rows.tolist():
            if slot in self._written and self.away[slot, layer]:  # other layers may have pages on the host, too
                first, owner = self._written[slot], cast(Owner, self._owners[slot])
                parts.append((owner, first, b))
                pages.append(np.arange(start - a + first, start - a + b, dtype=np.int32))
                leaving.append(Leaving(slot, owner, b, away=True))
                self.unlanded[slot] += 1
        if not parts:
            return ()
        self.tier.promised -= sum(len(p) for p in pages)
        block = self.tier.store(layer, parts)
        self._leaving[block] = leaving
        return (Move(True, block, layer, np.concatenate(pages), transient=True),)

    def _regather(self, layer: int, rows: np.ndarray, num_blocks: int) -> tuple[Move, ...]:
        """Has the pages of a stream that took too many blocks leave again in one, from the transient pages where they
        are next to each other now. The step itself fetches the pieces; those that come after the copy has landed fetch
        the new block, and the pieces die with their last reader. (): few enough, one is on its way, or no room."""
        if num_blocks <= MAX_BLOCKS_PER_FETCH or self.tier.regathering(layer):
            return ()
        total = int((rows[:, 2] - rows[:, 1]).sum())
        if not self.tier.fits(total):
            return ()
        parts = [(cast(Owner, self._owners[slot]), a, b) for slot, a, b, _ in rows.tolist()]
        return (Move(True, self.tier.regather(layer, parts), layer, np.arange(total, dtype=np.int32), transient=True),)

    def copied(self, copy: Copy) -> list[Owner]:
        """See `PagedStore`. Pages whose copy has landed leave the device, in their order."""
        leaving, block = self._leaving.pop(copy.block, ()) if copy.out else (), self.tier.blocks[copy.block]
        # The rest were dropped on the way, or swapped out.
        leaving = [p for p in leaving if p.owner in block.owners and self._owners[p.slot] == p.owner]
        lost = super().copied(copy)
        for part in leaving if copy.ok else ():
            part.landed = True
            if part.away:
                self.unlanded[part.slot] -= 1
            else:
                self._leave(part.slot, copy.layer)
        return lost

    def _leave(self, slot: int, layer: int) -> None:
        """Frees the pages that have landed, up to the first that have not: a later block may be faster."""
        queue = self._queues[slot, layer]
        while queue and queue[0].landed:
            begin, end = int(self.parked[slot, layer, 1]), queue.pop(0).end
            self.pool.free(self.table[slot, layer, begin:end])
            self.table[slot, layer, begin:end] = 0
            self.parked[slot, layer, 1] = end
        if not queue:
            del self._queues[slot, layer]

    def swap_out(self, slot: int, owner: Owner) -> None:
        """See `PagedStore`; what is parked already stays where it is."""
        n = int(self.mapped[slot])
        if not self.can_swap_out(slot):
            raise OutOfPages(f"{n} pages of each layer do not fit the host tier")
        for layer, start in enumerate(self.sent[slot].tolist()):
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
        if self._queues:
            self._queues = {key: queue for key, queue in self._queues.items() if key[0] != slot}
        if slot in self._written:
            first, ends = self._written.pop(slot), self.sent[slot, self.away[slot]]
            self.tier.promised -= int((ends - first).sum())
        self.parked[slot], self.sent[slot], self.away[slot], self.unlanded[slot] = 0, 0, False, 0
        self._owners[slot] = None

    def on_device(self, slot: int) -> np.ndarray:
        """See `PagedStore`: all but [a, b) of each layer."""
        index, ranges = np.arange(self.mapped[slot]), self.parked[slot]  # [n], [L, 2]
        return (index < ranges[:, :1]) | (index >= ranges[:, 1:])

    def take_deltas(self) -> np.ndarray:
        """See `PagedStore`: these too say what holds now."""
        grown = super().take_deltas()
        deltas, homecomings, self._homecomings = [grown[grown[:, 3] > 0]], self._homecomings, []  # not what is away
        for layer, slot, a, b in homecomings:
            delta = np.empty((b - a, 4), np.int32)
            delta[:, :2], delta[:, 2], delta[:, 3] = (layer, slot), np.arange(a, b), self.table[slot, layer, a:b]
            deltas.append(delta)
        return np.concatenate(deltas) if homecomings else deltas[0]
