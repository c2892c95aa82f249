"""Serving a workload with everything recorded: what `serve` and `demo` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig, to_dict
from engine.errors import FolioError
from engine.metrics import Slo, StepRecord, summarise
from experiments import common_flags, environment
from experiments.replay import Observer, Progress, StopFlag, replay
from experiments.run_record import RunRecord
from experiments.tables import ProgressLine, format_table
from experiments.workloads import WorkloadRequest
from experiments.workloads.frozen import workload_hash

if TYPE_CHECKING:
    from engine import Engine, RequestOutput

PARTS = {
    "TTFT": "ttft",
    "  queue": "queue",
    "  prefill": "prefill",
    "TPOT": "tpot",
    "ITL": "itl",
    "largest gap": "max_gap",
    "E2E": "e2el",
    "injection lag": "injection_lag",
}


class Recorder(Observer):
    """Writes rows as they happen and keeps the progress line fresh."""

    def __init__(self, record: RunRecord, line: ProgressLine):
        self._record = record
        self._line = line

    def on_finished(self, request: WorkloadRequest, output: RequestOutput) -> None:
        """Adds a row to requests.jsonl."""
        self._record.finished(request, output.finish_reason, output.metrics)

    def on_refused(self, request: WorkloadRequest, error: FolioError) -> None:
        """Adds a row to requests.jsonl, with the reason."""
        self._record.refused(request, error)

    def on_step(self, record: StepRecord, progress: Progress) -> None:
        """Adds a row to steps.jsonl."""
        self._record.step(record, progress.start)
        self._line.show(progress_text(record, progress))


def progress_text(step: StepRecord, progress: Progress) -> str:
    """One line: how far the run is and what the engine holds."""
    rate = progress.num_output_tokens / max(progress.elapsed, 1e-9)
    return (
        f"{progress.elapsed:6.1f} s  arrived {progress.num_arrived}/{progress.num_requests}"
        f"  done {len(progress.completed)}  running {step.num_running}  waiting {step.num_waiting}"
        f"  free pages {step.free_pages}  preempted {progress.num_preempted}  {rate:.0f} tok/s"
    )


def serve(
    engine: Engine, requests: Sequence[WorkloadRequest], record: RunRecord, stop: StopFlag, slo: Slo | None = None
) -> dict[str, Any]:
    """Replays `requests`, writes their rows and summary.json, and returns the summary."""
    line = ProgressLine()
    try:
        progress = replay(engine, requests, Recorder(record, line), stop)
    finally:
        line.close()
        record.close()
    summary = {
        "interrupted": progress.stopped_by is not None,
        "stopped_by": progress.stopped_by,
        "num_requests": len(requests),
        "arrived": progress.num_arrived,
        "in_flight": progress.num_in_flight,
        "not_arrived": len(requests) - progress.num_arrived - progress.num_dropped,
        "dropped": progress.num_dropped,
        "workload_hash": workload_hash(requests, engine.model_config.vocab_size),
        **summarise(progress.completed, progress.elapsed, failed=progress.num_refused, slo=slo),
    }
    record.summary(summary)
    return summary


def latency_table(summary: dict[str, Any]) -> str:
    """Mean, median, P90, P99 and maximum of each latency, in ms."""
    statistics = ("mean", "median", "p90", "p99", "max")
    rows = [[label, *(summary[f"{s}_{part}_ms"] for s in statistics)] for label, part in PARTS.items()]
    return format_table(["ms", *statistics], rows)


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
