"""Predicts our own engine: the same workloads under the same policies on the real engine and on the virtual clock.

    python -m experiments.bench_prediction --calibrate=30 --model=small-20m --num_pages=2400 \
        --workload=sharegpt-like:num=40,rate=20 --engine=policy=vllm_v0 --engine=policy=vllm_v1 --out=results/prediction

Steps are timed as `experiments.calibrate` does, --calibrate seconds before every repeat and after the last, and the
device file that comes of all of them is written under --out: a machine that is shared changes its speed within minutes,
and then a calibration made before says little of what is measured after. Without --calibrate, --device is a file that
`experiments.calibrate` wrote on this machine for these settings. The real engine serves every
workload under every --engine (settings as in bench_policies) --repeats times, in an order drawn anew each time; the
simulator serves each once. A run that other processes disturb (--max_others) is made again while --patience lasts.
Prints a row per cell, then the gates of issue 4 as passed or missed; writes prediction.json under --out and ends with
one JSON line.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from engine.config import EngineConfig, SimConfig, to_dict
from engine.costmodel.measured_steps import make_packer
from engine.costmodel.step_model import StepModel
from engine.executor.sim_executor import work_of
from engine.files import write_whole
from engine.models.source import resolve
from experiments import bench_policies, common_flags, environment, quiet, workloads
from experiments.calibrate import StepCalibration, device_file, measure_ops
from experiments.common_flags import laid_over
from experiments.gates import Gate, gate_table
from experiments.outcomes import measure
from experiments.prediction import METRICS, Cell, Step, gates, repeat_errors, step_errors
from experiments.quiet import Others
from experiments.replay import StopFlag, stop_on_signals
from experiments.run_record import claim
from experiments.tables import format_table, rounded
from experiments.workloads import WorkloadRequest
from experiments.workloads.frozen import workload_hash

if TYPE_CHECKING:
    from engine.engine import Engine

flags.adopt_module_key_flags(bench_policies)
flags.adopt_module_key_flags(quiet)
CALIBRATE = flags.DEFINE_float(
    "calibrate", None, "Seconds of calibration before every repeat and after the last, in place of --device.",
    lower_bound=0.1,
)  # fmt: skip
FILE, DEVICE = "prediction.json", "cpu-here.json"
Workloads = dict[str, list[WorkloadRequest]]
Simulated = dict[tuple[str, str], tuple[dict[str, Any], StepModel]]
Run = tuple[dict[str, Any], list[Step]]  # the summary, with the share of the CPUs that `others` took; the steps


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
        self.steps.append(Step(work_of(ticket.plan.decode_positions, ticket.plan.prefills), result.start, result.end))
        return result


def real_engines(model: str, configs: dict[str, EngineConfig]) -> dict[str, Engine]:
    """Warm engines that note their steps."""
    engines = {}
    for spec, config in configs.items():
        engine = common_flags.load_engine(model, dataclasses.replace(config, executor="jax", sim=SimConfig()))
        engine.warmup()
        engine.executor = StepLog(engine.executor)
        engines[spec] = engine
    return engines


def measure_steps(engine: Engine, requests: list[WorkloadRequest], stop: StopFlag) -> dict[str, Any] | None:
    """The summary of one run with its steps as `log`; None: interrupted."""
    engine.executor.steps = []
    summary = measure(engine, requests, stop)
    return None if summary is None else summary | {"log": engine.executor.steps}


def run_all(
    engines: dict[str, Engine],
    loads: Workloads,
    repeats: int,
    rng: np.random.Generator,
    others: Others,
    stop: StopFlag,
    before: Callable[[], None],
) -> dict[tuple[str, str], list[Run]]:
    """Real runs by (workload, engine): one of each repeat. Interrupted: of the repeats that are whole. `before`: what
    is done before every repeat and after the last."""
    pairs = list(itertools.product(loads, engines))
    runs: dict[tuple[str, str], list[Run]] = {pair: [] for pair in pairs}
    for repeat in range(repeats):
        before()
        for i in rng.permutation(len(pairs)).tolist():
            source, spec = pairs[i]
            run = others.undisturbed(partial(measure_steps, engines[spec], loads[source], stop))
            if run is None:
                return {pair: of[:repeat] for pair, of in runs.items()}
            runs[source, spec].append((run, run.pop("log")))
        print(f"repeat {repeat + 1} of {repeats} done", flush=True)
    before()
    return runs


def simulate(model: str, config: EngineConfig, requests: list[WorkloadRequest]) -> tuple[dict[str, Any], StepModel]:
    """The summary of a simulated run, and the cost model behind it."""
    engine = common_flags.load_engine(model, dataclasses.replace(config, executor="sim"))
    summary = measure(engine, requests, StopFlag())
    assert summary is not None
    return summary, engine.executor.cost


def row_of(cell: Cell, errors: np.ndarray, repeats: np.ndarray) -> dict[str, Any]:
    """A cell's figures, plain JSON types. `errors`, `repeats`: of its steps."""
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
    row["duration"], row["others"] = ([r[name] for r in cell.real] for name in ("duration", "others"))
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


class Simulator:
    """The virtual clock: with a device from before or, with --calibrate, with one that is measured meanwhile."""

    def __init__(self, model: str, config: EngineConfig, file: Path, seconds: float | None, others: Others):
        """`seconds`: of each sitting; None: the configurations name a device. `file`: where that of sittings goes."""
        self.model, self._file, self._seconds = model, file, seconds
        self._calibration: StepCalibration | None = None
        if seconds:
            engine = common_flags.load_engine(model, dataclasses.replace(config, executor="jax", sim=SimConfig()))
            self._rng, self._others = np.random.default_rng(config.seed), others
            self._calibration = StepCalibration(engine, self._rng, others)

    def sit(self) -> None:
        """Times steps, if that is wanted."""
        if self._calibration and self._seconds:
            self._calibration.sit(self._seconds)

    def run(self, configs: dict[str, EngineConfig], loads: Workloads) -> Simulated:
        """By (workload, engine): the summary, and the cost model behind it."""
        if self._calibration and self._seconds:
            steps, engine = self._calibration.section(), self._calibration.engine
            found, ops = measure_ops(engine, self._seconds, self._rng, self._others)
            write_whole(self._file, json.dumps(device_file(self._file.stem, engine, steps, found, ops)) + "\n")
            sim = SimConfig(device=str(self._file))
            configs = {spec: dataclasses.replace(config, sim=sim) for spec, config in configs.items()}
        return {
            (source, spec): simulate(self.model, configs[spec], loads[source])
            for source, spec in itertools.product(loads, configs)
        }


def compare(
    simulator: Simulator,
    configs: dict[str, EngineConfig],
    loads: Workloads,
    repeats: int,
    seed: int,
    others: Others,
    stop: StopFlag,
) -> tuple[list[dict[str, Any]], list[Gate], dict[str, Any]] | None:
    """Runs everything. Returns a row per cell, the gates, and figures over all steps; None: interrupted before a repeat
    was whole."""
    engines = real_engines(simulator.model, configs)
    runs = run_all(engines, loads, repeats, np.random.default_rng(seed), others, stop, simulator.sit)
    if not all(runs.values()):
        return None
    simulated = simulator.run(configs, loads)
    cells, rows, errors, noise = [], [], [], []
    for (source, spec), of in runs.items():
        summary, cost = simulated[source, spec]
        real, steps = [summary for summary, _ in of], [s for _, s in of]
        cells.append(Cell(source, spec, real, steps, summary, max(r.arrival_s for r in loads[source])))
        errors.append(np.concatenate([step_errors(s, cost) for s in steps]))
        noise.append(repeat_errors(steps, cost, make_packer(configs[spec], engines[spec].memory.num_slots)))
        rows.append(row_of(cells[-1], errors[-1], noise[-1]))
    all_errors, all_noise = np.concatenate(errors), np.concatenate(noise)
    overall = {
        "steps_by": sorted({type(cost).__name__ for _, cost in simulated.values()}),
        "repeats": min(map(len, runs.values())),
        "others": max(summary["others"] for of in runs.values() for summary, _ in of),
        "step_mape": float(np.abs(all_errors).mean()),
        "repeat_mape": float(np.abs(all_noise).mean()) if len(all_noise) else None,
    }
    return rows, gates(cells, all_errors, all_noise), overall


def main() -> int:
    """The program."""
    model, config = common_flags.required_model(), common_flags.engine_config_from_flags(executor="sim")
    configs = {spec: laid_over(config, spec) for spec in bench_policies.ENGINES.value}
    loads = {source: workloads.build(source) for source in bench_policies.WORKLOADS.value}
    file = claim(common_flags.out_directory("prediction"), common_flags.OVERWRITE.value, (FILE, DEVICE)) / FILE
    others = Others.from_flags()
    simulator = Simulator(model, config, file.parent / DEVICE, CALIBRATE.value, others)
    with stop_on_signals() as stop:
        found = compare(simulator, configs, loads, bench_policies.REPEATS.value, config.seed, others, stop)
    if found is None:
        return common_flags.EXIT_INTERRUPTED
    rows, judged, overall = found
    print(table_of(rows))
    print(gate_table(judged))
    vocab = resolve(model, config)[0].vocab_size
    record = overall | {
        "model": model,
        "gates": [dataclasses.asdict(g) for g in judged],
        "cells": rows,
        "workload_hashes": {source: workload_hash(requests, vocab) for source, requests in loads.items()},
        "engine": to_dict(config),
        **environment.describe(),
    }
    write_whole(file, json.dumps(record, indent=1) + "\n")
    line = {"bench": "prediction", "model": model, "cells": len(rows), **{k: rounded(v) for k, v in overall.items()}}
    print(json.dumps(line | {"gates": {g.name: g.passed for g in judged}}))
    return 128 + 2 if stop.signal else 0


if __name__ == "__main__":
    common_flags.run_main(main)
