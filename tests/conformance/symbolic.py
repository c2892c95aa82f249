"""An engine whose model is a hash of what it reads: the real scheduler and memory over a simulated device.

The executor keeps an arena and a page table as the device does, writes token ids where KV would go, and answers with a
hash of what each sampled row reads back through its pages, in every layer. A page that is unmapped, shared by mistake,
reused too early, not yet back from the host or written at the wrong place changes the token, so the tokens of a request
must equal `answer` of its own prompt, whatever happens around it. It answers at once: thousands of steps a second.
"""

from __future__ import annotations

import zlib

import numpy as np

from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.memory_plan import MemoryPlan
from engine.memory.host import HostTier
from engine.memory.moves import Copy, Move, Stream
from engine.memory.paged import PagedStore
from engine.memory.pages import PagePool
from engine.memory.stores import paged_store
from engine.scheduler.plan import Plan, StepResult
from engine.scheduler.policy import needs_host
from tests.engine.fake import StepClock

EOS = 7
MODEL = ModelConfig("symbolic", 2, 32, 4, 2, 8, 64, 300, 4096, eos_token_ids=(EOS,))
UNWRITTEN = -1


def sample(tokens: np.ndarray) -> int:
    """The token that follows `tokens`."""
    return zlib.crc32(tokens.astype(np.int32).tobytes()) % MODEL.vocab_size


def answer(prompt: list[int], max_tokens: int) -> list[int]:
    """What a request must produce: up to `max_tokens` tokens, the last one perhaps the end of sequence."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens and (len(tokens) == len(prompt) or tokens[-1] != EOS):
        tokens.append(sample(np.array(tokens)))
    return tokens[len(prompt) :]


class SymbolicExecutor:
    """Implements submit / collect on a simulated device. Steps run when submitted, in order, as on a device's queue."""

    def __init__(self, store: PagedStore, clock: StepClock, transient_pages: int):
        self.clock, self.plans = clock, []
        self._transient = store.pool.arena_pages  # the first transient page
        self._arena = np.full((self._transient + transient_pages, store.page_size), UNWRITTEN)
        self._table = np.zeros_like(store.table)  # the device's: changed by deltas only
        self._blocks: dict[int, np.ndarray] = {}  # on the host
        self._last = np.zeros(store.num_slots, np.int64)  # token sampled last into each slot
        self._copies: list[Copy] = []  # ended, not yet reported

    def submit(self, plan: Plan):
        self.plans.append(plan)
        self.clock.time += 1.0
        for move in plan.moves:  # all outs before anything is written
            if move.out:
                self._copy(move)
        layer, slot, index, page = plan.deltas.T
        self._table[slot, layer, index] = page
        self._arena[np.unique(page)] = UNWRITTEN  # newly mapped: what was there means nothing
        for move in plan.moves:
            if not move.out:
                self._copy(move)
        return plan, self._run(plan)

    def _copy(self, move: Move) -> None:
        wanted = move.pages >= 0
        pages = move.pages[wanted] + self._transient * move.transient
        if move.out:
            self._blocks[move.block] = self._arena[pages]
        else:
            self._arena[pages] = self._blocks[move.block][wanted]
        now = self.clock.time
        self._copies.append(Copy(move.out, move.block, move.layer, True, 0, now, now, move.owners, move.transient))

    def _run(self, plan: Plan) -> np.ndarray:
        rows, samples = self._rows(plan)
        assert len({slot for slot, *_ in rows}) == len(rows), "a sequence is in a step twice"
        streams = {stream.layer: stream for stream in plan.streams}
        read = [self._run_layer(layer, rows, streams.get(layer)) for layer in range(MODEL.num_layers)]
        for layers in zip(*read, strict=True):
            assert all((x == layers[0]).all() for x in layers), "layers differ"
            assert (layers[0] != UNWRITTEN).all(), "what is read was never written"
        tokens = np.array([sample(found) for found, ends in zip(read[0], samples, strict=True) if ends], np.int32)
        self._last[[slot for (slot, *_), ends in zip(rows, samples, strict=True) if ends]] = tokens
        return tokens

    def _rows(self, plan: Plan) -> tuple[list[tuple[int, int, np.ndarray]], list[bool]]:
        """(slot, position of the first, tokens) of all rows, and which of them are sampled."""
        rows, samples = [], [True] * len(plan.decode_slots)
        for slot, token, at in zip(plan.decode_slots, plan.decode_tokens, plan.decode_positions, strict=True):
            rows.append((int(slot), int(at), np.array([token if token >= 0 else self._last[slot]])))
        for p in plan.prefills:
            assert len(p.tokens), "a prefill of no tokens"
            rows.append((p.slot, p.start, p.tokens))
            samples.append(p.samples)
        return rows, samples

    def _run_layer(self, layer: int, rows, stream: Stream | None) -> list[np.ndarray]:
        """All rows write their tokens and read their sequences; what is parked of these is in the transient pages
        meanwhile."""
        parked = {slot: where for slot, *where in stream.rows.tolist()} if stream else {}
        self._arena[self._transient :] = UNWRITTEN
        for move in stream.fetches if stream else ():
            self._copy(move)
        for slot, at, tokens in rows:
            self._arena[self._where(layer, slot, at + np.arange(len(tokens)), parked.get(slot))] = tokens
        read = [
            self._arena[self._where(layer, slot, np.arange(at + len(tokens)), parked.get(slot))]
            for slot, at, tokens in rows
        ]
        for move in stream.sends if stream else ():
            self._copy(move)
        return read

    def _where(self, layer: int, slot: int, positions: np.ndarray, parked: list[int] | None):
        """Page and place in it of each position. `parked`: pages [a, b) lie from a transient page on."""
        index, size = positions // self._arena.shape[1], self._arena.shape[1]
        a, b, start = parked or (0, 0, 0)
        away = (index >= a) & (index < b)
        pages = np.where(away, self._transient + start - a + index, self._table[slot, layer, index])
        assert (pages > 0).all(), "a token has no page"
        return pages, positions % size

    def abandon(self, moves):
        """Nothing is begun before a step runs."""
        return ()

    def drop(self, blocks) -> None:
        """Blocks that nobody will ask for."""
        for block in blocks:
            del self._blocks[block]

    def collect(self, ticket) -> StepResult:
        plan, tokens = ticket
        return StepResult(tokens, None, float(plan.step), self.clock.time, copies=self.wait_for_copies())

    def wait_for_copies(self) -> tuple[Copy, ...]:
        copies, self._copies = tuple(self._copies), []
        return copies


def symbolic_engine(
    num_pages: int,
    page_size: int = 16,
    num_slots: int = 8,
    max_batched_tokens: int = 4096,
    pages_per_chunk: int = 1,
    host_pages: int = 0,
    async_depth: int = 0,
    **scheduler,
) -> Engine:
    """Pages are counted per layer; `scheduler`: fields of SchedulerConfig, without a watermark by default. A policy
    that moves KV whatever `preemption` says gets a host tier whatever `host_pages` says."""
    layers, clock = MODEL.num_layers, StepClock()
    limits = SchedulerConfig(**{"watermark": 0.0, "max_num_seqs": num_slots, **scheduler})
    host_pages = host_pages or 64 * needs_host(limits)
    transient = num_pages if host_pages else 0  # the longest sequence that fits
    cache = CacheConfig(
        page_size=page_size,
        num_pages=num_pages * layers,
        host_bytes=host_pages * layers,
        transient_pages=transient,
    )
    config = EngineConfig(cache=cache, scheduler=limits, debug_checks=True, async_depth=async_depth)
    host = HostTier(host_pages * layers) if host_pages else None
    pool = PagePool(num_pages * layers, layers, pages_per_chunk)
    store = paged_store(pool, num_slots, page_size, MODEL.max_context, host, transient)
    memory = MemoryPlan(store.num_pages, pages_per_chunk, 1, MODEL.max_context, "", max_batched_tokens, 0, 0, 0, 0)
    return Engine(MODEL, config, memory, store, SymbolicExecutor(store, clock, transient), clock)
