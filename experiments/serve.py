"""Serves a workload on the real engine, in real time, and records what happened.

    python -m experiments.serve --model=base-124m --workload=synthetic:rate=2,num=50 --out=results/first

Requests arrive at the workload's times (or, closed loop, when their session's former turn and think time are over);
latencies count from when a request was due. Writes config.json, flags.txt, requests.jsonl, steps.jsonl and summary.json
under --out, rows as they happen. Ctrl-C (or SIGTERM) ends the run between two steps, keeps what was done, and says how
far it got. The last line printed is one JSON object.

--window=START:END (seconds of the workload's time; default: first to last arrival) is the measured part, without
warm-up and drain: latencies of the requests due in it, rates of what happened in it. Both are reported.
"""

from __future__ import annotations

import json
import signal
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from absl import flags

from engine.errors import ConfigError
from engine.summary import Slo
from experiments import common_flags, timeline, workloads
from experiments.replay import stop_on_signals
from experiments.run_record import RunRecord, claim
from experiments.serving import Measured, latency_table, serve, settings, start_engine
from experiments.tables import rounded

flags.declare_key_flag("out")
flags.declare_key_flag("overwrite")
WORKLOAD = flags.DEFINE_string(
    "workload", "synthetic:num=20", "Workload spec; experiments/workloads/__init__.py explains them."
)
WARMUP = flags.DEFINE_bool("warmup", True, "Compile every bucket before the first arrival.")
GOODPUT = flags.DEFINE_string("goodput", None, "Limits in ms, such as ttft:500,tpot:100: adds goodput and attainment.")
WINDOW = flags.DEFINE_string("window", ":", "START:END of the measured part in s. Default: first to last arrival.")
TIMELINE = flags.DEFINE_bool("timeline", False, "Write timeline.json.gz, to open at ui.perfetto.dev.")
PROFILE_DIR = flags.DEFINE_string("profile_dir", None, "Trace the serving part with jax.profiler into this directory.")

HEADLINE = (
    "completed", "failed", "interrupted", "duration", "request_throughput", "output_throughput", "mean_ttft_ms",
    "mean_queue_ms", "mean_prefill_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_itl_ms", "max_injection_lag_ms",
    "total_preemptions", "request_goodput", "slo_attainment",
)  # fmt: skip


def profiler(directory: str | None) -> AbstractContextManager[None]:
    """Traces what runs inside with `jax.profiler` into `directory`; None: does nothing.

    Raises:
      ConfigError: the directory cannot be made.
    """
    if directory is None:
        return nullcontext()
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--profile_dir={directory} cannot be made: {e.strerror}") from None
    import jax

    return jax.profiler.trace(directory)


def main() -> int:
    """The program."""
    # Everything that can be wrong with the input is found out before anything slow starts.
    model, config = common_flags.required_model(), common_flags.engine_config_from_flags()
    workload = WORKLOAD.value
    requests = workloads.build(workload)
    slo = Slo.parse(GOODPUT.value) if GOODPUT.value else None
    measured = Measured.parse(WINDOW.value)
    directory = claim(common_flags.out_directory("serve"), common_flags.OVERWRITE.value)
    profile = profiler(PROFILE_DIR.value)
    engine = start_engine(model, config, WARMUP.value)
    record = RunRecord(directory)
    record.config(settings(engine, model, workload, requests))
    with stop_on_signals() as stop, profile:
        summary = serve(engine, requests, record, stop, slo, measured)
    if TIMELINE.value:
        print(f"timeline {timeline.write(directory)}")
    print(latency_table(summary))
    if summary["interrupted"]:
        print(
            f"interrupted by {summary['stopped_by']} after {summary['duration']:.1f} s: {summary['completed']} of "
            f"{len(requests)} completed, {summary['in_flight']} in flight, {summary['not_arrived']} not arrived"
        )
    if summary["failed"]:
        print(f"{summary['failed']} of {len(requests)} requests were refused or failed: requests.jsonl says why")
    print(f"results in {record.directory}")
    headline = {"bench": "serve", "model": model, "workload": workload}
    print(json.dumps(headline | {k: rounded(summary[k]) for k in HEADLINE if k in summary}))
    return 128 + signal.Signals[stop.signal] if stop.signal else 0


if __name__ == "__main__":
    common_flags.run_main(main)
