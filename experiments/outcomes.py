"""A workload served once, as a summary. Imports no JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from engine.summary import Outcomes, Slo, Window, summarise
from experiments.replay import Observer, StopFlag, replay
from experiments.workloads import WorkloadRequest

if TYPE_CHECKING:
    from engine import Engine


class Collected(Observer):
    """What a replay leaves behind."""

    def __init__(self):
        self.completed, self.failed, self.steps, self.why = [], [], [], "all were aborted"

    def on_finished(self, request, output):
        self.completed.append(output.metrics)

    def on_refused(self, request, error):
        self.failed.append(request.arrival_s)
        self.why = str(error)

    def on_step(self, record, progress):
        self.steps.append(record)


def serve_once(engine: Engine, requests: list[WorkloadRequest], stop: StopFlag) -> tuple[Outcomes, Window] | None:
    """What became of the requests, and when the run was; None when it was interrupted.

    Raises:
      ConfigError: not one request completed, and why.
    """
    seen = Collected()
    progress = replay(engine, requests, seen, stop)
    if progress.stopped_by:
        return None
    if not seen.completed:
        raise ConfigError(f"none of {len(requests)} requests completed: {seen.why}")
    return Outcomes(seen.completed, seen.failed, [], seen.steps), Window(progress.start, progress.now)


def measure(
    engine: Engine, requests: list[WorkloadRequest], stop: StopFlag, slo: Slo | None = None
) -> dict[str, Any] | None:
    """The summary of one run (`engine.summary.summarise`, with the number of `steps`); None when it was interrupted.

    Raises:
      ConfigError: not one request completed, and why.
    """
    served = serve_once(engine, requests, stop)
    if served is None:
        return None
    steps = sum(record.repeat for record in served[0].steps)
    return summarise(*served, slo) | {"steps": steps}
