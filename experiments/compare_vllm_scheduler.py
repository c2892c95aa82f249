"""Our `vllm_v1` against the scheduler of vLLM's V1 engine, the real one: admission, batches and preemptions by step.

    python -m experiments.compare_vllm_scheduler --vllm_path=DIR --workload=vidur:FILE.csv

`peer_vllm.py` says how to unpack a vLLM into DIR; nothing else of it is needed, and no device. Both sides serve the
same loads with a model that answers at once: the workload given, in the pool and with the limits of the flags, loads
made to force chunked prefill, preemption and the admission of whole sequences, and many small random ones. A request
that is due at t seconds comes before step floor(t / --step_s). Two steps are identical when the same requests are
admitted in the same order, each computes as many tokens, the same are preempted and as many blocks stay free.

The last column is a control: vLLM with its check that a whole sequence fits switched off, which must differ wherever
the check decides. Writes VERSION.json under --out and ends with one JSON line. Imports no JAX.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from engine.errors import ConfigError
from engine.files import write_whole, writing
from experiments import common_flags, peer_vllm, workloads
from experiments.schedules import (
    PAGE_SIZE,
    Arrival,
    Load,
    VllmV1,
    continued_chunks,
    difference,
    preempted,
    random_load,
    schedule,
)
from experiments.tables import format_table

flags.declare_key_flag("out")
flags.declare_key_flag("max_num_seqs")
flags.declare_key_flag("max_num_batched_tokens")
flags.declare_key_flag("order")
VLLM_PATH = flags.DEFINE_string("vllm_path", None, "Directory in which a vLLM wheel was unpacked.")
WORKLOADS = flags.DEFINE_multi_string("workload", [], "Workload spec; repeatable. Its token ids do not matter.")
NUM_GPU_BLOCKS = flags.DEFINE_integer(
    "num_gpu_blocks", 2588, f"Blocks of {PAGE_SIZE} tokens as vLLM counts them, its null block included.", lower_bound=2
)
STEP_S = flags.DEFINE_float("step_s", 0.03, "Seconds of a workload's time that pass in a step.", lower_bound=1e-6)
NUM_RANDOM = flags.DEFINE_integer("num_random", 200, "Random loads of each order.", lower_bound=0)

# name: workload, usable blocks, max_num_seqs, max_num_batched_tokens, order
SYNTHETIC = {
    "chunked prefill": ("synthetic:num=80,rate=3,prompt=uniform:50:3000,output=uniform:1:60", 1500, 12, 512, "fcfs"),
    "preemption": ("synthetic:num=120,rate=20,prompt=uniform:5:150,output=uniform:20:300", 80, 64, 2048, "fcfs"),
    "whole sequences": ("synthetic:num=80,rate=4,prompt=uniform:200:900,output=uniform:1:80", 100, 32, 128, "fcfs"),
    "priority": (
        "synthetic:num=120,rate=20,prompt=uniform:5:150,output=uniform:20:300,priorities=4", 80, 64, 96, "priority",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    about: str  # where its loads come from
    loads: tuple[Load, ...]


def from_workload(name: str, spec: str, *limits: Any) -> Case:
    """A case of one load. `limits`: the fields of `Load` after its arrivals.

    Raises:
      WorkloadError: a spec that is none.
      ConfigError: a request that can never be served.
    """
    arrivals = (
        Arrival(math.floor(r.arrival_s / STEP_S.value), r.prompt_len, r.output_len, r.priority)
        for r in workloads.build(spec)
    )
    return Case(name, spec, (Load(tuple(arrivals), *limits),))


def cases() -> Iterator[Case]:
    """The workloads of the flags, the synthetic loads, the random ones."""
    limits = common_flags.MAX_NUM_SEQS.value, common_flags.MAX_NUM_BATCHED_TOKENS.value or 2048
    for spec in WORKLOADS.value:
        yield from_workload(Path(spec).stem, spec, NUM_GPU_BLOCKS.value - 1, *limits, common_flags.ORDER.value)
    for name, row in SYNTHETIC.items():
        yield from_workload(name, *row)
    for order in ("fcfs", "priority") if NUM_RANDOM.value else ():
        loads = tuple(random_load(seed, order) for seed in range(NUM_RANDOM.value))
        yield Case(f"random, {order}", f"random_load, seeds 0 to {NUM_RANDOM.value - 1}", loads)


def compare(case: Case, vllm: Any) -> dict[str, Any]:
    """What both sides did, summed over the loads of a case; plain JSON types."""
    first = case.loads[0]
    row: dict[str, Any] = {"name": case.name, "about": case.about, "loads": len(case.loads)}
    if len(case.loads) == 1:
        row |= {f: getattr(first, f) for f in ("num_blocks", "max_num_seqs", "max_num_batched_tokens", "order")}
    row |= dict.fromkeys(
        ("requests", "steps", "identical_steps", "identical_loads", "preempted", "continued_chunks"), 0
    )
    row |= {"vllm_steps": 0, "vllm_preempted": 0, "control_identical_steps": 0, "first_difference": None}
    for i, load in enumerate(case.loads):
        ours, theirs = schedule(load, VllmV1(load)), schedule(load, peer_vllm.VllmScheduler(vllm, load))
        control = schedule(load, peer_vllm.VllmScheduler(vllm, load, reserve_full_isl=False))
        identical, shown = difference(ours, theirs)
        row["requests"] += len(load.arrivals)
        row["steps"] += len(ours)
        row["vllm_steps"] += len(theirs)
        row["identical_steps"] += identical
        row["identical_loads"] += shown is None
        row["preempted"] += preempted(ours)
        row["vllm_preempted"] += preempted(theirs)
        row["continued_chunks"] += continued_chunks(theirs)
        row["control_identical_steps"] += difference(ours, control)[0]
        if shown and not row["first_difference"]:
            row["first_difference"] = {"load": i, **shown}
    return row


def main() -> int:
    """The program."""
    if VLLM_PATH.value is None:
        raise ConfigError("--vllm_path is not given: the directory in which a vLLM wheel was unpacked (peer_vllm.py)")
    path = Path(VLLM_PATH.value)
    version, vllm = peer_vllm.version(path), peer_vllm.load_modules(path)
    out = common_flags.out_directory("compare_vllm_scheduler")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    rows = [compare(case, vllm) for case in cases()]
    columns = ["loads", "identical_loads", "requests", "steps", "identical_steps", "preempted", "vllm_preempted"]
    columns += ["continued_chunks", "control_identical_steps"]
    print(f"vLLM {version}")
    print(format_table(["case", *columns], [[row["name"], *(row[c] for c in columns)] for row in rows]))
    for row in rows:
        if shown := row["first_difference"]:
            print(f"{row['name']}, load {shown['load']}, step {shown['step']}\n  ours  {shown['ours']}")
            print(f"  vLLM  {shown['vllm']}")
    write_whole(out / f"{version}.json", json.dumps({"vllm": version, "cases": rows}, indent=1) + "\n")
    identical = {row["name"]: [row["identical_steps"], max(row["steps"], row["vllm_steps"])] for row in rows}
    print(json.dumps({"bench": "compare_vllm_scheduler", "vllm": version, "identical_of_steps": identical}))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)
