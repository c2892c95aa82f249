"""A run recorded as it happens, and the same run again on a virtual clock, plan by plan. No JAX here.

engine = RecordingEngine.from_pretrained("base-124m", config)     # serves as any engine does
replay_recording(make_engine, engine.recording)                   # raises Diverged at the first other plan
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.clock import Clock, VirtualClock
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.executor.memory_plan import MemoryPlan
from engine.executor.protocol import Executor
from engine.executor.recording import Event, RecordedExecutor, Recording, RecordingExecutor
from engine.intake import Prompt
from engine.memory.store import KVStore
from engine.request import SamplingParams
from engine.scheduler.plan import Plan
from engine.scheduler.policy import Policy
from engine.tokenizer import Tokenizer


class WatchedPolicy:
    """A policy; `asked(now)` is called whenever it is asked for a plan, one that turns out empty included."""

    def __init__(self, policy: Policy, asked: Callable[[float], None]):
        self.policy, self.mixes, self._asked = policy, policy.mixes, asked

    def plan(self, now: float) -> Plan:
        """See `Policy`."""
        self._asked(now)
        return self.policy.plan(now)


class RecordingEngine(Engine):
    """An engine that keeps in `recording` all that it learns from outside. It never fast-forwards."""

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        memory: MemoryPlan,
        store: KVStore,
        executor: Executor,
        clock: Clock,
        tokenizer: Tokenizer | None = None,
        source: str = "the model",
    ):
        self.recording: Recording = []
        recorder = RecordingExecutor(executor, self.recording, clock)
        super().__init__(model, config, memory, store, recorder, clock, tokenizer, source)
        self.policy = WatchedPolicy(self.policy, lambda now: self.recording.append(Event("plan", now, now)))

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None, **named: Any) -> str:
        """See `Engine`. One that is refused leaves no trace."""
        request_id = super().add_request(prompt, params, **named)
        request = self._live[request_id]
        assert request.injected is not None
        given = {
            "prompt": request.prompt,
            "params": request.params,
            "request_id": request_id,
            "arrival": request.arrival,
            "priority": request.priority,
            "info": request.info,
        }
        self.recording.append(Event("add_request", request.injected, given))
        return request_id

    def abort(self, request_id: str) -> bool:
        """See `Engine`."""
        request, position = self._live.get(request_id), len(self.recording)
        aborted = super().abort(request_id)
        if request is not None and request.finished is not None:
            # What the executor was told of it comes after it.
            self.recording.insert(position, Event("abort", request.finished, request_id))
        return aborted

    def warmup(self) -> list[tuple[str, float]]:
        """See `Engine`. Not recorded."""
        recorder = self.executor
        assert isinstance(recorder, RecordingExecutor)
        self.executor = recorder.inner
        try:
            return super().warmup()
        finally:
            self.executor = recorder


def replay_recording(make_engine: Callable[[Executor, Clock], Engine], recording: Recording) -> int:
    """Takes a fresh engine through a recording on a virtual clock: the same requests and aborts between the same
    plans, the policy asked at the same times, the executor with the same answers. Returns how many plans were compared.

    Args:
      make_engine: an engine around this executor and clock. Model, configuration and sizes of the store are those of
        the recorded engine, which had served nothing before the recording.

    Raises:
      Diverged: a plan, or another call to the executor, differs from the recorded one.
    """
    clock = VirtualClock()
    executor = RecordedExecutor(recording, clock)
    engine = make_engine(executor, clock)
    engine.policy = WatchedPolicy(engine.policy, executor.planned)
    while (event := executor.next) is not None:
        clock.wait_until(event.time)
        if event.call == "add_request":
            engine.add_request(**executor.pop().given)
        elif event.call == "abort":
            engine.abort(executor.pop().given)
        elif event.call == "plan":
            _step(engine, executor)
        else:
            executor.diverge(f"the recording goes on with {event.call}, the engine has ended its step")
    return sum(event.call == "submit" for event in recording)


def _step(engine: Engine, executor: RecordedExecutor) -> None:
    """A step; what the recorded executor raised in it, its driver went on after."""
    try:
        engine.step()
    except Exception as error:
        if error is not executor.failure:
            raise
