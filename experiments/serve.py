"""Serves a workload on the real engine, in real time, and records what happened.

    python -m experiments.serve --model=base-124m --workload=synthetic:rate=2,num=50 --out=results/first

Requests arrive open loop at the workload's times; latencies count from the scheduled arrival. Writes config.json,
flags.txt, requests.jsonl, steps.jsonl and summary.json under --out, rows as they happen. Ctrl-C (or SIGTERM) ends the
run between two steps, keeps what was done, and says how far it got. The last line printed is one JSON object.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from engine.config import EngineConfig, to_dict
from engine.errors import FolioError
from engine.metrics import Slo, StepRecord, summarise
from experiments import common_flags, environment, workloads
from experiments.replay import Observer, Progress, StopFlag, replay, stop_on_signals
from experiments.run_record import RunRecord, claim
from experiments.tables import ProgressLine, format_table, rounded
from experiments.workloads import WorkloadRequest

if TYPE_CHECKING:
    from engine import Engine, RequestOutput

flags.adopt_module_key_flags(common_flags)
WORKLOAD = flags.DEFINE_string("workload", "synthetic:num=20", "Workload spec; experiments/workloads.py explains them.")
WARMUP = flags.DEFINE_bool("warmup", True, "Compile every bucket before the first arrival.")
GOODPUT = flags.DEFINE_string("goodput", None, "Limits in ms, such as ttft:500,tpot:100: adds goodput and attainment.")

HEADLINE = (
    "completed", "failed", "interrupted", "duration", "request_throughput", "output_throughput", "mean_ttft_ms",
    "mean_queue_ms", "mean_prefill_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_itl_ms", "max_injection_lag_ms",
    "total_preemptions", "request_goodput", "slo_attainment",
)  # fmt: skip
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
        "not_arrived": len(requests) - progress.num_arrived,
        **summarise(progress.completed, progress.elapsed, failed=progress.num_refused, slo=slo),
    }
    record.summary(summary)
    return summary


def latency_table(summary: dict[str, Any]) -> str:
    """Mean, median, P90, P99 and maximum of each latency, in ms."""
    statistics = ("mean", "median", "p90", "p99", "max")
    rows = [[label, *(summary[f"{s}_{part}_ms"] for s in statistics)] for label, part in PARTS.items()]
    return format_table(["ms", *statistics], rows)


def settings(engine: Engine, model: str, workload: str) -> dict[str, Any]:
    """Everything a run depends on, for config.json."""
    return {
        "model": model,
        "workload": workload,
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
    if warmup:
        programs = engine.warmup()
        print(f"compiled {len(programs)} buckets in {sum(s for _, s in programs):.1f} s", flush=True)
    return engine


def main() -> int:
    """The program."""
    # Everything that can be wrong with the input is found out before anything slow starts.
    model, config = common_flags.required_model(), common_flags.engine_config_from_flags()
    workload = WORKLOAD.value
    requests = workloads.build(workload)
    slo = Slo.parse(GOODPUT.value) if GOODPUT.value else None
    directory = claim(common_flags.out_directory("serve"), common_flags.OVERWRITE.value)
    engine = start_engine(model, config, WARMUP.value)
    record = RunRecord(directory)
    record.config(settings(engine, model, workload))
    with stop_on_signals() as stop:
        summary = serve(engine, requests, record, stop, slo)
    print(latency_table(summary))
    if summary["interrupted"]:
        print(
            f"interrupted by {summary['stopped_by']} after {summary['duration']:.1f} s: {summary['completed']} of "
            f"{len(requests)} completed, {summary['in_flight']} in flight, {summary['not_arrived']} not arrived"
        )
    print(f"results in {record.directory}")
    headline = {"bench": "serve", "model": model, "workload": workload}
    print(json.dumps(headline | {k: rounded(summary[k]) for k in HEADLINE if k in summary}))
    return 128 + signal.Signals[stop.signal] if stop.signal else 0


if __name__ == "__main__":
    common_flags.run_main(main)
