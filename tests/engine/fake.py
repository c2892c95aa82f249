"""An engine without a device: the real scheduler and memory, an executor that answers at once with fixed tokens."""

import numpy as np

from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.memory_plan import MemoryPlan
from engine.memory.paged import PagedStore
from engine.memory.pages import PagePool
from engine.scheduler.plan import Plan, StepResult

MODEL = ModelConfig("fake", 2, 32, 4, 2, 8, 64, 1000, 4096, eos_token_ids=(7,))


class StepClock:
    """Advances one second per step, so that times can be written down by hand."""

    def __init__(self):
        self.time = 0.0

    def now(self) -> float:
        return self.time


class FakeExecutor:
    """Every sampled token is `answer(slot)`; keeps the plans."""

    def __init__(self, clock: StepClock, answer=lambda slot: 1):
        self.clock, self.answer, self.plans = clock, answer, []

    def submit(self, plan: Plan):
        self.plans.append(plan)
        start = self.clock.time
        self.clock.time += 1.0
        return plan, start

    def abandon(self, moves):
        return ()

    def collect(self, ticket) -> StepResult:
        plan, start = ticket
        tokens = np.array([self.answer(int(s)) for s in plan.sampled_slots], np.int32)
        return StepResult(tokens, None, start, self.clock.time)


def fake_engine(
    num_pages: int,
    page_size: int = 16,
    num_slots: int = 8,
    watermark: float = 0.0,
    max_batched_tokens: int = 4096,
    chunk: int = 1,
    model: ModelConfig = MODEL,
    policy: str = "vllm_v0",
    answer=lambda slot: 1,
    async_depth: int = 0,
) -> Engine:
    """`num_pages` per layer."""
    layers, clock = model.num_layers, StepClock()
    config = EngineConfig(
        cache=CacheConfig(page_size=page_size, num_pages=num_pages * layers),
        scheduler=SchedulerConfig(policy=policy, max_num_seqs=num_slots, watermark=watermark),
        debug_checks=True,
        async_depth=async_depth,
    )
    store = PagedStore(PagePool(num_pages * layers, layers, chunk), num_slots, page_size, model.max_context)
    memory = MemoryPlan(store.num_pages, chunk, 1, model.max_context, "", max_batched_tokens, 0, 0, 0, 0)
    return Engine(model, config, memory, store, FakeExecutor(clock, answer), clock)


def schedule(engine: Engine) -> list[str]:
    """Steps the engine to the end; one line per step: who prefills (p) or decodes (d), who was preempted (x)."""
    lines = []
    names = {}
    while engine.has_work():
        held = {r.id for r in engine.state.requests if r is not None}
        outputs = engine.step()
        assert outputs, "a step with work left made no progress"
        plan = engine.executor.plans[-1]
        names.update({o.request_id: o for o in outputs})
        kind = "p" if plan.prefills else "d"
        waiting = {r.id for r in engine.state.waiting}
        out = "".join(f" x{i}" for i in sorted(held & waiting))
        lines.append(kind + " " + " ".join(o.request_id for o in outputs) + out)
    return lines
