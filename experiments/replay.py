"""Replays a workload against an engine, in the time of its clock.

Open loop: requests arrive when the workload says, whether or not the engine keeps up, and t0 is the scheduled arrival:
the time a request waits while a step runs, before the engine can even learn of it, counts as latency (no coordinated
omission). Closed loop (requests with a `think_s`): a turn's t0 is the end of its session's former turn plus the think
time; a turn that is refused or aborted ends its session, and the turns that never come are counted as dropped.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import signal
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import FolioError, RequestError
from engine.metrics import RequestMetrics, StepRecord
from engine.request import SamplingParams
from experiments.workloads import WorkloadRequest

if TYPE_CHECKING:
    from engine import Engine, RequestOutput

UNREAD = np.zeros(1 << 21, np.int32)  # a prompt of which only the length matters
UNREAD.flags.writeable = False


@dataclass
class Progress:
    """How far a replay got. Times are seconds on the engine's clock."""

    num_requests: int
    start: float
    now: float
    num_arrived: int = 0
    num_refused: int = 0
    num_dropped: int = 0  # turns whose session ended before them
    num_preempted: int = 0
    num_output_tokens: int = 0
    completed: list[RequestMetrics] = field(default_factory=list)
    last_step: StepRecord | None = None
    stopped_by: str | None = None  # SIGINT | SIGTERM

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.now - self.start

    @property
    def num_in_flight(self) -> int:
        """Requests that arrived and neither finished nor were refused."""
        return self.num_arrived - self.num_refused - len(self.completed)


class Schedule:
    """Which requests are due when, in seconds after the start. A closed-loop turn waits for its session's former turn;
    the first of a session, and every other request, is due at its arrival."""

    def __init__(self, requests: Sequence[WorkloadRequest]):
        self._due: list[tuple[float, int, WorkloadRequest]] = []
        self._later: defaultdict[str, deque[tuple[int, WorkloadRequest]]] = defaultdict(deque)
        begun = set()
        for order, r in enumerate(requests):
            if r.session is not None and r.think_s is not None and r.session in begun:
                self._later[r.session].append((order, r))
            else:
                self._due.append((r.arrival_s, order, r))
            begun.add(r.session)
        heapq.heapify(self._due)

    @property
    def next_due(self) -> float | None:
        """When the next request is due; None while only ends of turns can bring one."""
        return self._due[0][0] if self._due else None

    def pop(self) -> WorkloadRequest:
        """Takes the next request; its `arrival_s` is when it is due."""
        due, _, request = heapq.heappop(self._due)
        return request if due == request.arrival_s else dataclasses.replace(request, arrival_s=due)

    def ended(self, request: WorkloadRequest, now: float) -> None:
        """A turn ended: the next one of its session is due after its think time."""
        if self._later.get(request.session or ""):
            order, following = self._later[request.session or ""].popleft()
            assert following.think_s is not None
            heapq.heappush(self._due, (now + following.think_s, order, following))

    def drop(self, request: WorkloadRequest) -> int:
        """The session of `request` ends with it. Returns how many turns will never come."""
        return len(self._later.pop(request.session or "", ()))

    @property
    def num_waiting(self) -> int:
        """Turns that wait for a former one."""
        return sum(map(len, self._later.values())) if self._later else 0


class Observer:
    """What a program does with events; the defaults do nothing."""

    def on_start(self, progress: Progress) -> None:
        """The clock of the run starts."""

    def on_finished(self, request: WorkloadRequest, output: RequestOutput) -> None:
        """A request produced its last token."""

    def on_refused(self, request: WorkloadRequest, error: FolioError) -> None:
        """A request can never be served; the run goes on."""

    def on_step(self, record: StepRecord, progress: Progress) -> None:
        """A step ended."""


class StopFlag:
    """Set by the first signal; the replay then ends between two steps."""

    def __init__(self):
        self.signal: str | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # a second signal does not wait for the step
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """SIGINT and SIGTERM set the flag instead of killing the program; a second one raises KeyboardInterrupt."""
    flag = StopFlag()
    before = {s: signal.signal(s, flag) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def replay(
    engine: Engine,
    requests: Sequence[WorkloadRequest],
    observer: Observer,
    stop: StopFlag,
) -> Progress:
    """Serves `requests` when they are due until all are done or `stop` is set.

    Args:
      requests: in order of arrival; open loop, request i is due `arrival_s` after the start. Observers get them with
        the `arrival_s` at which they really were due.
    """
    now = engine.clock.now()
    progress, schedule = Progress(len(requests), now, now), Schedule(requests)
    engine.step_log.clear()
    engine.partial_outputs = False
    try:
        observer.on_start(progress)
        _serve(engine, schedule, progress, observer, stop)
    finally:
        engine.partial_outputs = True
        engine.promise_quiet()
    progress.stopped_by = stop.signal
    return progress


def _serve(engine: Engine, schedule: Schedule, progress: Progress, observer: Observer, stop: StopFlag) -> None:
    """Until all is done or `stop` is set."""
    clock, live = engine.clock, {}
    while stop.signal is None:
        progress.now = clock.now()
        while (due := schedule.next_due) is not None and progress.start + due <= progress.now:
            request = schedule.pop()
            if _inject(engine, request, progress, observer):
                live[request.id] = request
            else:
                progress.num_dropped += schedule.drop(request)
        if engine.has_work():
            until = math.inf if due is None else progress.start + due
            engine.promise_quiet(until, ends_bring_requests=schedule.num_waiting > 0)
            for output in engine.step():
                request, metrics = live.pop(output.request_id), output.metrics
                progress.completed.append(metrics)
                schedule.ended(request, _end_of(metrics) - progress.start)
                observer.on_finished(request, output)
            progress.now = clock.now()
            while engine.step_log:
                record = engine.step_log.popleft()
                progress.num_preempted += record.num_preempted
                progress.num_output_tokens += record.num_tokens
                progress.last_step = record
                observer.on_step(record, progress)
        elif due is not None:
            clock.wait_until(progress.start + due)
        else:
            progress.num_dropped += schedule.num_waiting  # for turns that somebody aborted
            break


def _inject(engine: Engine, request: WorkloadRequest, progress: Progress, observer: Observer) -> bool:
    """Hands a request to the engine; False when it is refused."""
    params = _params(request.output_len, request.sampling)
    if engine.reads_prompts:
        prompt = request.prompt_tokens(engine.model_config.vocab_size)
    else:
        prompt = UNREAD[: request.prompt_len]
    progress.num_arrived += 1
    try:
        arrival = progress.start + request.arrival_s
        engine.add_request(prompt, params, request_id=request.id, arrival=arrival, priority=request.priority)
    except RequestError as error:
        progress.num_refused += 1
        observer.on_refused(request, error)
        return False
    return True


@lru_cache(4096)
def _params(output_len: int, sampling: tuple[tuple[str, Any], ...]) -> SamplingParams:
    """Exactly `output_len` tokens."""
    return SamplingParams(max_tokens=output_len, ignore_eos=True, **dict(sampling))


def _end_of(metrics: RequestMetrics) -> float:
    """When a finished request ended, on the engine's clock."""
    assert metrics.e2e_s is not None
    return metrics.arrival + metrics.e2e_s
