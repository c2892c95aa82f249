"""The point of LayerKV's paper where it gains most, scaled to the machine at hand.

That is Llama2-7B on one L20 with prompts of 2,048 tokens (its figure 1, and what follows from it): the pool holds about
26 prompts; a prefill takes 0.385 s and moving its KV to the host 0.041 s, a ratio of 0.107; the objective of 200 ms per
token is 3 times the 67 ms that the saturated baseline takes. These ratios are kept; what a prefill takes and how many
requests/s the baseline serves is measured first. Outputs are 0.44 of a prompt, not 0.22: a CPU decodes cheaply and
prefills dearly, so that with 0.22 a request's share of decode steps would take 0.7 of its prefill instead of 3.7 times
as long, and with 0.44 it takes 1.5 times. Imports no JAX.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from engine.config import EngineConfig, ModelConfig, cdiv
from engine.errors import ConfigError
from engine.scheduler.layerkv.config import LayerKVConfig
from experiments import workloads
from experiments.measure import our_side
from experiments.outcomes import measure
from experiments.quiet import Others
from experiments.replay import StopFlag
from experiments.workloads import WorkloadRequest

if TYPE_CHECKING:
    from engine import Engine

MAX_NUM_SEQS = 128  # device slots: more than any policy comes to use
HOST_BYTES = 2 << 30  # likewise


@dataclass(frozen=True)
class ScaledPoint:
    """The point, in units that a machine has."""

    prompt: int = 256  # tokens of each prompt
    output: int = 112  # of each output
    pool_prompts: float = 26.0  # prompts that the pool holds
    offload_ratio: float = 0.107  # time to copy a prompt's KV to the host / time of its prefill
    tpot_ratio: float = 3.0  # TPOT objective / TPOT of the saturated baseline
    num: int = 100  # requests of a run, fewer at a load below 1 so that no run takes longer

    def config(self, config: EngineConfig, model: ModelConfig) -> EngineConfig:
        """`config` with the pool of this point and, where it sets none, a context and a host tier that suffice; every
        policy gets the same.

        Raises:
          ConfigError: it sets what the point does.
        """
        cache, knobs = config.cache, config.scheduler.layerkv
        if cache.num_pages or cache.device_bytes or cache.device_fraction:
            raise ConfigError(
                "the KV pool holds pool_prompts prompts: leave num_pages, device_bytes and device_fraction out"
            )
        if config.link_gbs or knobs.tpot_slo != LayerKVConfig.tpot_slo:
            raise ConfigError("link_gbs and layerkv_tpot_slo follow from what is measured: leave them out")
        pages = round(self.pool_prompts * cdiv(self.prompt, cache.page_size) * model.num_layers)
        return dataclasses.replace(
            config,
            cache=dataclasses.replace(cache, num_pages=pages, host_bytes=cache.host_bytes or HOST_BYTES),
            max_context=config.max_context or self.prompt + self.output,
        )

    def burst(self, seed: int) -> list[WorkloadRequest]:
        """The requests, all at once."""
        return workloads.build(f"burst:num={self.num},context={self.prompt},output={self.output},seed={seed}")

    def arrivals(self, load: float, capacity: float, seed: int) -> list[WorkloadRequest]:
        """Poisson arrivals at `load` times `capacity` requests/s; with one seed the same, faster or slower."""
        num, rate = max(2, round(self.num * min(1.0, load))), load * capacity
        lengths = f"prompt=fixed:{self.prompt},output=fixed:{self.output}"
        return workloads.build(f"synthetic:num={num},rate={rate:.6g},{lengths},seed={seed}")


@dataclass(frozen=True)
class Machine:
    """What a machine does at the point under the baseline, alone and saturated."""

    prefill_s: float  # of one prompt
    capacity: float  # requests/s when all come at once
    tpot_s: float  # meanwhile, on the mean

    def offload_s(self, point: ScaledPoint) -> float:
        """Seconds that a prompt's KV takes to the host."""
        return point.offload_ratio * self.prefill_s

    def tpot_slo(self, point: ScaledPoint) -> float:
        """Seconds per token that requests may take on average."""
        return point.tpot_ratio * self.tpot_s

    def settled(self, config: EngineConfig, point: ScaledPoint, model: ModelConfig) -> EngineConfig:
        """`config` with the link and the objective that the point has on this machine."""
        num_bytes = point.prompt * model.num_layers * model.kv_bytes_per_token_per_layer
        knobs = dataclasses.replace(config.scheduler.layerkv, tpot_slo=self.tpot_slo(point))
        return dataclasses.replace(
            config,
            link_gbs=num_bytes / self.offload_s(point) / 1e9,
            scheduler=dataclasses.replace(config.scheduler, layerkv=knobs),
        )


def measure_machine(
    engine: Engine, point: ScaledPoint, others: Others, stop: StopFlag, prefills: int, bursts: int
) -> Machine | None:
    """Medians of so many prefills of one prompt and of so many bursts of the point's requests, by an engine of the
    baseline; None: interrupted."""
    side, size = our_side(engine), engine.model_config.vocab_size
    prompts = np.random.default_rng(0).integers(0, size, (prefills, 1, point.prompt)).tolist()
    seconds: list[float] = []
    others.wait()
    while len(seconds) < prefills:
        timing = side(prompts[len(seconds)], 2)
        if not others.disturb():
            seconds.append(timing.prefill_s)
    runs = []
    for seed in range(bursts):
        run = others.undisturbed(partial(measure, engine, point.burst(seed), stop))
        if run is None:
            return None
        runs.append((run["request_throughput"], run["mean_tpot_ms"] / 1e3))
    capacity, tpot_s = np.median(runs, axis=0).tolist()
    return Machine(float(np.median(seconds)), capacity, tpot_s)
