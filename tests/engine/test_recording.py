"""Recordings of engines without a model: whatever fails is recorded and replayed, and differences are named."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pytest

from engine.engine import Engine
from engine.errors import RequestError
from engine.executor.recording import Diverged, difference
from engine.recording import RecordingEngine, replay_recording
from engine.request import SamplingParams
from engine.scheduler.policy import names
from engine.scheduler.sampling_rows import ROW
from engine.scheduler.vllm_v0 import VllmV0
from tests.engine.pattern_engine import pattern_engine, serving
from tests.engine.pattern_executor import Injected
from tests.engine.pattern_model import MODEL

PARKS = "tests.engine.test_parking:ParksAtRandom"


def calls(recording) -> Counter:
    """How often each call was made."""
    return Counter(event.call for event in recording)


def chaos(engine: Engine, executor, rng: np.random.Generator) -> None:
    """Requests, aborts and everything that can fail, at random; then peace."""
    for i in range(60):
        kind = rng.choice(["add", "abort", "land", "fail", "trouble", "step", "step", "step"])
        out = bool(rng.integers(2))
        if kind == "add":
            params = SamplingParams(max_tokens=int(rng.integers(1, 30)), stop_token_ids=(1, 2, 3))
            engine.add_request(rng.integers(0, 200, rng.integers(1, 30)), params, request_id=str(i))
        elif kind == "abort":
            engine.abort(str(rng.integers(i + 1)))
        elif kind == "land" and executor.lanes[out]:
            executor.land(out, ok=rng.random() < 0.7)
        elif kind == "fail":
            executor.fail_start[out] = int(rng.integers(2))
        elif kind == "trouble" and i % 4 == 0:
            executor.fail.add(rng.choice(["poison", "submit", "half way", "collect"]))
        try_step(engine)
    executor.fail.clear()
    executor.fail_start = {True: 0, False: 0}
    while engine.has_work():
        try_step(engine)


def try_step(engine: Engine) -> None:
    """A step, or what was to happen in it."""
    with suppress(Injected):
        engine.step()


def rebuilt(cls, parts: Engine, executor, clock) -> Engine:
    """An engine from the unused parts of another."""
    return cls(MODEL, parts.config, parts.memory, parts.store, executor, clock)


def recording_pattern_engine(**setup) -> RecordingEngine:
    parts = pattern_engine(**setup)
    engine = rebuilt(RecordingEngine, parts, parts.executor, parts.clock)
    parts.executor.requests = engine.state.requests
    return engine


class Patient(VllmV0):
    """While others run, leaves everybody waiting for 3 s, hoping for company: time is what policies may go by."""

    def plan(self, now):
        self.now = now
        return super().plan(now)

    def _admit(self):
        state = self.state
        ready = not len(state.running) or self.now >= state.waiting.head.arrival + 3
        return super()._admit() if ready else []


@pytest.mark.parametrize("async_depth", [0, 1])
def test_a_policy_may_go_by_the_time_it_is_given(async_depth):
    """The replay asks it at the recorded times; had the second request come a second later, it would wait longer."""
    setup, again = {"policy": f"{__name__}:Patient", "async_depth": async_depth}, []
    engine = recording_pattern_engine(**setup)
    serving(engine, 5)
    arrival = engine.clock.now()
    engine.add_request([1, 2], SamplingParams(max_tokens=3))
    while engine.has_work():
        engine.step()
    plans = [e for e in engine.recording if e.call == "plan"]
    submits = [e.given for e in engine.recording if e.call == "submit"]
    second = submits[[bool(p.prefills) for p in submits].index(True, 1)]
    assert [e.given for e in plans if e.given <= arrival + 3][-1] == arrival + 3 and second.step == arrival + 4

    def make(*outside):
        again.append(rebuilt(Engine, pattern_engine(**setup), *outside))
        return again[-1]

    assert replay_recording(make, engine.recording) == len(submits) and again[0].step_log == engine.step_log
    at = [i for i, e in enumerate(engine.recording) if e.call == "add_request"][1]
    event = engine.recording[at]
    engine.recording[at] = replace(event, given=event.given | {"arrival": arrival + 1})
    with pytest.raises(Diverged, match=f"^step {second.step}: plan\\."):
        replay_recording(make, engine.recording)


@pytest.mark.parametrize("policy", [*names(), PARKS])
def test_whatever_fails(policy):
    """Failures are recorded like answers: the replay fails where the run did, and goes on."""
    seen = Counter()
    for seed in range(6):
        setup = {"pages": 16, "host_pages": 300 if policy == PARKS else 60, "policy": policy, "async_depth": seed % 2}
        engine, again = recording_pattern_engine(**setup), []
        chaos(engine, engine.executor.inner, np.random.default_rng(seed))

        def make(*outside, setup=setup, again=again):
            again.append(rebuilt(Engine, pattern_engine(**setup), *outside))
            return again[0]

        assert replay_recording(make, engine.recording) == calls(engine.recording)["submit"]
        assert again[0].step_log == engine.step_log and not again[0].has_work()
        seen += calls(engine.recording)
        seen["failed"] += sum(isinstance(event.answer, Exception) for event in engine.recording)
    assert all(seen[call] for call in ("abort", "wait_for_copies", "abandon", "drop", "failed")), seen


def test_generate_and_stream_are_recorded():
    """They add and abort requests themselves; one that is refused leaves no trace."""
    engine = recording_pattern_engine()
    with pytest.raises(RequestError, match="outside the vocabulary"):
        engine.generate([[1, 2], [1000]])
    assert calls(engine.recording) == {"add_request": 1, "abort": 1}
    engine.generate([[1, 2, 3], [4] * 20], SamplingParams(max_tokens=5))
    for _ in engine.stream([5, 6], SamplingParams(max_tokens=50)):
        break
    assert calls(engine.recording)["abort"] == 2
    count = replay_recording(lambda *outside: rebuilt(Engine, pattern_engine(), *outside), engine.recording)
    assert count == len(engine.executor.inner.plans)


def test_warm_up_is_not_recorded(monkeypatch):
    """It is the recorded executor's own affair."""
    engine, seen = recording_pattern_engine(), []
    recorder = engine.executor
    monkeypatch.setattr("engine.builder.warm_up", lambda engine: seen.append(engine.executor) or [])
    engine.warmup()
    assert seen == [recorder.inner] and engine.executor is recorder and not engine.recording


@dataclass(frozen=True)
class Value:
    """Something with parts."""

    number: int
    parts: tuple[np.ndarray, ...]


def test_differences_are_named():
    """Where, and both values; a bit, a dtype, a length and a type count."""

    def value(*arrays, number=1):
        return Value(number, arrays)

    one = np.arange(4, dtype=np.int32).reshape(2, 2)
    nan = np.array([np.nan, 0.0])
    assert difference(value(one, nan), value(one.copy(), nan.copy()), "v") is None
    other = one.copy()
    other[1, 0] = 9
    assert difference(value(nan, one), value(nan, other), "v") == "v.parts[1][1, 0] was 2, is 9"
    assert difference(nan, nan * [1, -1], "v") == "v[1] was 0.0, is -0.0"
    assert difference(value(one), value(one.copy(), one), "v").startswith("v.parts was (array([[0, 1], [2, 3]], ")
    assert difference(value(one), value(one.astype(np.int64)), "v") == (
        "v.parts[0] was array([[0, 1], [2, 3]], dtype=int32), is array([[0, 1], [2, 3]])"
    )
    assert difference(value(number=1), value(number=2), "v") == "v.number was 1, is 2"
    assert difference(None, one[0], "v") == "v was None, is array([0, 1], dtype=int32)"
    rows = np.zeros(2, ROW)
    hot = rows.copy()
    hot["temperature"][1] = 1
    assert difference(rows, hot, "v").startswith("v[1] was (0.0, 0, ")
