"""How fast the simulator is: requests of real traces per second of wall time, in one process, and where the time goes.

    python -m experiments.bench_sim --traces=../shared/traces

Cases (each needs its file under --traces; what is not there is said and left out):

    azure      the Azure conversation hour, 19,366 requests: vllm_v0, Llama-3.1-8B on one H100
    recorded   300 ShareGPT requests of a recorded vLLM run: vllm_v1, Llama-3.1-8B on one RTX 4090, 2,588 blocks
    mooncake   Mooncake's conversation trace, 12,031 requests, without prefix reuse: vllm_v0, Llama-3.1-8B on two H100

Each case runs --repeats times without a profiler (the median counts) and once with it: the table says which rooms the
profiled time was spent in. Peers on the Azure hour, as `simulation` notes measured them elsewhere: Dynamo's replay in
Rust 8,950 requests/s, vidur 333. Ends with one JSON line.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from absl import flags

from engine.config import CacheConfig, EngineConfig, SchedulerConfig, SimConfig
from engine.errors import ConfigError
from experiments import common_flags, workloads
from experiments.replay import Observer, StopFlag, replay
from experiments.tables import format_table
from experiments.workloads import WorkloadRequest

TRACES = flags.DEFINE_string("traces", "../shared/traces", "Directory with the traces.")
CASES = flags.DEFINE_multi_enum("case", ["azure", "recorded", "mooncake"], ["azure", "recorded", "mooncake"], "Which.")
NUM = flags.DEFINE_integer("num", None, "Only the first so many requests of each trace.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 3, "Runs without a profiler.", lower_bound=1)

MODEL = "llama3.1-8b"
SPECS = {
    "azure": "azure:{}/azure-2023/AzureLLMInferenceTrace_conv.csv",
    "recorded": "vidur:{}/llmservingsim/vllm0.19_RTX4090_Llama-3.1-8B.csv",
    "mooncake": "mooncake:{}/mooncake-fast25/conversation_trace.jsonl",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "azure": {"sim": SimConfig("h100"), "max_context": 16384},
    "recorded": {
        "sim": SimConfig("rtx4090"),
        "scheduler": SchedulerConfig("vllm_v1", max_num_batched_tokens=2048, watermark=0.0),
        "cache": CacheConfig(num_pages=2588 * 32),
    },
    "mooncake": {"sim": SimConfig("h100"), "tensor": 2},
}
ROOMS = ("engine/scheduler", "engine/memory", "engine/executor", "engine/costmodel", "engine", "experiments")


class StepCount(Observer):
    """Steps, and the plans that stand for them."""

    def __init__(self):
        self.steps = self.plans = 0

    def on_step(self, record, progress):
        """Counts."""
        self.steps += record.repeat
        self.plans += 1


def run(case: str, requests: list[WorkloadRequest]) -> tuple[float, StepCount, Any]:
    """Serves the requests; seconds of wall time, steps, and the progress at the end."""
    config = EngineConfig(executor="sim", **SETTINGS[case])
    engine, steps = common_flags.load_engine(MODEL, config), StepCount()
    start = time.perf_counter()
    progress = replay(engine, requests, steps, StopFlag())
    return time.perf_counter() - start, steps, progress


def room_of(file: str) -> str:
    """The room of a profiled function; what is none of ours belongs to Python and NumPy."""
    parts = Path(file).parts
    for root in ("engine", "experiments"):
        if root in parts:
            inner = "/".join(parts[parts.index(root) : -1])
            return next((room for room in ROOMS if inner.startswith(room)), root)
    return "Python and NumPy"


def shares(case: str, requests: list[WorkloadRequest]) -> dict[str, float]:
    """Shares of profiled time by room; calls of built-in functions count for who calls them."""
    profile = cProfile.Profile(builtins=False)
    profile.enable()
    run(case, requests)
    profile.disable()
    spent: Counter[str] = Counter()
    for (file, *_), (_, _, own, _, _) in pstats.Stats(profile).stats.items():
        spent[room_of(file)] += own
    return {room: seconds / spent.total() for room, seconds in spent.most_common()}


def main() -> int:
    """The program."""
    results, profiles = [], {}
    for case in CASES.value:
        spec = SPECS[case].format(TRACES.value)
        if not Path(spec.partition(":")[2]).exists():
            print(f"{case}: left out, {spec.partition(':')[2]} is not there")
            continue
        requests = workloads.build(spec + (f",num={NUM.value}" if NUM.value else ""))
        runs = [run(case, requests) for _ in range(REPEATS.value)]
        seconds = statistics.median(r[0] for r in runs)
        _, steps, progress = runs[0]
        assert len(progress.completed) == len(requests), (
            f"{case}: {len(progress.completed)} of {len(requests)} completed"
        )
        results.append({
            "case": case, "requests": len(requests), "seconds": round(seconds, 3),
            "requests_per_s": round(len(requests) / seconds), "steps": steps.steps,
            "steps_per_s": round(steps.steps / seconds), "plans": steps.plans,
            "simulated_s": round(progress.elapsed, 1), "preempted": progress.num_preempted,
        })  # fmt: skip
        profiles[case] = shares(case, requests)
        print(f"{case} done", flush=True)
    if not results:
        raise ConfigError(f"no trace under --traces={TRACES.value}")
    print(format_table(list(results[0]), [list(r.values()) for r in results]))
    for case, profile in profiles.items():
        print(f"{case}: " + ", ".join(f"{room} {share:.0%}" for room, share in profile.items()))
    print(json.dumps({"bench": "sim", "cases": results}))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)
