"""Serving a workload with everything recorded: what `serve` and `demo` share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig, to_dict
from engine.errors import ConfigError, FolioError
from engine.metrics import RequestMetrics, StepRecord
from engine.summary import Outcomes, Slo, Window, summarise
from experiments import common_flags, environment, provenance
from experiments.replay import Observer, Progress, StopFlag, replay
from experiments.run_record import COMPLETED, RunRecord
from experiments.tables import ProgressLine, format_table
from experiments.workloads import WorkloadRequest
from experiments.workloads.frozen import workload_hash

if TYPE_CHECKING:
    from engine import Engine, RequestOutput

PARTS = {
    "TTFT": "ttft",
    "  queue": "queue",
    "  prefill": "prefill",
    "second token": "ttst",
    "TPOT": "tpot",
    "ITL": "itl",
    "largest gap": "max_gap",
    "E2E": "e2el",
    "injection lag": "injection_lag",
}


class Recorder(Observer):
    """Writes rows as they happen, keeps the progress line fresh, and remembers what the summary needs."""

    def __init__(self, record: RunRecord, line: ProgressLine):
        self._record, self._line = record, line
        self._start = 0.0
        self.completed: list[RequestMetrics] = []
        self.failed: list[float] = []  # arrivals
        self.steps: list[StepRecord] = []  # without their copies

    def on_start(self, progress: Progress) -> None:
        """Times count from here."""
        self._start = progress.start
        self._record.begin(progress.start)

    def on_finished(self, request: WorkloadRequest, output: RequestOutput) -> None:
        """Adds a row to requests.jsonl."""
        metrics = output.metrics
        if output.finish_reason in COMPLETED:
            self.completed.append(metrics)
        else:
            self.failed.append(metrics.arrival)
        self._record.finished(request, output.finish_reason, metrics)

    def on_refused(self, request: WorkloadRequest, error: FolioError) -> None:
        """Adds a row to requests.jsonl, with the reason."""
        self.failed.append(self._start + request.arrival_s)
        self._record.refused(request, error)

    def on_step(self, record: StepRecord, progress: Progress) -> None:
        """Adds a row to steps.jsonl."""
        self.steps.append(dataclasses.replace(record, copies=()) if record.copies else record)
        self._record.step(record)
        self._line.show(progress_text(record, progress))


def progress_text(step: StepRecord, progress: Progress) -> str:
    """One line: how far the run is and what the engine holds."""
    rate = progress.num_output_tokens / max(progress.elapsed, 1e-9)
    return (
        f"{progress.elapsed:6.1f} s  arrived {progress.num_arrived}/{progress.num_requests}"
        f"  done {len(progress.completed)}  running {step.num_running}  waiting {step.num_waiting}"
        f"  free pages {step.free_pages}  preempted {progress.num_preempted}  {rate:.0f} tok/s"
    )


@dataclasses.dataclass(frozen=True)
class Measured:
    """Which part of a run is measured, seconds after its start. None: from the first, to the last arrival."""

    start_s: float | None = None
    end_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Measured:
        """Reads `START:END`, seconds; either may be left out.

        Raises:
          ConfigError: anything else, or nothing between them.
        """
        match = re.fullmatch(r"(\d+\.?\d*)?:(\d+\.?\d*)?", text.strip())
        if not match:
            raise ConfigError(f"--window={text}: expected START:END in seconds, such as 30:120 or 30:")
        start, end = (None if part is None else float(part) for part in match.groups())
        if end is not None and end <= (start or 0.0):
            raise ConfigError(f"--window={text}: the end must be after the start")
        return cls(start, end)

    def window(self, run: Outcomes, t0: float) -> Window:
        """On the engine's clock, where the run started at `t0`."""
        first, last = run.arrivals()
        start = first if self.start_s is None else t0 + self.start_s
        return Window(start, max(start, last if self.end_s is None else t0 + self.end_s))


def serve(
    engine: Engine,
    requests: Sequence[WorkloadRequest],
    record: RunRecord,
    stop: StopFlag,
    slo: Slo | None = None,
    measured: Measured | None = None,
) -> dict[str, Any]:
    """Replays `requests`, writes their rows and summary.json, and returns the summary: vLLM bench names for the whole
    run, drain included, and the same names under `window` for the measured part."""
    line = ProgressLine()
    recorder = Recorder(record, line)
    try:
        progress = replay(engine, requests, recorder, stop)
        unfinished = engine.unfinished()
        for request in requests:
            if request.id in unfinished:
                record.unfinished(request, unfinished[request.id])
    finally:
        line.close()
        record.close()
    run = Outcomes(recorder.completed, recorder.failed, [m.arrival for m in unfinished.values()], recorder.steps)
    window = (measured or Measured()).window(run, progress.start)
    summary = {
        "interrupted": progress.stopped_by is not None,
        "stopped_by": progress.stopped_by,
        "num_requests": len(requests),
        "arrived": progress.num_arrived,
        "in_flight": progress.num_in_flight,
        "not_arrived": len(requests) - progress.num_arrived - progress.num_dropped,
        "dropped": progress.num_dropped,
        "workload_hash": workload_hash(requests, engine.model_config.vocab_size),
        **summarise(run, Window(progress.start, progress.now), slo),
        "window": {
            "start_s": window.start - progress.start,
            "end_s": window.end - progress.start,
            **summarise(run, window, slo),
        },
    }
    record.summary(summary)
    return summary


def latency_table(summary: dict[str, Any]) -> str:
    """Mean, median, P90, P99 and maximum of each latency, in ms: of the whole run, and of the window when that holds
    other requests."""
    statistics = ("mean", "median", "p90", "p99", "max")

    def table(title: str, part_of_run: dict[str, Any]) -> str:
        rows = [[label, *(part_of_run[f"{s}_{part}_ms"] for s in statistics)] for label, part in PARTS.items()]
        return format_table([title, *statistics], rows)

    window = summary["window"]
    tables = [table("ms", summary)]
    if window["sent"] != summary["sent"]:
        tables.append(table(f"ms, due in {window['start_s']:.1f}-{window['end_s']:.1f} s", window))
    return "\n\n".join(tables)


def settings(engine: Engine, model: str, workload: str, requests: Sequence[WorkloadRequest]) -> dict[str, Any]:
    """Everything a run depends on, for config.json."""
    return {
        "model": model,
        "workload": workload,
        "workload_hash": workload_hash(requests, engine.model_config.vocab_size),
        "engine": to_dict(engine.config),
        "model_config": to_dict(engine.model_config),
        "max_context": engine.max_context,
        "num_pages": engine.num_pages,
        "memory": to_dict(engine.memory),
        "flags": common_flags.own_values(),
        **provenance.hashes(engine),
        **environment.describe(),
    }


def start_engine(model: str, config: EngineConfig, warmup: bool) -> Engine:
    """Loads the engine, prints where its memory goes, and compiles every bucket when asked to."""
    engine = common_flags.load_engine(model, config)
    print(engine.memory_table(), flush=True)
    if warmup and not engine.compiled:
        engine.warmup()
    if config.precompile:
        print(format_table(["bucket", "s"], [[bucket, seconds] for bucket, seconds in engine.compiled]))
    if engine.compiled:
        print(f"compiled {len(engine.compiled)} buckets in {sum(s for _, s in engine.compiled):.1f} s", flush=True)
    return engine
