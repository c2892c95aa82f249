"""Replay identity: what a run of the real engine was told, told again on the virtual clock, gives the same plans.

Loads come in real time, in a pool that is too small, and end by stop tokens: when what happens depends on this machine.
Then policies that ask for more than they are given, and recordings with one thing changed: each is found.
"""

import math
import time
from collections import Counter, deque
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest

from engine.config import EngineConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.memory_plan import MemoryPlan
from engine.executor.recording import Diverged
from engine.memory.host import HostTier
from engine.memory.stores import make_store
from engine.recording import RecordingEngine, replay_recording
from engine.request import SamplingParams
from engine.scheduler.policy import names, needs_host, parks, token_budget
from engine.scheduler.vllm_v1 import VllmV1
from tests.engine.tiny import NARROW, prompts, tiny_engine

PARKS = "tests.engine.test_parking:ParksAtRandom"
STATIC = "tests.conformance.example_policy:StaticBatching"
PAGES, HOST_PAGES, CONTEXT = 14, 28, 224  # pages per layer: three of the longest prompts, and few of their tokens
OUTPUT, STOPS = 16, tuple(range(0, 512, 16))


@dataclass(frozen=True)
class Due:
    """A request of the load."""

    at: float  # seconds after the start
    prompt: list[int]
    params: SamplingParams
    priority: int
    abort_after: int | None  # tokens


def load() -> list[Due]:
    """Four requests at once that fill the pool and run long; then ten in 30 ms that may end at any token, one of which
    is aborted."""
    at = [0.0] * 4 + [0.003 * i for i in range(10)]
    lengths = [63] * 4 + [20, 33, 40, 17, 63, 50, 5, 63, 31, 16]
    rest = [{"stop_token_ids": STOPS}, {"stop_token_ids": STOPS, "temperature": 1.0}, {"forced_tokens": (3, 5)}]
    kinds = [{}] * 4 + [rest[i % 3] for i in range(10)]
    return [
        Due(t, prompt, SamplingParams(max_tokens=OUTPUT, ignore_eos=True, **kind), i % 3, 3 if i == 5 else None)
        for i, (t, prompt, kind) in enumerate(zip(at, prompts(lengths), kinds, strict=True))
    ]


@lru_cache(None)
def device(store: str) -> Engine:
    """What the runs share: programs, device memory. Copies take some steps."""
    paged = store == "paged"
    return tiny_engine(
        NARROW,
        num_pages=PAGES if paged else 4 * PAGES,
        host_pages=HOST_PAGES,
        transient_pages=2 * PAGES if paged else 0,
        store=store,
        max_context=CONTEXT,
        deterministic=True,
        capture_logits=False,
        poison=False,
        link_gbs=0.02,
    )


@dataclass(frozen=True)
class Setup:
    """How engines of one recording are put together: the recorded one, and those that replay it."""

    config: EngineConfig
    memory: MemoryPlan

    def engine(self, cls, executor, clock):
        """One around a store that was never used."""
        cache, memory = self.config.cache, self.memory
        sizes = memory.num_slots, cache.page_size, memory.max_context
        host = HostTier(HOST_PAGES * NARROW.num_layers)
        store = make_store(cache.store, memory.num_pages, NARROW.num_layers, 1, *sizes, host, cache.transient_pages)
        Nosy.clock = clock
        return cls(NARROW, self.config, memory, store, executor, clock)

    def replay(self, recording) -> tuple[Engine, int]:
        """The engine that replayed it, and how many plans were compared."""
        engines = []

        def make(executor, clock):
            engines.append(self.engine(Engine, executor, clock))
            return engines[0]

        count = replay_recording(make, recording)
        return engines[0], count


def serve(engine: Engine, load: list[Due]) -> tuple[dict, dict]:
    """Serves a load in real time. Outputs by request, and how long the recording was when each ended."""
    due, start, done, ends = deque(load), engine.clock.now(), {}, {}
    while due or engine.has_work():
        while due and start + due[0].at <= engine.clock.now():
            r = due.popleft()
            engine.add_request(r.prompt, r.params, arrival=start + r.at, priority=r.priority, info={"load": r})
        outputs = engine.step()
        for out in outputs:
            if out.finished:
                done[out.request_id], ends[out.request_id] = out, len(engine.recording)
            elif len(out.token_ids) == load[int(out.request_id.split("-")[1])].abort_after:
                assert engine.abort(out.request_id)
        if not outputs:
            engine.clock.wait_until(engine.clock.now() + 0.0005)
    return done, ends


def record(policy: str, store: str = "paged", async_depth: int = 1, **scheduler):
    """A real run of the load. (setup, recorded engine, outputs, ends)"""
    base = device(store)
    limits = replace(base.config.scheduler, policy=policy, max_num_batched_tokens=64, **scheduler)
    config = replace(base.config, async_depth=async_depth, scheduler=limits)
    setup = Setup(config, replace(base.memory, max_batched_tokens=token_budget(limits, CONTEXT)))
    engine = setup.engine(RecordingEngine, base.executor, base.clock)
    return setup, engine, *serve(engine, load())


def check_replay(setup, engine, outputs, _) -> None:
    """The recorded run is replayed: the same plans, and so the same log of steps, times included."""
    assert len(outputs) == 13 and {o.finish_reason for o in outputs.values()} == {"stop", "length"}
    replayed, count = setup.replay(engine.recording)
    assert count == len(engine.step_log) > 20
    assert replayed.step_log == engine.step_log
    assert not replayed.has_work() and replayed.store.num_free_pages == replayed.store.num_pages


def calls(recording) -> Counter:
    """How often each call was made."""
    return Counter(event.call for event in recording)


@pytest.mark.parametrize("async_depth", [0, 1])
@pytest.mark.parametrize("preemption, order", [("recompute", "fcfs"), ("swap", "sjf"), ("swap", "priority")])
@pytest.mark.parametrize("policy", names())
def test_paged(policy, preemption, order, async_depth):
    """Every policy, in a pool that is too small."""
    run = record(policy, preemption=preemption, order=order, async_depth=async_depth)
    moves = needs_host(run[0].config.scheduler)
    assert moves or sum(o.metrics.num_preemptions for o in run[2].values()) > 0
    assert (calls(run[1].recording)["drop"] > 0) == (moves or preemption == "swap")
    check_replay(*run)


ON_NATIVE = [policy for policy in names() if not parks(SchedulerConfig(policy))]


@pytest.mark.parametrize("async_depth", [0, 1])
@pytest.mark.parametrize("policy, order", [(p, "fcfs") for p in [*ON_NATIVE, STATIC]] + [("vllm_v1", "sjf")])
def test_native(policy, order, async_depth):
    """A slot is a place for the longest sequence: nobody is preempted."""
    check_replay(*record(policy, "native", order=order, async_depth=async_depth))


@pytest.mark.parametrize("async_depth", [0, 1])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_parked_layers(preemption, async_depth):
    """When copies land decides what can be parked, streamed or brought home."""
    setup, engine, *rest = record(PARKS, preemption=preemption, async_depth=async_depth)
    assert engine.policy.policy.streamed > 0
    check_replay(setup, engine, *rest)


class Nosy(VllmV1):
    """Admits one at a time when it drives a virtual clock."""

    clock = None

    def _admissions(self, budget):
        alone = type(self.clock).__name__ == "VirtualClock" and len(self.state.running)
        return iter(()) if alone else super()._admissions(budget)


class ByTheWall(VllmV1):
    """Admits one at a time after a certain hour."""

    hour = math.inf

    def _admissions(self, budget):
        alone = time.perf_counter() > self.hour and len(self.state.running)
        return iter(()) if alone else super()._admissions(budget)


@pytest.mark.parametrize("policy", [Nosy, ByTheWall])
def test_policies_that_ask_for_more_are_found(policy, monkeypatch):
    """Whose executor it is, what the wall clock says."""
    monkeypatch.setattr(ByTheWall, "hour", time.perf_counter() + 3600)
    setup, engine, *_ = record(f"{__name__}:{policy.__name__}")
    monkeypatch.setattr(time, "perf_counter", lambda: ByTheWall.hour + 1)  # the same recording an hour later
    with pytest.raises(Diverged, match=r"^step \d+: plan\.|^after step \d+: submit of step \d+ comes next"):
        setup.replay(engine.recording)


def test_an_end_that_moves_is_found():
    """A row that stopped goes on: its slot and its pages are taken later."""
    setup, engine, outputs, ends = record("vllm_v1")
    stopped = min(ends[i] for i, o in outputs.items() if o.finish_reason == "stop" and len(o.token_ids) < OUTPUT)
    at = max(i for i in range(stopped) if engine.recording[i].call == "collect")
    event = engine.recording[at]
    tokens = np.where(np.isin(event.answer.tokens, STOPS), 1, event.answer.tokens)
    engine.recording[at] = replace(event, answer=event.answer._replace(tokens=tokens))
    with pytest.raises(Diverged, match="step"):
        setup.replay(engine.recording)


def test_a_copy_that_lands_later_is_found():
    """A step later it has other company."""
    setup, engine, *_ = record(PARKS, async_depth=0)
    results = [i for i, e in enumerate(engine.recording) if e.call == "collect"]
    at, later = next((i, j) for i, j in pairwise(results) if engine.recording[i].answer.copies)
    event, after = engine.recording[at], engine.recording[later]
    copies = event.answer.copies + after.answer.copies
    engine.recording[at] = replace(event, answer=event.answer._replace(copies=()))
    engine.recording[later] = replace(after, answer=after.answer._replace(copies=copies))
    with pytest.raises(Diverged, match="step"):
        setup.replay(engine.recording)


def test_an_arrival_that_moves_is_found():
    """The second request, after the first plan instead of before it."""
    setup, engine, *_ = record("vllm_v1")
    first = next(i for i, e in enumerate(engine.recording) if e.call == "submit")
    assert [e.call for e in engine.recording[:2]] == ["add_request"] * 2
    engine.recording.insert(first, engine.recording.pop(1))
    with pytest.raises(Diverged, match=r"^step 1: plan\.prefills\["):
        setup.replay(engine.recording)


def test_a_recording_that_ends_early_is_found():
    setup, engine, *_ = record("vllm_v0")
    last = max(i for i, e in enumerate(engine.recording) if e.call == "submit")
    with pytest.raises(Diverged, match="nothing comes next in the recording, the engine goes on with submit"):
        setup.replay(engine.recording[:last])
