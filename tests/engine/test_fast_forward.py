"""The virtual clock passes identical decode steps at once: to the bit what stepping through them gives."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.clock import VirtualClock
from engine.config import CacheConfig, EngineConfig, LayerKVConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.link import Link
from engine.executor.memory_plan import MemoryPlan
from engine.executor.pipeline_executor import PipelineExecutor
from engine.executor.sim_executor import SimExecutor
from engine.memory.blocks import BlockStore
from engine.memory.host import HostTier
from engine.memory.pages import PagePool
from engine.memory.staged import StagedPool
from engine.memory.stores import make_store, paged_store
from engine.request import SamplingParams
from engine.scheduler.policy import parks
from experiments.replay import Observer, StopFlag, replay
from experiments.workloads import WorkloadRequest
from tests.engine.executor.flat_cost import FlatCost

MODEL = ModelConfig("sim", 2, 8, 2, 1, 4, 8, 100, 4096)


class Steps(Observer):
    def __init__(self):
        self.records = []

    def on_step(self, record, progress):
        self.records.append(record)


def sim_engine(
    cost,
    *,
    num_pages=400,
    pages_per_chunk=1,
    depth=1,
    max_context=1024,
    store="paged",
    host_pages=0,
    transient_pages=0,
    stages=1,
    spare=0,
    unit=0.0,
    **scheduler,
):
    """An engine over `cost`; `store` may be "blocks", or "staged": one pool per layer, the second with `spare` pages
    more; with two `stages` the second one, of the second layer, takes half as long."""
    config = EngineConfig(
        cache=CacheConfig(num_pages=num_pages, host_bytes=host_pages, transient_pages=transient_pages),
        scheduler=SchedulerConfig(**{"max_num_seqs": 8, "watermark": 0.0, **scheduler}),
        async_depth=depth,
        debug_checks=True,
    )
    host = HostTier(host_pages) if host_pages else None
    if store == "blocks":
        kv = BlockStore(num_pages, 2, 8, 16, max_context, host)
    elif store == "staged":
        pools = [PagePool(num_pages // 2 + more, 1, pages_per_chunk) for more in (0, spare)]
        kv = paged_store(StagedPool(pools), 8, 16, max_context, host, transient_pages)
    else:
        kv = make_store(store, num_pages, 2, pages_per_chunk, 8, 16, max_context, host, transient_pages)
    memory = MemoryPlan(kv.num_pages, pages_per_chunk, 1, max_context, "", 256, 0, 0, 0, 0)
    clock = VirtualClock()
    links = [(Link(256.0, 0.0, unit), Link(256.0, 0.0, unit)) for _ in range(stages)]
    executor = SimExecutor(cost, config, clock, 1, *links[0])
    if stages > 1:
        parts = (
            FlatCost(host=cost.host, layers=range(1), collective=cost.collective),
            FlatCost(1 / 128, 1 / 2048, host=cost.host, layers=range(1, 2), collective=cost.collective),
        )
        executor = PipelineExecutor(parts, config, clock, 1, links)
    return Engine(MODEL, config, memory, kv, executor, clock)


def outcome(engine, requests, fast: bool):
    """Metrics of every request, and the steps with those that stand for several written out."""
    if not fast:
        engine._fast_forward = None
    log = Steps()
    progress = replay(engine, requests, log, StopFlag())
    assert len(progress.completed) == len(requests)
    steps = [(r.step + i, r.num_decode) for r in log.records for i in range(r.repeat)]
    engine.state.check()
    assert engine.store.num_mapped_pages == 0
    assert sum(r.num_tokens for r in log.records) == sum(r.output_len for r in requests)
    last = dataclasses.replace(log.records[-1], step=0, repeat=1, start=0.0, num_tokens=0)
    return {m.arrival: m for m in progress.completed}, steps, last, len(log.records)


REQUESTS = st.lists(
    st.tuples(st.integers(0, 48), st.integers(1, 200), st.integers(1, 120), st.integers(0, 2)), min_size=3, max_size=16
)


def workload(rows):
    times = sorted({(gap + i / 64) / 32 for i, (gap, *_) in enumerate(rows)})
    return [
        WorkloadRequest(str(i), at, prompt, output, i, priority=priority)
        for i, (at, (_, prompt, output, priority)) in enumerate(zip(times, rows, strict=True))
    ]


LOADS = {
    "rows": REQUESTS,
    "depth": st.sampled_from([0, 1]),
    "pages": st.sampled_from([48, 64, 200]),
    "host": st.sampled_from([0.0, 1 / 128, 1 / 8]),
    "order": st.sampled_from(["fcfs", "sjf", "priority"]),
    "watermark": st.sampled_from([0.0, 0.1]),
    "swap": st.booleans(),
}
KNOBS = st.builds(
    LayerKVConfig,
    chunked=st.booleans(),
    retain=st.sampled_from(["spare", "minimum"]),
    stream=st.sampled_from(["hidden", "urgent", "always", "never"]),
    tpot_slo=st.sampled_from([1 / 64, 1 / 32, 1.0]),  # a decode step takes 1 / 64 and more
    lost=st.sampled_from(["ignore", "block"]),
    forecast=st.booleans(),
    horizon=st.sampled_from([8, 64]),
)
quick = settings(max_examples=40, deadline=None)


def load(policy, rows, depth, pages, host, order, watermark, swap, chunk=1, collective=0.0, knobs=None):
    """Requests that fit a pool of `pages`, and how an engine for them is made."""
    context = 16 * (pages // 2 // chunk) * chunk
    requests = [
        dataclasses.replace(r, prompt_len=min(r.prompt_len, 150), output_len=min(r.output_len, context // 4))
        for r in workload(rows)
    ]
    settings = {"policy": policy, "order": order, "watermark": watermark, "preemption": "swap" if swap else "recompute"}
    sizes = {"num_pages": pages, "pages_per_chunk": chunk, "max_context": context, "host_pages": 200 * swap}
    if knobs:
        settings["layerkv"], sizes["host_pages"] = knobs, 200
        sizes["transient_pages"] = context // 16 * parks(SchedulerConfig(policy))
    cost = FlatCost(host=host, collective=collective)
    return requests, lambda **more: sim_engine(cost, depth=depth, **sizes, **settings, **more)


def same_at_once_as_step_by_step(make, requests):
    metrics, steps, last, _ = outcome(make(), requests, fast=True)
    metrics_0, steps_0, last_0, _ = outcome(make(), requests, fast=False)
    assert metrics == metrics_0
    assert steps == steps_0
    assert last == last_0


@pytest.mark.parametrize("policy", ["vllm_v0", "vllm_v1", "chunked"])
@quick
@given(**LOADS, chunk=st.sampled_from([1, 4]))
def test_passing_steps_at_once_is_stepping_through_them(policy, **case):
    requests, make = load(policy, **case)
    same_at_once_as_step_by_step(make, requests)


@pytest.mark.parametrize("policy", ["layerkv", "paged_park"])
@quick
@given(**LOADS, chunk=st.sampled_from([1, 4]), knobs=KNOBS, stages=st.sampled_from([1, 1, 2]))
def test_and_so_it_is_where_policies_learn_from_what_they_see(policy, stages, **case):
    """Steps and copies that were seen say what the next take: of steps passed at once each counts."""
    requests, make = load(policy, **case)
    same_at_once_as_step_by_step(lambda: make(store="staged" if stages > 1 else "paged", stages=stages), requests)


@pytest.mark.parametrize("policy, most", [("layerkv", 40), ("paged_park", 16)])
def test_policies_that_learn_pass_long_decodes_at_once_too(policy, most):
    """LayerKV as far as its forecast has nothing to say: 6 or 7 pages of each layer are mapped by each request of 116
    tokens, of 200."""
    knobs = {"host_pages": 100, "transient_pages": 100 if policy == "layerkv" else 0}
    engine = sim_engine(FlatCost(), policy=policy, **knobs)
    requests = [WorkloadRequest("a", 0.0, 16, 100), WorkloadRequest("b", 0.5, 16, 100)]
    *_, num_records = outcome(engine, requests, fast=True)
    assert num_records < most


@pytest.mark.parametrize("policy", ["vllm_v0", "vllm_v1", "chunked"])
@settings(quick, max_examples=20)
@given(**LOADS, chunk=st.sampled_from([1, 4]), spare=st.sampled_from([0, 8]))
def test_and_so_it_is_in_a_pipeline(policy, spare, **case):
    """Two stages with pools of their own: steps overlap, rows wait for their own tokens only."""
    requests, make = load(policy, **case)
    same_at_once_as_step_by_step(lambda: make(store="staged", stages=2, spare=spare), requests)


@pytest.mark.parametrize("stages", [1, 2])
@settings(quick, max_examples=20)
@given(**LOADS | {"swap": st.just(True), "pages": st.just(48)}, unit=st.sampled_from([1, 16, 300]))
def test_and_so_it_is_when_all_reduces_wait_for_copies(stages, unit, **case):
    """Swapped sequences leave and come back in units, on links that all-reduces hold for 1/512 s a layer."""
    requests, make = load("vllm_v1", **case, collective=1 / 512)
    store = "staged" if stages > 1 else "paged"
    same_at_once_as_step_by_step(lambda: make(store=store, stages=stages, unit=unit), requests)


@pytest.mark.parametrize("policy", ["vllm_v0", "vllm_v1", "chunked"])
@quick
@given(**LOADS, think=st.sampled_from([0.0, 0.25]), turns=st.integers(2, 4))
def test_and_so_it_is_when_ends_bring_requests(policy, think, turns, **case):
    """A closed loop: a turn of a session is due its think time after the former one has ended."""
    requests, make = load(policy, **case)
    requests = [
        dataclasses.replace(r, session=str(i // turns), turn=i % turns, think_s=think) for i, r in enumerate(requests)
    ]
    metrics, steps, last, _ = outcome(make(), requests, fast=True)
    metrics_0, steps_0, last_0, _ = outcome(make(), requests, fast=False)
    assert metrics == metrics_0
    assert steps == steps_0
    assert last == last_0


def test_a_promise_ends_with_the_replay():
    """Whoever drives the engine by hand after a replay gets one step at a time."""
    engine = sim_engine(FlatCost())
    outcome(engine, [WorkloadRequest("a", 0.0, 16, 100)], fast=True)
    engine.add_request([1] * 8, SamplingParams(max_tokens=50))
    assert sum(len(out.new_token_ids) for _ in range(4) for out in engine.step()) <= 4


@pytest.mark.parametrize("policy", ["vllm_v0", "vllm_v1", "chunked"])
@quick
@given(**LOADS)
def test_blocks_of_all_layers_serve_as_pages_do(policy, **case):
    requests, make = load(policy, **case)
    assert outcome(make(store="blocks"), requests, fast=True) == outcome(make(), requests, fast=True)


@pytest.mark.parametrize("policy", ["vllm_v0", "vllm_v1", "chunked"])
@settings(quick, max_examples=20)
@given(**LOADS, spare=st.sampled_from([0, 8]))
def test_blocks_serve_as_the_pools_of_stages_do(policy, spare, watermark, **case):
    """While a sequence's layers stay together, the stage with the fewest pages decides; what the other has more is of
    no use, though a watermark would count it."""
    requests, make = load(policy, watermark=0.0 if spare else watermark, **case)
    metrics, steps, last, num_records = outcome(make(store="staged", spare=spare), requests, fast=True)
    last = dataclasses.replace(last, free_pages=last.free_pages - spare)
    assert (metrics, steps, last, num_records) == outcome(make(store="blocks"), requests, fast=True)


@pytest.mark.parametrize("stages", [1, 2])
def test_long_decodes_take_few_plans(stages):
    """One request of 100 tokens alone, and one that comes in between: two prefills, and decodes between events."""
    engine = sim_engine(FlatCost(), stages=stages)
    requests = [WorkloadRequest("a", 0.0, 16, 100), WorkloadRequest("b", 0.5, 16, 100)]
    *_, num_records = outcome(engine, requests, fast=True)
    assert num_records < 16
