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
from engine.memory.moves import Copy
from engine.memory.paged import PagedStore
from engine.memory.pages import PagePool
from engine.scheduler.plan import Plan, StepResult
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

    def __init__(self, store: PagedStore, clock: StepClock):
        self.clock, self.plans = clock, []
        self._arena = np.full((store.pool.arena_pages, store.page_size), UNWRITTEN)
        self._table = np.zeros_like(store.table)  # the device's: changed by deltas only
        self._blocks: dict[int, np.ndarray] = {}  # on the host
        self._last = np.zeros(store.num_slots, np.int64)  # token sampled last into each slot
        self._copies: list[Copy] = []  # ended, not yet reported

    def submit(self, plan: Plan):
        self.plans.append(plan)
        self.clock.time += 1.0
        for move in plan.moves:  # all outs before anything is written
            if move.out:
                self._blocks[move.block] = self._arena[move.pages]
                self._end(move)
        layer, slot, index, page = plan.deltas.T
        self._table[slot, layer, index] = page
        self._arena[np.unique(page)] = UNWRITTEN  # newly mapped: what was there means nothing
        for move in plan.moves:
            if not move.out:
                wanted = move.pages >= 0
                self._arena[move.pages[wanted]] = self._blocks[move.block][wanted]
                self._end(move)
        return plan, self._run(plan)

    def _end(self, move) -> None:
        self._copies.append(
            Copy(move.out, move.block, move.layer, True, 0, self.clock.time, self.clock.time, move.owners)
        )

    def _run(self, plan: Plan) -> np.ndarray:
        rows = []
        for slot, token, at in zip(plan.decode_slots, plan.decode_tokens, plan.decode_positions, strict=True):
            self._write(slot, at, np.array([token if token >= 0 else self._last[slot]]))
            rows.append((slot, at + 1))
        for p in plan.prefills:
            assert len(p.tokens), "a prefill of no tokens"
            self._write(p.slot, p.start, p.tokens)
            rows += [(p.slot, p.start + len(p.tokens))] * p.samples
        slots = [slot for slot, _ in rows]
        assert len({*plan.decode_slots.tolist(), *(p.slot for p in plan.prefills)}) == len(plan.decode_slots) + len(
            plan.prefills
        ), "a sequence is in a step twice"
        tokens = np.array([sample(self._read(*row)) for row in rows], np.int32)
        self._last[slots] = tokens
        return tokens

    def _write(self, slot: int, at: int, tokens: np.ndarray) -> None:
        where = at + np.arange(len(tokens))
        pages = self._table[slot][:, where // self._arena.shape[1]]  # [L, n]
        assert (pages > 0).all(), "a token is written to no page"
        self._arena[pages, where % self._arena.shape[1]] = tokens

    def _read(self, slot: int, length: int) -> np.ndarray:
        pages = self._table[slot][:, : -(-length // self._arena.shape[1])]
        layers = self._arena[pages].reshape(len(pages), -1)[:, :length]
        assert (layers == layers[0]).all() and (layers != UNWRITTEN).all(), "what is read was never written"
        return layers[0]

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
    """Pages are counted per layer; `scheduler`: fields of SchedulerConfig, without a watermark by default."""
    layers, clock = MODEL.num_layers, StepClock()
    config = EngineConfig(
        cache=CacheConfig(page_size=page_size, num_pages=num_pages * layers, host_bytes=host_pages * layers),
        scheduler=SchedulerConfig(**{"watermark": 0.0, "max_num_seqs": num_slots, **scheduler}),
        debug_checks=True,
        async_depth=async_depth,
    )
    host = HostTier(host_pages * layers) if host_pages else None
    pool = PagePool(num_pages * layers, layers, pages_per_chunk)
    store = PagedStore(pool, num_slots, page_size, MODEL.max_context, host)
    memory = MemoryPlan(store.num_pages, pages_per_chunk, 1, MODEL.max_context, "", max_batched_tokens, 0, 0, 0, 0)
    return Engine(MODEL, config, memory, store, SymbolicExecutor(store, clock), clock)
