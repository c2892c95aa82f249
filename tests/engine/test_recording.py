"""Recordings of engines without a model: whatever fails is recorded and replayed, and differences are named."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest

from engine.engine import Engine
from engine.errors import RequestError
from engine.executor.recording import difference
from engine.recording import RecordingEngine, replay_recording
from engine.request import SamplingParams
from engine.scheduler.policy import names
from engine.scheduler.sampling_rows import ROW
from tests.engine.pattern_engine import pattern_engine
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
