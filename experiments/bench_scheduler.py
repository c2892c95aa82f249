"""Host time of a step: planning, page-table deltas, packing and accounting, with an executor that answers at once.

    python -m experiments.bench_scheduler --num_running=256,1024 --policies=vllm_v0,vllm_v1,chunked

So many sequences decode greedily, with stop ids that never come, in a pool that holds them all; prompts of different
lengths spread the pages they grow by over the steps. Milliseconds per `engine.step()`: medians over --steps steps, and
their 99th percentile. Imports no JAX. Ends with one JSON line.
"""

from __future__ import annotations

import json
import time
from typing import cast

import numpy as np
from absl import flags

from engine.clock import WallClock
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine, Executor
from engine.errors import ConfigError
from engine.executor.memory_plan import MemoryPlan
from engine.executor.packing import Packer
from engine.memory.paged import PagedStore
from engine.memory.pages import PagePool
from engine.request import SamplingParams
from engine.scheduler.plan import Plan, StepResult
from experiments import common_flags
from experiments.tables import format_table, rounded

NUM_RUNNING = flags.DEFINE_list("num_running", ["256", "1024"], "Sequences that decode.")
POLICIES = flags.DEFINE_list("policies", ["vllm_v0", "vllm_v1", "chunked"], "Policies to measure.")
STEPS = flags.DEFINE_integer("steps", 300, "Steps measured.", lower_bound=10)
NUM_LAYERS = flags.DEFINE_integer("num_layers", 32, "Layers of the model.", lower_bound=1)
CONTEXT = flags.DEFINE_integer("context", 2048, "Prompt tokens, about.", lower_bound=64)

WARM_UP = 20  # steps before the first that counts


class InstantExecutor:
    """Packs each plan, as the real one does, and answers token 1 for every row."""

    def __init__(self, num_slots: int):
        self._packer = Packer(num_slots, tile=64, max_tiles=16, deterministic=False)

    def submit(self, plan: Plan) -> Plan:
        """Packs."""
        self._packer.pack(plan)
        return plan

    def collect(self, plan: Plan) -> StepResult:
        """The same token everywhere."""
        return StepResult(np.ones(plan.num_sampled, np.int32), None, 0.0, 0.0)


def saturated_engine(policy: str, num_running: int, page_size: int = 16) -> Engine:
    """An engine in which `num_running` sequences decode, and nobody waits."""
    layers, output = NUM_LAYERS.value, STEPS.value + 2 * WARM_UP
    context = CONTEXT.value + output + page_size
    pages = num_running * -(-context // page_size) * layers
    model = ModelConfig("instant", layers, 64, 8, 8, 8, 64, 1000, context)
    scheduler = SchedulerConfig(policy=policy, max_num_seqs=num_running, watermark=0.0)
    config = EngineConfig(CacheConfig(page_size=page_size, num_pages=pages), scheduler)
    store = PagedStore(PagePool(pages, layers), num_running, page_size, context)
    memory = MemoryPlan(pages, 1, 1, context, "", num_running * context, 0, 0, 0, 0)  # all prompts in one step
    executor = cast(Executor, InstantExecutor(num_running))  # without a host tier nothing else is asked of it
    engine = Engine(model, config, memory, store, executor, WallClock())
    params = SamplingParams(max_tokens=output, stop_token_ids=(2, 3))
    for i in range(num_running):
        engine.add_request([1] * (CONTEXT.value + i % page_size), params)
    while len(engine.state.decodable()) < num_running:
        engine.step()
    return engine


def measure(policy: str, num_running: int) -> dict[str, object]:
    """One row of the table."""
    engine, times = saturated_engine(policy, num_running), []
    for _ in range(WARM_UP):
        engine.step()
    for _ in range(STEPS.value):
        start = time.perf_counter()
        outputs = engine.step()
        times.append(1e3 * (time.perf_counter() - start))
        assert len(outputs) == num_running, "the pool was to hold everybody"
    median, p99 = (rounded(float(x)) for x in np.percentile(times, [50, 99]))
    return {"policy": policy, "num_running": num_running, "median_ms": median, "p99_ms": p99}


def main() -> int:
    """The program."""
    if not all(n.isdecimal() and int(n) for n in NUM_RUNNING.value):
        raise ConfigError(
            f"--num_running={','.join(NUM_RUNNING.value)}: expected numbers of sequences, such as 256,1024"
        )
    rows = [measure(policy, int(n)) for policy in POLICIES.value for n in NUM_RUNNING.value]
    print(format_table(list(rows[0]), [list(row.values()) for row in rows]))
    print(json.dumps({"bench": "scheduler", "num_layers": NUM_LAYERS.value, "context": CONTEXT.value, "rows": rows}))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)
