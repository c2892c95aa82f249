"""LayerKV on the real engine against request-level paging: TTFT and throughput over the offered load.

    python -m experiments.bench_layerkv --out=results/layerkv [--resume]

The paper's point, scaled to this machine (`scaled_point.py`). Measured first: a prefill, and the capacity, the
requests/s that `vllm_v0` serves when all come at once. Then every policy serves the same Poisson arrivals, of one seed
per repeat, at each load: an arrival rate over that capacity. Each repeat takes policies and loads in an order drawn
anew. A run that other processes disturb (--max_others) is made again while --patience lasts.

Prints a row per load and policy, then the gates of issue 5 as passed or missed; after each repeat it writes
layerkv.json under --out, at the end it draws load.png. --resume goes on with the repeats that are missing, from what
was measured first. Ends with one JSON line.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from engine.config import EngineConfig, to_dict
from engine.errors import ConfigError
from engine.files import write_whole
from engine.models.source import resolve
from engine.summary import Slo
from experiments import common_flags, environment, load_figure, quiet
from experiments.common_flags import laid_over
from experiments.gates import gate_table
from experiments.load_sweep import FIGURES, HEADER, Cell, Summary, Sweep, gates
from experiments.outcomes import measure
from experiments.quiet import Others
from experiments.replay import StopFlag, stop_on_signals
from experiments.run_record import claim
from experiments.scaled_point import MAX_NUM_SEQS, Machine, ScaledPoint, measure_machine
from experiments.tables import format_table, rounded

if TYPE_CHECKING:
    from engine import Engine

flags.declare_key_flag("out")
flags.declare_key_flag("overwrite")
flags.adopt_module_key_flags(quiet)
POINT = ScaledPoint()
PROMPT = flags.DEFINE_integer("prompt", POINT.prompt, "Tokens of each prompt.", lower_bound=1)
OUTPUT = flags.DEFINE_integer("output", POINT.output, "Tokens of each output.", lower_bound=2)
POOL_PROMPTS = flags.DEFINE_float("pool_prompts", POINT.pool_prompts, "Prompts that the pool holds.", lower_bound=1)
OFFLOAD_RATIO = flags.DEFINE_float(
    "offload_ratio", POINT.offload_ratio, "Time of a prompt's KV over the link / time of its prefill.", lower_bound=1e-6
)
TPOT_RATIO = flags.DEFINE_float(
    "tpot_ratio", POINT.tpot_ratio, "TPOT objective / TPOT of the saturated baseline.", lower_bound=1e-6
)
NUM = flags.DEFINE_integer("num", POINT.num, "Requests of each run.", lower_bound=2)
LOADS = flags.DEFINE_list("loads", ["0.25", "0.5", "0.75", "1", "1.25", "1.5", "2"], "Arrival rates over capacity.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Interleaved repeats.", lower_bound=1)
RESUME = flags.DEFINE_bool("resume", False, "Go on with the sweep in --out, as far as it got.")

DEFAULT_MODEL, FILE = "small-20m", "layerkv.json"
JUDGED = "layerkv"
POLICIES = {  # the first is the baseline
    "vllm_v0": "policy=vllm_v0",
    "vllm_v0, swap": "policy=vllm_v0,preemption=swap",
    "paged_park": "policy=paged_park",
    JUDGED: "policy=layerkv",
}
PREFILLS, BURSTS = 9, 3  # that the machine is measured by
Runs = dict[tuple[float, str], list[Summary]]


def point_from_flags() -> ScaledPoint:
    """The point that the flags describe."""
    return ScaledPoint(PROMPT.value, OUTPUT.value, POOL_PROMPTS.value, OFFLOAD_RATIO.value, TPOT_RATIO.value, NUM.value)


def loads_from_flags() -> list[float]:
    """--loads.

    Raises:
      ConfigError: not numbers > 0, each once.
    """
    try:
        loads = [float(text) for text in LOADS.value]
    except ValueError:
        loads = []
    if not loads or min(loads) <= 0 or len({*loads}) < len(loads):
        raise ConfigError(f"--loads={','.join(LOADS.value)}: expected numbers > 0, each once, such as 0.5,1,1.5")
    return loads


def serve_all(
    engines: dict[str, Engine],
    point: ScaledPoint,
    loads: Sequence[float],
    capacity: float,
    slo: Slo,
    repeat: int,
    others: Others,
    stop: StopFlag,
) -> dict[tuple[float, str], Summary] | None:
    """One repeat: every policy at every load; None: interrupted."""
    pairs, done = list(itertools.product(loads, engines)), {}
    for i in np.random.default_rng(repeat).permutation(len(pairs)).tolist():
        load, policy = pairs[i]
        requests = point.arrivals(load, capacity, repeat)
        run = others.undisturbed(partial(measure, engines[policy], requests, stop, slo))
        if run is None:
            return None
        done[load, policy] = {name: run[name] for name in FIGURES}
    return done


def earlier(file: Path, settings: dict[str, Any]) -> tuple[Machine, Runs]:
    """What an interrupted sweep left.

    Raises:
      ConfigError: there is none, or one with other settings.
    """
    try:
        record = json.loads(file.read_bytes())
        machine, runs = Machine(**record["machine"]), {(c["load"], c["policy"]): c["runs"] for c in record["cells"]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"--resume: {file} cannot be read as a sweep: {type(e).__name__} {e}") from None
    other = [name for name, value in settings.items() if record.get(name) != value]
    if other:
        raise ConfigError(f"--resume: {file} has another {', '.join(other)}; give the flags it was made with")
    return machine, runs


def report(sweep: Sweep, machine: Machine, point: ScaledPoint, stem: Path) -> dict[str, Any]:
    """Prints the table and the gates, draws the figure; returns what the JSON line says of them."""
    judged = gates(sweep, JUDGED, 1e3 * machine.tpot_slo(point))
    print("\n" + format_table(["load", "policy", *HEADER], sweep.rows()))
    knee = [f"{load:g}" for load in sweep.loads if sweep.below_knee(load)]
    print(f"below the knee: {', '.join(knee) or 'none'}\n\n{gate_table(judged)}")
    try:
        load_figure.draw(sweep, stem)
    except ConfigError as e:
        print(f"no figure: {e}")
    best = max(1 / sweep.at(load, JUDGED).ratio("mean_ttft_ms", sweep.first(load)).mean for load in sweep.loads)
    return {"ttft_lower_by": rounded(best), "gates": {g.name: g.passed for g in judged}}


def machine_words(machine: Machine, config: EngineConfig, point: ScaledPoint) -> str:
    """What was measured first, and what follows from it."""
    prefill_ms, offload_ms = machine.prefill_s * 1e3, machine.offload_s(point) * 1e3
    return (
        f"T_prefill {prefill_ms:.1f} ms, T_offload {offload_ms:.2f} ms at {config.link_gbs:.3f} GB/s: "
        f"{offload_ms / prefill_ms:.3f}\ncapacity {machine.capacity:.2f} requests/s; TPOT meanwhile "
        f"{machine.tpot_s * 1e3:.1f} ms, objective {machine.tpot_slo(point) * 1e3:.1f} ms"
    )


def main() -> int:
    """The program."""
    name = common_flags.given_model() or DEFAULT_MODEL
    point, loads = point_from_flags(), loads_from_flags()
    given = common_flags.engine_config_from_flags()
    if not common_flags.MAX_NUM_SEQS.present:
        given = laid_over(given, f"max_num_seqs={MAX_NUM_SEQS}")
    model = resolve(name, given)[0]
    base = point.config(given, model)
    settings = {"model": name, "point": dataclasses.asdict(point), "loads": loads, "policies": POLICIES}
    out = common_flags.out_directory("layerkv")
    file = claim(out, common_flags.OVERWRITE.value or RESUME.value, (FILE,)) / FILE
    machine, runs = (
        earlier(file, settings) if RESUME.value else (None, {p: [] for p in itertools.product(loads, POLICIES)})
    )
    others = Others.from_flags()
    with stop_on_signals() as stop:
        baseline, *rest = POLICIES
        engines = {baseline: common_flags.load_engine(name, laid_over(base, POLICIES[baseline]))}
        machine = machine or measure_machine(engines[baseline], point, others, stop, PREFILLS, BURSTS)
        if machine is None:
            return common_flags.EXIT_INTERRUPTED
        config = machine.settled(base, point, model)
        print(machine_words(machine, config, point), flush=True)
        engines |= {policy: common_flags.load_engine(name, laid_over(config, POLICIES[policy])) for policy in rest}
        about = settings | {"machine": dataclasses.asdict(machine), "engine": to_dict(config)} | environment.describe()

        def keep() -> None:
            cells = [{"load": load, "policy": policy, "runs": done} for (load, policy), done in runs.items()]
            write_whole(file, json.dumps(about | {"cells": cells}, indent=1) + "\n")

        keep()
        slo = Slo(tpot_ms=1e3 * machine.tpot_slo(point))
        for repeat in range(min(map(len, runs.values())), REPEATS.value):
            done = serve_all(engines, point, loads, machine.capacity, slo, repeat, others, stop)
            if done is None:
                print(f"interrupted in repeat {repeat + 1}; what was whole before is kept")
                break
            for pair, run in done.items():
                runs[pair].append(run)
            keep()
            print(f"repeat {repeat + 1} of {REPEATS.value} done", flush=True)
    complete = min(map(len, runs.values()))
    if complete:
        sweep = Sweep([Cell(load, policy, done) for (load, policy), done in runs.items()])
        line = {"bench": "layerkv", "model": name, "repeats": complete, "capacity": rounded(machine.capacity)}
        print(json.dumps(line | report(sweep, machine, point, out / "load")))
    return 128 + signal.Signals[stop.signal] if stop.signal else 0


if __name__ == "__main__":
    common_flags.run_main(main)
