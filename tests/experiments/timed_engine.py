"""The real engine, scheduler and page pool over an executor that only takes time: seconds per prompt token and per
decode step, on a virtual clock or on the wall clock. Produces token 0 for ever. No JAX."""

from __future__ import annotations

import numpy as np

from engine.clock import VirtualClock
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.memory_plan import MemoryPlan
from engine.memory.paged import PagedStore
from engine.memory.pages import PagePool
from engine.scheduler.plan import StepResult

MODEL = ModelConfig(
    name="timed", num_layers=2, hidden_size=8, num_heads=2, num_kv_heads=1, head_dim=4, ffn_size=8, vocab_size=100,
    max_context=4096,
)  # fmt: skip


class TimedExecutor:
    """A prefill step takes `token_s` per prompt token, a decode step `decode_s`."""

    def __init__(self, clock, token_s: float, decode_s: float):
        self._clock, self._token_s, self._decode_s = clock, token_s, decode_s
        self._last_end = clock.now()

    def submit(self, plan):
        return plan, self._clock.now()

    def abandon(self, moves):
        return ()

    def collect(self, ticket) -> StepResult:
        plan, submitted = ticket
        start = max(submitted, self._last_end)
        seconds = plan.num_prefill_tokens * self._token_s if plan.prefills else self._decode_s
        due = self._clock.now() + seconds
        while self._clock.now() < due:
            self._clock.wait_until(due)
        self._last_end = self._clock.now()
        return StepResult(np.zeros(len(plan.sampled_slots), np.int32), None, start, self._last_end)


class TimedEngine(Engine):
    """`Engine` without anything to compile."""

    def warmup(self) -> list[tuple[str, float]]:
        return [("nothing", 0.0)]


def timed_engine(
    num_pages=4000, token_s=0.001, decode_s=0.01, max_context=1024, max_batched_tokens=2048, clock=None
) -> TimedEngine:
    """An engine whose pool holds `num_pages` pages of 16 tokens of one layer; two layers."""
    clock = clock or VirtualClock(start=100.0)  # runs do not start at zero
    config = EngineConfig(
        cache=CacheConfig(num_pages=num_pages), scheduler=SchedulerConfig(max_num_seqs=64), async_depth=0
    )
    memory = MemoryPlan(num_pages, 1, 1, max_context, "", max_batched_tokens, 0, 0, 0, 0)
    pool = PagePool(num_pages, MODEL.num_layers, 1)
    store = PagedStore(pool, config.scheduler.max_num_seqs, config.cache.page_size, max_context)
    return TimedEngine(MODEL, config, memory, store, TimedExecutor(clock, token_s, decode_s), clock)
