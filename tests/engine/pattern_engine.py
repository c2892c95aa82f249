"""Engines over a `PatternExecutor`, and what tests do with them."""

from engine.config import CacheConfig, EngineConfig, LayerKVConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.memory_plan import MemoryPlan
from engine.memory.host import HostTier
from engine.memory.stores import make_store
from engine.request import Phase, SamplingParams
from tests.engine.pattern_executor import PAGE_BYTES, PatternExecutor, StepClock
from tests.engine.pattern_model import MODEL, expected_output

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)


def pattern_engine(
    pages: int = 20,
    host_pages: int = 0,
    chunk: int = 1,
    page_size: int = 4,
    num_slots: int = 4,
    policy: str = "vllm_v0",
    preemption: str | None = None,
    order: str = "fcfs",
    async_depth: int = 1,
    watermark: float = 0.0,
    max_batched_tokens: int = 64,
    store: str = "paged",
    layerkv: LayerKVConfig | None = None,
    streamed: int | None = None,
) -> Engine:
    """An engine over a `PatternExecutor`, with poison and checks. `pages` of each layer; `host_pages` over all layers,
    with which preempted requests are swapped by default, and layers can be parked: a layer of `streamed` of the longest
    sequences can be streamed at once (None: of as many as there are slots)."""
    parks, streamed = host_pages and store == "paged", streamed or num_slots
    transient_pages = streamed * -(-MODEL.max_context // page_size) if parks else 0
    config = EngineConfig(
        cache=CacheConfig(store, page_size, host_bytes=host_pages * PAGE_BYTES, transient_pages=transient_pages),
        scheduler=SchedulerConfig(
            policy=policy,
            order=order,
            max_num_seqs=num_slots,
            watermark=watermark,
            preemption=preemption or ("swap" if host_pages else "recompute"),
            layerkv=layerkv or LayerKVConfig(),
        ),
        debug_checks=True,
        poison=True,
        async_depth=async_depth,
    )
    sizes = pages * MODEL.num_layers, MODEL.num_layers, chunk, num_slots, page_size, MODEL.max_context
    kv = make_store(store, *sizes, HostTier(host_pages) if host_pages else None, transient_pages)
    memory = MemoryPlan(kv.num_pages, chunk, PAGE_BYTES, MODEL.max_context, "", max_batched_tokens, 0, 0, 0, 0)
    clock = StepClock()
    executor = PatternExecutor(kv, clock, transient_pages)
    engine = Engine(MODEL, config, memory, kv, executor, clock)
    executor.requests = engine.state.requests
    return engine


def serving(engine, *lengths, steps=3):
    """Requests "a", "b", ... of these prompt lengths, some steps old."""
    requests = []
    for name, length in zip("abcdef", lengths, strict=False):
        engine.add_request([ord(name)] * length, PARAMS, request_id=name)
        requests.append(engine._live[name])
    for _ in range(steps):
        engine.step()
    return requests


def finish(engine, *requests):
    """Serves to the end: everybody has the right tokens, nothing is left."""
    steps = 0
    while engine.has_work():
        engine.step()
        engine.state.check()
        steps += 1
        assert steps < 500, "no end"
    for request in requests:
        assert request.finish_reason == "abort" or request.output == expected_output(request)
    assert engine.store.num_free_pages == engine.store.num_pages and engine.store.num_host_pages == 0
    assert not engine.executor.blocks


def swap_out(engine, request):
    """The policy decides to swap somebody out."""
    engine.state.preempt(request.slot, swap=True)
    assert request.phase is Phase.SWAPPED


def land_all(engine, out):
    """All copies of a direction land."""
    while engine.executor.lanes[out]:
        engine.executor.land(out)
