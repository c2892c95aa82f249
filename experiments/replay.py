"""Replays a workload against an engine in real time, open loop.

Requests arrive when the workload says, whether or not the engine keeps up, and t0 is the scheduled arrival: the time a
request waits while a step runs, before the engine can even learn of it, counts as latency (no coordinated omission).
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from engine.errors import FolioError, RequestError
from engine.metrics import RequestMetrics, StepRecord
from engine.request import SamplingParams
from experiments.workloads import WorkloadRequest

if TYPE_CHECKING:
    from engine import Engine, RequestOutput

IDLE_SLICE = 0.05  # seconds of sleep between looks at the stop flag


@dataclass
class Progress:
    """How far a replay got. Times are seconds on the engine's clock."""

    num_requests: int
    start: float
    now: float
    num_arrived: int = 0
    num_refused: int = 0
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
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> Progress:
    """Serves `requests` at their arrival times until all are done or `stop` is set.

    Args:
      requests: in order of arrival; request i is due `arrival_s` after the start.
      sleep: waits that many seconds on the engine's clock.
    """
    clock, vocab_size = engine.clock, engine.model_config.vocab_size
    progress = Progress(len(requests), clock.now(), clock.now())
    due, by_id = deque(requests), {r.id: r for r in requests}
    engine.step_log.clear()
    observer.on_start(progress)
    while stop.signal is None:
        progress.now = clock.now()
        while due and progress.start + due[0].arrival_s <= progress.now:
            _inject(engine, due.popleft(), vocab_size, progress, observer)
        if engine.has_work():
            for output in engine.step():
                progress.num_output_tokens += len(output.new_token_ids)
                if output.finished:
                    progress.completed.append(output.metrics)
                    observer.on_finished(by_id[output.request_id], output)
            progress.now = clock.now()
            while engine.step_log:
                record = engine.step_log.popleft()
                progress.num_preempted += record.num_preempted
                progress.last_step = record
                observer.on_step(record, progress)
        elif due:
            sleep(min(IDLE_SLICE, progress.start + due[0].arrival_s - progress.now))
        else:
            break
    progress.stopped_by = stop.signal
    return progress


def _inject(engine: Engine, request: WorkloadRequest, vocab_size: int, progress: Progress, observer: Observer) -> None:
    params = SamplingParams(max_tokens=request.output_len, ignore_eos=True)
    prompt = request.prompt_tokens(vocab_size)
    progress.num_arrived += 1
    try:
        engine.add_request(prompt, params, request_id=request.id, arrival=progress.start + request.arrival_s)
    except RequestError as error:
        progress.num_refused += 1
        observer.on_refused(request, error)
