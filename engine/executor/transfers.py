"""Copies between the KV arena and pinned host memory: blocks out and in, one lane per direction.

A block leaves as gathered pages in a few arrays of fixed sizes, so there are few programs and little padding. Order on
the device is the order of dispatch: a gather reads what the steps before it wrote and is done before a later step
reuses its pages, a scatter comes before the programs that read it. JAX tells nobody when a copy ends, so each lane has
a thread that waits for its copies in turn, paces them to `link_gbs`, and stamps them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from engine.clock import WallClock
from engine.memory.moves import Copy, Move
from pallas_kernels import KVArena, KVBlock, gather_pages, scatter_pages

PIECES = (1024, 128, 16)  # pages of one gathered array, but for those that are larger than a unit
PADDING = -1


def piece_sizes(page_bytes: int, unit_bytes: int | None) -> tuple[int, ...]:
    """How many pages a gathered array may have, falling powers of two: at most a unit of bytes, at least one page.
    None or 0: there is no unit."""
    most = max(1, unit_bytes // page_bytes) if unit_bytes else PIECES[0]
    return tuple(sorted({min(size, 1 << most.bit_length() - 1) for size in PIECES}, reverse=True))


def pieces(pages: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Cuts page ids [n] into arrays of the falling `sizes`, the last one padded with -1."""
    out, at = [], 0
    for size in sizes[:-1]:
        while len(pages) - at >= size:
            out.append(pages[at : at + size])
            at += size
    small = sizes[-1]
    padded = np.full(-(-(len(pages) - at) // small) * small, PADDING, np.int32)
    padded[: len(pages) - at] = pages[at:]
    return [*out, *np.split(padded, len(padded) // small)] if len(padded) else out


@dataclass(eq=False)
class Transfer:
    """A copy on its way. It holds its block no longer than needed, not until the copy is accounted: memory that is free
    sooner serves the next block (on CPU, fresh memory costs page faults: 0.75 of the speed)."""

    move: Move
    arrays: Any  # at the destination, list of KVBlock: to wait for; None once they have arrived
    num_bytes: int
    submitted: float
    source: Any = None  # of a copy out, what the device gathers for it: nothing moves before; None once it has
    to_land: Any = None  # the same arrays, of a copy in: to scatter; None once that is dispatched
    done: threading.Event = field(default_factory=threading.Event)
    ok: bool = True
    start: float = 0.0
    end: float = 0.0

    def copy(self) -> Copy:
        """The copy, once it has ended."""
        m = self.move
        return Copy(m.out, m.block, m.layer, self.ok, self.num_bytes, self.start, self.end, m.owners, m.transient)


class Lane:
    """One direction of the link: its copies run one after the other, no faster than `gbs`."""

    def __init__(self, name: str, clock: WallClock, gbs: float | None):
        self.clock, self.seconds_per_byte = clock, 1 / (gbs * 1e9) if gbs else 0.0
        self.in_flight: deque[Transfer] = deque()
        self._free = clock.now()
        self._work: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name=f"lane {name}", daemon=True).start()

    @property
    def pending_bytes(self) -> int:
        """Bytes of copies that have not ended."""
        return sum(t.num_bytes for t in self.in_flight if not t.done.is_set())

    def start(self, transfer: Transfer) -> None:
        """Takes over a copy that was dispatched."""
        self.in_flight.append(transfer)
        self._work.put(transfer)

    def _watch(self) -> None:
        while True:
            self._wait_for(self._work.get())  # an idle lane holds no copy's memory

    def _wait_for(self, transfer: Transfer) -> None:
        transfer.start = max(transfer.submitted, self._free)
        try:
            if not all(array.is_ready() for array in jax.tree.leaves(transfer.source)):
                jax.block_until_ready(transfer.source)  # the host runs ahead of the device: this is no time of the link
                transfer.start = self.clock.now()
            transfer.source = None
            jax.block_until_ready(transfer.arrays)
        except Exception as error:  # the copy's own failure: reported with it
            logging.warning("a copy of %d bytes failed: %s", transfer.num_bytes, error)
            transfer.ok = False
        transfer.arrays = transfer.source = None
        due = transfer.start + transfer.num_bytes * self.seconds_per_byte
        time.sleep(max(0.0, due - self.clock.now()))
        transfer.end = self._free = self.clock.now()
        transfer.done.set()

    def make_room(self, num_bytes: int, limit: int) -> None:
        """Waits until `num_bytes` more fit the staging memory; a copy larger than all of it runs alone."""
        for transfer in list(self.in_flight):
            if self.pending_bytes == 0 or self.pending_bytes + num_bytes <= limit:
                return
            transfer.done.wait()

    def take_ended(self) -> list[Transfer]:
        """Copies that have ended since the last call, in order."""
        ended = []
        while self.in_flight and self.in_flight[0].done.is_set():
            ended.append(self.in_flight.popleft())
        return ended


class Transfers:
    """The host tier's bytes and the two lanes to it."""

    def __init__(
        self,
        kv_sharding: jax.sharding.NamedSharding,
        page_bytes: int,
        clock: WallClock,
        gbs: float | None,
        staging_bytes: int,
        unit_bytes: int | None = None,
    ):
        """`page_bytes` and `unit_bytes` (`piece_sizes`) are of all devices together."""
        self._sizes = piece_sizes(page_bytes, unit_bytes)
        self.page_bytes, self.staging_bytes, self.clock = page_bytes, staging_bytes, clock
        self._device = kv_sharding
        self._pinned = kv_sharding.with_memory_kind("pinned_host")
        self._blocks: dict[int, list[KVBlock]] = {}
        self._out, self._in = Lane("out", clock, gbs), Lane("in", clock, gbs)
        self._failed: list[Transfer] = []  # that could not be started
        self._gather = jax.jit(gather_pages)
        self._scatter = jax.jit(scatter_pages, donate_argnums=0)

    def abandon(self, moves: Iterable[Move]) -> None:
        """A step with these moves failed half way: those that were not started have failed."""
        begun = {id(t.move) for t in (*self._out.in_flight, *self._in.in_flight, *self._failed)}
        for move in moves:
            if id(move) not in begun:
                self._fail(move, "the step failed")

    def send(self, kv: KVArena, move: Move, first: int = 0) -> None:
        """Gathers a block, its pages counted from `first`, and starts its copy to the host. It may wait for staging
        memory, never for the copy."""
        num_bytes = len(move.pages) * self.page_bytes
        self._out.make_room(num_bytes, self.staging_bytes)
        try:
            gathered = [self._gather(kv, jnp.asarray(p)) for p in self._pieces(move.pages + np.int32(first))]
            arrays = jax.device_put(gathered, self._pinned)
        except Exception as error:
            self._fail(move, error)
        else:
            self._blocks[move.block] = arrays
            self._out.start(Transfer(move, arrays, num_bytes, self.clock.now(), source=gathered))

    def fetch(self, move: Move) -> Transfer | None:
        """Starts a block's copy to the device; None when that failed. `land` puts it into the arena."""
        num_bytes, transfer = len(move.pages) * self.page_bytes, None
        self._in.make_room(num_bytes, self.staging_bytes)
        try:
            arrays = jax.device_put(self._blocks[move.block], self._device)
        except Exception as error:
            self._fail(move, error)
        else:
            transfer = Transfer(move, arrays, num_bytes, self.clock.now(), to_land=arrays)
            self._in.start(transfer)
        return transfer

    def land(self, kv: KVArena, transfer: Transfer, first: int = 0) -> KVArena:
        """Scatters a fetched block into the arena (donated), its pages counted from `first`, once the paced link has
        brought it, and if it has: a block that did not arrive would take the whole arena with it."""
        if self._in.seconds_per_byte:
            transfer.done.wait()
        arrays, transfer.to_land = transfer.to_land, None
        if not transfer.ok:
            return kv
        pages = transfer.move.pages
        pages = np.where(pages < 0, pages, pages + first)
        for ids, block in zip(self._pieces(pages), arrays, strict=True):
            kv = self._scatter(kv, jnp.asarray(ids), block)
        return kv

    def drop(self, blocks: tuple[int, ...]) -> None:
        """Lets go of blocks that nobody will ask for."""
        for block in blocks:
            self._blocks.pop(block, None)

    @property
    def busy(self) -> bool:
        """True while a copy is in flight, or has ended and was not taken."""
        return bool(self._out.in_flight or self._in.in_flight or self._failed)

    def take_ended(self, wait: bool = False) -> tuple[Copy, ...]:
        """Copies that have ended since the last call. `wait`: not before there is one."""
        if wait and not self._failed:
            for lane in (self._out, self._in):
                if lane.in_flight:
                    lane.in_flight[0].done.wait()
                    break
        ended = [*self._failed, *self._out.take_ended(), *self._in.take_ended()]
        self._failed = []
        return tuple(t.copy() for t in ended)

    def warm_up(self, kv: KVArena) -> KVArena:
        """Compiles the gathers and scatters by moving nothing."""
        for size in self._sizes:
            nowhere = jnp.asarray(np.full(size, PADDING, np.int32))
            block = jax.device_put(jax.device_put(self._gather(kv, nowhere), self._pinned), self._device)
            kv = self._scatter(kv, nowhere, block)
        return kv

    def _pieces(self, pages: np.ndarray) -> list[np.ndarray]:
        """A block's page ids by gathered array."""
        return pieces(pages, self._sizes)

    def _fail(self, move: Move, why: Exception | str) -> None:
        logging.warning("a copy of %d pages could not be started: %s", len(move.pages), why)
        now = self.clock.now()
        self._failed.append(Transfer(move, None, 0, now, ok=False, start=now, end=now))
