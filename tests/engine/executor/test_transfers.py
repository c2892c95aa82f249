"""Blocks on their way: pages come back with the bits they left with, and memory is given back as soon as it can be."""

import gc
import time
import weakref

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from engine.clock import WallClock
from engine.executor.programs import ARENA
from engine.executor.transfers import PADDING, PIECES, Lane, Transfer, Transfers, piece_sizes, pieces
from engine.memory.moves import Move
from engine.models.tensors import device_mesh
from pallas_kernels import KVArena, KVSpec, init_arena

SPEC = KVSpec(4, 2, 8, "float32")


@pytest.fixture
def arena():
    """150 pages, each filled with its own numbers."""
    empty = init_arena(SPEC, 150, NamedSharding(device_mesh(), ARENA))
    k = jax.numpy.arange(empty.k.size, dtype=empty.k.dtype).reshape(empty.k.shape)
    return KVArena(k, -k, SPEC)


def moved_in(arena, gbs, unit_bytes=None):
    """Transfers over a link of `gbs`, with 147 pages (three pieces) out and fetched again, and the copy in."""
    transfers = Transfers(arena.k.sharding, SPEC.page_bytes, WallClock(), gbs, 1 << 20, unit_bytes)
    transfers.send(arena, Move(True, 0, 0, np.arange(1, 148, dtype=np.int32)))
    assert [c.ok for c in transfers.take_ended(wait=True)] == [True]
    return transfers, transfers.fetch(Move(False, 0, 0, np.arange(147, 0, -1, dtype=np.int32)))


@pytest.mark.parametrize(
    "page_bytes, unit_bytes, sizes",
    [
        (32 << 10, None, (1024, 128, 16)),
        (32 << 10, 0, (1024, 128, 16)),
        (
            4 << 10,
            4 << 20,
            (1024, 128, 16),
        ),  # small pages: a unit holds 1,024 of them, and no more than before are taken
        (1 << 10, 4 << 20, (1024, 128, 16)),
        (16 << 10, 4 << 20, (256, 128, 16)),
        (32 << 10, 4 << 20, (128, 16)),
        (40 << 10, 4 << 20, (64, 16)),  # 102 fit
        (512 << 10, 4 << 20, (8,)),
        (4 << 20, 4 << 20, (1,)),
        (5 << 20, 4 << 20, (1,)),  # no page is cut
    ],
)
def test_no_piece_is_larger_than_a_unit(page_bytes, unit_bytes, sizes):
    assert piece_sizes(page_bytes, unit_bytes) == sizes


@pytest.mark.parametrize("n", [0, 1, 16, 17, 1024, 2 * 1024 + 3 * 128 + 40])
@pytest.mark.parametrize("sizes", [(1024, 128, 16), (64, 16), (8,), (1,)])
def test_pieces_hold_every_page_once_in_order(n, sizes):
    """Only sizes that are compiled, and padding only at the end, less than one smallest piece."""
    pages = np.arange(1, n + 1, dtype=np.int32)
    cut = pieces(pages, sizes)
    joined = np.concatenate([np.empty(0, np.int32), *cut])
    assert {len(p) for p in cut} <= set(sizes)
    assert (joined[:n] == pages).all() and (joined[n:] == PADDING).all() and len(joined) - n < sizes[-1]


@pytest.mark.parametrize("unit_bytes", [None, 20 * SPEC.page_bytes, 3 * SPEC.page_bytes])
def test_pages_land_where_they_are_wanted(arena, unit_bytes):
    """Page i of the block lands on page 148 - i; the others keep their bits. The pieces on their way are no larger than
    a unit."""
    before = np.array(arena.k)
    transfers, transfer = moved_in(arena, None, unit_bytes)
    largest = max(block.k.nbytes + block.v.nbytes for block in transfer.to_land)
    assert largest <= (unit_bytes or 128 * SPEC.page_bytes)
    after = transfers.land(arena, transfer)
    want = before.copy()
    want[1:148] = before[147:0:-1]
    assert np.array_equal(after.k, want) and np.array_equal(after.v, -want)


@pytest.mark.parametrize("gbs", [None, 0.01])
def test_a_block_is_let_go_of_when_it_is_scattered_not_when_its_copy_is_accounted(arena, gbs):
    """Holding on to it costs the next block fresh memory: a quarter of the speed of a swap on CPU."""
    transfers, transfer = moved_in(arena, gbs)
    arrays = [weakref.ref(x) for block in transfer.to_land for x in block]
    arena = jax.block_until_ready(transfers.land(arena, transfer))
    transfer.done.wait()
    gc.collect()
    assert len(arrays) == 2 * 3 and not any(ref() for ref in arrays)
    assert transfers.busy, "the copy has not been accounted"
    assert [c.ok for c in transfers.take_ended()] == [True]


class Late:
    """An array that the device computes after so many seconds."""

    def __init__(self, seconds: float):
        self.due = time.monotonic() + seconds

    def is_ready(self) -> bool:
        return time.monotonic() >= self.due

    def block_until_ready(self) -> None:
        time.sleep(max(0.0, self.due - time.monotonic()))


def test_a_copy_begins_when_the_device_has_gathered_it_not_when_it_was_dispatched():
    """Dispatched together, gathered after 0.2 s: the link is free until then, so the first copy takes the 0.1 s of its
    bytes from there on, and the second follows it. A policy that learned the link's rate from the time since dispatch
    would take it for a slow one, and a paced link would be faster than its pace."""
    clock = WallClock()
    lane = Lane("out", clock, 1e-6)  # 1,000 bytes/s
    start = clock.now()
    for source in (Late(0.2), Late(0.2)):
        lane.start(Transfer(Move(True, 0, 0, np.zeros(1, np.int32)), Late(0.2), 100, start, source=source))
    first, second = list(lane.in_flight)
    assert second.done.wait(10)
    assert first.start - start >= 0.2 and first.end - first.start >= 0.1
    assert second.start == first.end and second.end - second.start >= 0.1
    assert first.source is None and second.source is None
