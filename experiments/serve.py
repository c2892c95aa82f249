"""Serves a workload on the real engine, in real time, and records what happened.

    python -m experiments.serve --model=base-124m --workload=synthetic:rate=2,num=50 --out=results/first

Requests arrive at the workload's times (or, closed loop, when their session's former turn and think time are over);
latencies count from when a request was due. Writes config.json, flags.txt, requests.jsonl, steps.jsonl and summary.json
under --out, rows as they happen. Ctrl-C (or SIGTERM) ends the run between two steps, keeps what was done, and says how
far it got. The last line printed is one JSON object.
"""

from __future__ import annotations

import json
import signal

from absl import flags

from engine.metrics import Slo
from experiments import common_flags, workloads
from experiments.replay import stop_on_signals
from experiments.run_record import RunRecord, claim
from experiments.serving import latency_table, serve, settings, start_engine
from experiments.tables import rounded

flags.adopt_module_key_flags(common_flags)
WORKLOAD = flags.DEFINE_string(
    "workload", "synthetic:num=20", "Workload spec; experiments/workloads/__init__.py explains them."
)
WARMUP = flags.DEFINE_bool("warmup", True, "Compile every bucket before the first arrival.")
GOODPUT = flags.DEFINE_string("goodput", None, "Limits in ms, such as ttft:500,tpot:100: adds goodput and attainment.")

HEADLINE = (
    "completed", "failed", "interrupted", "duration", "request_throughput", "output_throughput", "mean_ttft_ms",
    "mean_queue_ms", "mean_prefill_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_itl_ms", "max_injection_lag_ms",
    "total_preemptions", "request_goodput", "slo_attainment",
)  # fmt: skip


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
    record.config(settings(engine, model, workload, requests))
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
