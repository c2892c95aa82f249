"""One saturated point under request-level paging and under LayerKV: what the demo shows last.

The pool holds eight prompts (`scaled_point.py` says what follows for the rest), and requests come a quarter faster than
`vllm_v0` serves them when all come at once, which is measured first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, ModelConfig
from engine.summary import Slo
from experiments.common_flags import laid_over
from experiments.quiet import Others
from experiments.replay import StopFlag
from experiments.run_record import RunRecord, claim
from experiments.scaled_point import Machine, ScaledPoint, measure_machine
from experiments.serving import serve, settings, start_engine

POINT = ScaledPoint(pool_prompts=8.0, num=32)
LOAD = 1.25  # arrival rate / capacity
POLICIES = ("vllm_v0", "layerkv")  # the first is the baseline
COLUMNS = {
    "completed": "requests", "mean_ttft_ms": "TTFT ms", "mean_queue_ms": "queue", "mean_prefill_ms": "prefill",
    "mean_ttst_ms": "2nd token", "mean_tpot_ms": "TPOT ms", "slo_attainment": "within", "max_max_gap_ms": "max gap",
    "mean_e2el_ms": "E2E ms", "output_throughput": "out tok/s", "peak_host_bytes": "host bytes",
}  # fmt: skip


@dataclass(frozen=True)
class Side:
    """The point under one policy."""

    policy: str
    summary: dict[str, Any]

    def row(self) -> dict[str, Any]:
        """What COLUMNS name."""
        return {"policy": self.policy} | {name: self.summary[name] for name in COLUMNS}


def serve_sides(name: str, model: ModelConfig, config: EngineConfig, out: Path, stop: StopFlag) -> list[Side]:
    """The baseline, then LayerKV; run files under `out`. Interrupted: as far as it got."""
    settled, machine, sides = POINT.config(config, model), None, list[Side]()
    for policy in POLICIES:
        engine = start_engine(name, laid_over(settled, f"policy={policy}"), warmup=True)
        if machine is None:
            machine = measure_machine(engine, POINT, Others(1.0, 0.0), stop, prefills=3, bursts=1)
            if machine is None:
                break
            settled = machine.settled(settled, POINT, model)
            print(words(machine))
        requests = POINT.arrivals(LOAD, machine.capacity, 0)
        record = RunRecord(claim(out / f"saturated-{policy}", overwrite=True))
        record.config(settings(engine, name, f"{len(requests)} requests at {LOAD:g} x capacity", requests))
        print(f"\n{len(requests)} requests under {policy}", flush=True)
        sides.append(Side(policy, serve(engine, requests, record, stop, Slo(tpot_ms=1e3 * machine.tpot_slo(POINT)))))
        del engine  # its arena and weights go before the next one's come
        if stop.signal:
            break
    return sides


def words(machine: Machine) -> str:
    """What was measured, and what is served."""
    return (
        f"saturated: prompts of {POINT.prompt} tokens, outputs of {POINT.output}, a pool of {POINT.pool_prompts:g} "
        f"prompts; {machine.capacity:.2f} requests/s when all come at once, so they come at "
        f"{LOAD * machine.capacity:.2f}; TPOT objective {machine.tpot_slo(POINT) * 1e3:.0f} ms"
    )
