"""Predicts our own engine: the same workloads under the same policies on the real engine and on the virtual clock.

    python -m experiments.bench_prediction --device=cpu-here.json --model=small-20m --num_pages=2400 \
        --workload=sharegpt-like:num=40,rate=20 --engine=policy=vllm_v0 --engine=policy=vllm_v1 --out=results/prediction

--device is a file that `experiments.calibrate` wrote on this machine for these settings. The real engine serves every
workload under every --engine (settings as in bench_policies) --repeats times, in an order drawn anew each time; the
simulator serves each once. Prints a row per cell, then the gates of issue 4 as passed or missed; writes prediction.json
under --out and ends with one JSON line.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from engine.config import EngineConfig, to_dict
from engine.costmodel.step_model import StepModel
from engine.executor.packing import Packer
from engine.executor.sim_executor import work_of
from engine.files import write_whole
from experiments import bench_policies, common_flags, environment, workloads
from experiments.bench_policies import laid_over, measure
from experiments.prediction import METRICS, Cell, Gate, Step, gates, repeat_errors, step_errors
from experiments.replay import StopFlag, stop_on_signals
from experiments.tables import format_table, rounded
from experiments.workloads import WorkloadRequest
from experiments.workloads.frozen import workload_hash

if TYPE_CHECKING:
    from engine.engine import Engine

flags.adopt_module_key_flags(bench_policies)
Workloads = dict[str, list[WorkloadRequest]]


class StepLog:
    """An executor that notes what each step computes and how long it takes."""

    def __init__(self, executor: Any):
        self._executor = executor
        self.steps: list[Step] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def collect(self, ticket: Any) -> Any:
        """Waits for a step and notes it."""
        result = self._executor.collect(ticket)
        self.steps.append(Step(work_of(ticket.plan), result.start, result.end))
        return result


def real_engines(model: str, configs: dict[str, EngineConfig]) -> dict[str, Engine]:
    """Warm engines that note their steps."""
    engines = {}
    for spec, config in configs.items():
        engine = common_flags.load_engine(model, dataclasses.replace(config, executor="jax"))
        engine.warmup()
        engine.executor = StepLog(engine.executor)
        engines[spec] = engine
    return engines


def run_all(engines: dict[str, Engine], loads: Workloads, repeats: int, rng: np.random.Generator, stop: StopFlag):
    """Real runs by (workload, engine): (summary, steps) of each repeat. Interrupted: of the repeats that are whole."""
    pairs = list(itertools.product(loads, engines))
    runs: dict[tuple[str, str], list[tuple[dict, list[Step]]]] = {pair: [] for pair in pairs}
    for repeat in range(repeats):
        for i in rng.permutation(len(pairs)).tolist():
            source, spec = pairs[i]
            log = engines[spec].executor
            log.steps = []
            summary = measure(engines[spec], loads[source], stop)
            if summary is None:
                return {pair: of[:repeat] for pair, of in runs.items()}
            runs[source, spec].append((summary, log.steps))
        print(f"repeat {repeat + 1} of {repeats} done", flush=True)
    return runs


def simulate(model: str, config: EngineConfig, requests: list[WorkloadRequest]) -> tuple[dict[str, Any], StepModel]:
    """The summary of a simulated run, and the cost model behind it."""
    engine = common_flags.load_engine(model, dataclasses.replace(config, executor="sim"))
    summary = measure(engine, requests, StopFlag())
    assert summary is not None
    return summary, engine.executor.cost


def row_of(cell: Cell, cost: StepModel, packer: Packer) -> dict[str, Any]:
    """A cell's figures: plain JSON types."""
    errors = np.concatenate([step_errors(steps, cost) for steps in cell.steps])
    repeats = repeat_errors(cell.steps, cost, packer)
    row: dict[str, Any] = {
        "workload": cell.workload,
        "engine": cell.policy,
        "load": cell.load,
        "steps": len(errors),
        "step_mape": float(np.abs(errors).mean()),
        "step_bias": float(errors.mean()),
        "repeat_mape": float(np.abs(repeats).mean()) if len(repeats) else None,
    }
    for metric in METRICS:
        row[metric] = {
            "predicted": cell.simulated[metric],
            "measured": [r[metric] for r in cell.real],
            "ratio": cell.ratio(metric),
        }
    row["duration"] = [r["duration"] for r in cell.real]
    row["preemptions"] = {
        "predicted": cell.simulated["total_preemptions"],
        "measured": [r["total_preemptions"] for r in cell.real],
    }
    return row


def table_of(rows: list[dict[str, Any]]) -> str:
    """A line per cell."""
    lines = []
    for r in rows:
        load = "burst" if r["load"] is None else f"{r['load']:.2f}"
        shares = [None if r[name] is None else f"{r[name]:.1%}" for name in ("step_mape", "repeat_mape")]
        figures = [
            f"{r[m]['predicted']:,.4g} / {float(np.median(r[m]['measured'])):,.4g} = {r[m]['ratio']:.2f}"
            for m in METRICS
        ]
        lines.append([r["workload"], r["engine"], load, r["steps"], *shares, *figures])
    header = ["workload", "engine", "load", "steps", "step MAPE", "repeats", *METRICS.values()]
    return format_table(header, lines)


def gate_table(found: list[Gate]) -> str:
    """A line per gate."""
    words = {True: "passed", False: "missed", None: "-"}
    return format_table(
        ["gate", "limit", "reached", ""], [[g.name, g.limit, g.reached, words[g.passed]] for g in found]
    )


def main() -> int:
    """The program."""
    model, config = common_flags.required_model(), common_flags.engine_config_from_flags()
    configs = {spec: laid_over(config, spec) for spec in bench_policies.ENGINES.value}
    loads = {source: workloads.build(source) for source in bench_policies.WORKLOADS.value}
    out = Path(common_flags.out_directory("prediction"))
    out.mkdir(parents=True, exist_ok=True)
    simulated = {pair: simulate(model, configs[pair[1]], loads[pair[0]]) for pair in itertools.product(loads, configs)}
    engines = real_engines(model, configs)
    packer = next(iter(engines.values())).executor.packer
    rng = np.random.default_rng(config.seed)
    with stop_on_signals() as stop:
        runs = run_all(engines, loads, bench_policies.REPEATS.value, rng, stop)
    if not all(runs.values()):
        return common_flags.EXIT_INTERRUPTED
    cells, rows = [], []
    for (source, spec), of in runs.items():
        summary, cost = simulated[source, spec]
        real, steps = [summary for summary, _ in of], [s for _, s in of]
        cells.append(Cell(source, spec, real, steps, summary, max(r.arrival_s for r in loads[source])))
        rows.append(row_of(cells[-1], cost, packer))
    cost = next(iter(simulated.values()))[1]
    errors = np.concatenate([step_errors(steps, cost) for cell in cells for steps in cell.steps])
    repeats = np.concatenate([repeat_errors(cell.steps, cost, packer) for cell in cells])
    found = gates(cells, errors, repeats)
    print(table_of(rows))
    print(gate_table(found))
    vocab = next(iter(engines.values())).model_config.vocab_size
    record = {
        "model": model,
        "steps_by": type(cost).__name__,
        "gates": [dataclasses.asdict(g) for g in found],
        "cells": rows,
        "workload_hashes": {source: workload_hash(requests, vocab) for source, requests in loads.items()},
        "engine": to_dict(config),
        **environment.describe(),
    }
    write_whole(out / "prediction.json", json.dumps(record, indent=1) + "\n")
    line = {"bench": "prediction", "model": model, "cells": len(cells), "repeats": min(map(len, runs.values()))}
    line |= {"step_mape": rounded(float(np.abs(errors).mean())), "repeat_mape": rounded(float(np.abs(repeats).mean()))}
    print(json.dumps(line | {"gates": {g.name: g.passed for g in found}}))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main)
