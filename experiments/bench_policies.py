"""All policies on the same frozen workloads, on the real engine, in interleaved repeats.

    python -m experiments.bench_policies --model=small-20m --num_pages=2400 --workload=a.jsonl --workload=b.jsonl \
        --engine=policy=vllm_v0 --engine=policy=vllm_v0,preemption=swap --engine=policy=vllm_v1,order=sjf

Each --engine is engine settings laid over the flags, written as those are (a policy may be `path/to/file.py:Name`).
Every repeat serves every workload on every engine, in an order drawn anew. The table gives the mean over repeats with
its 95% bootstrap interval; `ttft / first` is the ratio of mean TTFT to the first engine's, paired by repeat.
policies.json under --out holds every repeat that is complete, from then on. Ends with one JSON line.
"""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from engine.config import to_dict
from engine.errors import ConfigError
from engine.files import write_whole
from experiments import common_flags, environment, workloads
from experiments.common_flags import laid_over
from experiments.intervals import interval
from experiments.outcomes import measure
from experiments.replay import StopFlag, stop_on_signals
from experiments.run_record import claim
from experiments.tables import format_table, rounded
from experiments.workloads import WorkloadRequest
from experiments.workloads.frozen import workload_hash

if TYPE_CHECKING:
    from engine import Engine

flags.declare_key_flag("out")
flags.declare_key_flag("overwrite")
ENGINES = flags.DEFINE_multi_string("engine", ["policy=vllm_v0"], "Settings of one engine, name=value,...; repeatable.")
WORKLOADS = flags.DEFINE_multi_string("workload", ["azure-like:num=20"], "Workload spec; repeatable.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Interleaved repeats.", lower_bound=1)

FILE = "policies.json"
Pair = tuple[str, str]  # workload, engine
# Columns: name in the summary, header.
COLUMNS = {
    "mean_ttft_ms": "TTFT ms", "p99_ttft_ms": "P99", "mean_queue_ms": "queueing", "mean_tpot_ms": "TPOT ms",
    "p99_itl_ms": "P99 ITL", "output_throughput": "tok/s", "total_preemptions": "preempted", "completed": "done",
}  # fmt: skip


def measure_all(
    engines: dict[str, Engine], loads: dict[str, list[WorkloadRequest]], order: Sequence[Pair], stop: StopFlag
) -> dict[Pair, dict[str, Any]] | None:
    """One repeat: the columns of every workload on every engine, taken in `order`; None when it was interrupted."""
    summaries = {}
    for source, spec in order:
        try:
            summary = measure(engines[spec], loads[source], stop)
        except ConfigError as e:
            raise ConfigError(f"--workload={source} --engine={spec}: {e}") from None
        if summary is None:
            return None
        summaries[source, spec] = {column: summary[column] for column in (*COLUMNS, "duration")}
    return summaries


def rows_of(workload: str, engines: list[str], runs: dict[Pair, list[dict[str, Any]]]) -> list[list[Any]]:
    """One table row per engine: mean and interval per column, and TTFT over the first engine's."""
    rows = []
    first = np.array([r["mean_ttft_ms"] for r in runs[workload, engines[0]]])
    for spec in engines:
        row: list[Any] = [spec]
        for column in COLUMNS:
            values = np.array([r[column] for r in runs[workload, spec]], float)
            low, high = interval(values)
            row.append(f"{values.mean():,.4g} ({low:,.4g} to {high:,.4g})" if low < high else f"{low:,.4g}")
        ratios = np.array([r["mean_ttft_ms"] for r in runs[workload, spec]]) / first
        low, high = interval(ratios)
        rows.append([*row, f"{ratios.mean():.2f} ({low:.2f} to {high:.2f})"])
    return rows


def main() -> int:
    """The program."""
    model, config = common_flags.required_model(), common_flags.engine_config_from_flags()
    specs, sources = ENGINES.value, WORKLOADS.value
    configs = {spec: laid_over(config, spec) for spec in specs}
    loads = {source: workloads.build(source) for source in sources}
    file = claim(common_flags.out_directory("policies"), common_flags.OVERWRITE.value, (FILE,)) / FILE
    engines = {spec: common_flags.load_engine(model, engine_config) for spec, engine_config in configs.items()}
    vocab = next(iter(engines.values())).model_config.vocab_size
    hashes = {source: workload_hash(requests, vocab) for source, requests in loads.items()}
    about = {"model": model, "workload_hashes": hashes, "engine": to_dict(config), **environment.describe()}
    runs: dict[Pair, list[dict[str, Any]]] = {pair: [] for pair in itertools.product(sources, specs)}

    def keep() -> None:
        rows = [{"workload": source, "engine": spec, "summaries": done} for (source, spec), done in runs.items()]
        write_whole(file, json.dumps(about | {"runs": rows}, indent=1) + "\n")

    keep()  # what cannot be written is found out before anything is served
    for engine in engines.values():
        engine.warmup()
    rng, complete = np.random.default_rng(config.seed), 0
    with stop_on_signals() as stop:
        while complete < REPEATS.value:
            order = [list(runs)[i] for i in rng.permutation(len(runs)).tolist()]
            summaries = measure_all(engines, loads, order, stop)
            if summaries is None:
                print(f"interrupted in repeat {complete + 1}; the table holds what was complete before")
                break
            for pair, summary in summaries.items():
                runs[pair].append(summary)
            complete += 1
            keep()
            print(f"repeat {complete} of {REPEATS.value} done", flush=True)
    for source in sources if complete else ():
        print(f"\n{source}  {hashes[source][:12]}, {len(loads[source])} requests, {complete} repeats")
        print(format_table(["engine", *COLUMNS.values(), "ttft / first"], rows_of(source, specs, runs)))
    if complete:
        means = {f"{s}|{e}": rounded(float(np.mean([x["mean_ttft_ms"] for x in r]))) for (s, e), r in runs.items()}
        print(json.dumps({"bench": "policies", "model": model, "repeats": complete, "mean_ttft_ms": means}))
    return 128 + signal.Signals[stop.signal] if stop.signal else 0


if __name__ == "__main__":
    common_flags.run_main(main)
