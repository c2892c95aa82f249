"""All policies on the same frozen workloads, on the real engine, in interleaved repeats.

    python -m experiments.bench_policies --model=small-20m --num_pages=2400 --workload=a.jsonl --workload=b.jsonl \
        --engine=policy=vllm_v0 --engine=policy=vllm_v0,preemption=swap --engine=policy=vllm_v1,order=sjf

Each --engine is scheduler and cache settings laid over the flags (a policy may be `path/to/file.py:Name`). Every repeat
serves every workload on every engine, in an order drawn anew. The table gives the mean over repeats with its 95%
bootstrap interval; `ttft / first` is the ratio of mean TTFT to the first engine's, paired by repeat. Writes
policies.json under --out and ends with one JSON line.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
from absl import flags

from engine.config import CacheConfig, EngineConfig, SchedulerConfig, to_dict
from engine.errors import ConfigError
from engine.files import write_whole
from engine.summary import Outcomes, Window, summarise
from experiments import common_flags, environment, workloads
from experiments.replay import Observer, StopFlag, replay, stop_on_signals
from experiments.tables import format_table, rounded
from experiments.workloads import WorkloadRequest
from experiments.workloads.frozen import workload_hash

ENGINES = flags.DEFINE_multi_string("engine", ["policy=vllm_v0"], "Settings of one engine, name=value,...; repeatable.")
WORKLOADS = flags.DEFINE_multi_string("workload", ["azure-like:num=20"], "Workload spec; repeatable.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Interleaved repeats.", lower_bound=1)

# Columns: name in the summary, header.
COLUMNS = {
    "mean_ttft_ms": "TTFT ms", "p99_ttft_ms": "P99", "mean_queue_ms": "queueing", "mean_tpot_ms": "TPOT ms",
    "p99_itl_ms": "P99 ITL", "output_throughput": "tok/s", "total_preemptions": "preempted", "completed": "done",
}  # fmt: skip


def laid_over(config: EngineConfig, spec: str) -> EngineConfig:
    """`config` with the settings of one --engine.

    Raises:
      ConfigError: a setting that is none, or a value that does not validate.
    """
    sections: dict[str, dict[str, Any]] = {"scheduler": {}, "cache": {}}
    kinds = {"scheduler": SchedulerConfig, "cache": CacheConfig}
    for item in spec.split(","):
        name, _, value = item.partition("=")
        section = next((s for s, k in kinds.items() if name in {f.name for f in dataclasses.fields(k)}), None)
        if section is None or not value:
            raise ConfigError(f"--engine={spec}: {item!r} is not name=value of a scheduler or cache setting")
        sections[section][name] = int(value) if value.isdecimal() else value
    return dataclasses.replace(
        config, **{s: dataclasses.replace(getattr(config, s), **values) for s, values in sections.items()}
    )


class Collected(Observer):
    """What a replay leaves behind."""

    def __init__(self):
        self.completed, self.failed, self.steps = [], [], []

    def on_finished(self, request, output):
        self.completed.append(output.metrics)

    def on_refused(self, request, error):
        self.failed.append(request.arrival_s)

    def on_step(self, record, progress):
        self.steps.append(record)


def measure(engine, requests: list[WorkloadRequest], stop: StopFlag) -> dict[str, Any] | None:
    """The summary of one run; None when it was interrupted."""
    seen = Collected()
    progress = replay(engine, requests, seen, stop)
    if progress.stopped_by:
        return None
    run = Outcomes(seen.completed, seen.failed, [], seen.steps)
    return summarise(run, Window(progress.start, progress.now))


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of the mean of `values` [n]."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(draws.mean(1), (2.5, 97.5))
    return float(low), float(high)


def rows_of(workload: str, engines: list[str], runs: dict[tuple[str, str], list[dict]]) -> list[list[Any]]:
    """One table row per engine: mean and interval per column, and TTFT over the first engine's."""
    rows = []
    first = np.array([r["mean_ttft_ms"] for r in runs[workload, engines[0]]])
    for spec in engines:
        row: list[Any] = [spec]
        for column in COLUMNS:
            values = np.array([r[column] for r in runs[workload, spec]], float)
            low, high = interval(values)
            row.append(f"{values.mean():,.4g} ({low:,.4g} to {high:,.4g})" if low < high else f"{low:,.4g}")
        ratios = np.array([r["mean_ttft_ms"] for r in runs[workload, spec]])[: len(first)] / first
        low, high = interval(ratios)
        rows.append([*row, f"{ratios.mean():.2f} ({low:.2f} to {high:.2f})"])
    return rows


def main() -> int:
    """The program."""
    model, config = common_flags.required_model(), common_flags.engine_config_from_flags()
    specs, sources = ENGINES.value, WORKLOADS.value
    configs = {spec: laid_over(config, spec) for spec in specs}
    loads = {source: workloads.build(source) for source in sources}
    out = common_flags.out_directory("policies")
    out.mkdir(parents=True, exist_ok=True)
    engines = {}
    for spec, engine_config in configs.items():
        engines[spec] = common_flags.load_engine(model, engine_config)
        engines[spec].warmup()
    runs: dict[tuple[str, str], list[dict]] = {pair: [] for pair in itertools.product(sources, specs)}
    rng = np.random.default_rng(config.seed)
    with stop_on_signals() as stop:
        for repeat in range(REPEATS.value):
            for i in rng.permutation(len(runs)).tolist():
                source, spec = pair = list(runs)[i]
                summary = measure(engines[spec], loads[source], stop)
                if summary is None:
                    print(f"interrupted in repeat {repeat + 1}; the table holds what was complete before")
                    break
                runs[pair].append({c: summary[c] for c in (*COLUMNS, "duration")})
            if stop.signal:
                break
            print(f"repeat {repeat + 1} of {REPEATS.value} done", flush=True)
    complete = min(len(r) for r in runs.values())
    runs = {pair: r[:complete] for pair, r in runs.items()}
    if not complete:
        return 130
    vocab = next(iter(engines.values())).model_config.vocab_size
    hashes = {source: workload_hash(requests, vocab) for source, requests in loads.items()}
    for source in sources:
        print(f"\n{source}  {hashes[source][:12]}, {len(loads[source])} requests, {complete} repeats")
        print(format_table(["engine", *COLUMNS.values(), "ttft / first"], rows_of(source, specs, runs)))
    record = {"model": model, "workload_hashes": hashes, "engine": to_dict(config), **environment.describe()}
    record["runs"] = [{"workload": s, "engine": e, "summaries": r} for (s, e), r in runs.items()]
    write_whole(out / "policies.json", json.dumps(record, indent=1) + "\n")
    means = {f"{s}|{e}": rounded(float(np.mean([x["mean_ttft_ms"] for x in r]))) for (s, e), r in runs.items()}
    print(json.dumps({"bench": "policies", "model": model, "repeats": complete, "mean_ttft_ms": means}))
    return 128 + 2 if stop.signal else 0


if __name__ == "__main__":
    common_flags.run_main(main)
