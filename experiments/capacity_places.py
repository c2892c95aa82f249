"""Where capacity is asked for: a model on devices, a share of what is left for KV, a host tier, a family of workloads.

A site is a place that has been looked at: the pages of its pool, how many requests that holds, how many are sent, and
the rate that the grid of rates is built around. The host tier has no part in any of these.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache

from engine import Engine
from engine.config import cdiv
from engine.errors import ConfigError
from experiments import workloads
from experiments.objectives import objectives
from experiments.points import Point
from experiments.tuning import POLICIES, V0, Policy, joined, settled

LLAMA2_7B = "experiments.paper_models:LLAMA2_7B_32K"
FULL_RATE = 1000.0  # requests/s: all at once
TUNED_ON = 1000  # the workload seed that settings are chosen on; those that they are judged on count from 0
POOLFULS, LEAST, MOST = 8, 256, 1024  # requests of a run: so many times what the pool holds, within limits


@dataclass(frozen=True)
class Family:
    """Lengths of prompts and outputs; arrivals are Poisson's, stretched to the rate."""

    name: str
    workload: str  # a spec without num, rate and seed
    max_context: int

    def spec(self, num: int, rate: float) -> str:
        """The workload's spec, without a seed."""
        head, _, rest = self.workload.partition(":")
        return f"{head}:num={num},rate={rate:g}" + (f",{rest}" if rest else "")


FIXED, CHAT, LONG = (
    Family("fixed 2048/450", "synthetic:prompt=fixed:2048,output=fixed:450", 2498),
    Family("ShareGPT-like", "sharegpt-like", 5760),
    Family(
        "long prompts",
        "synthetic:prompt=lognormal:3072:6144,output=lognormal:256:512,max_prompt=8192,max_output=1024",
        9216,
    ),
)


@dataclass(frozen=True)
class Place:
    """What is given."""

    family: Family
    device: str = "l20"
    stack: str | None = "vllm-0.5"  # of kernels; None: the device's default
    model: str = LLAMA2_7B
    tensor: int = 1
    fraction: float = 1.0  # of what is left for KV
    host_gb: int = 128  # host tier, 1e9 bytes

    def machine(self) -> str:
        """Settings of the machine, without its pool and its host tier."""
        stack = f"stack={self.stack},async_depth=0" if self.stack else ""  # the paper's day: no step is planned ahead
        return joined([f"device={self.device}", stack, f"tensor={self.tensor},max_context={self.family.max_context}"])


@dataclass(frozen=True)
class Site:
    """A place, and what was found there."""

    place: Place
    num_pages: int
    holds: int  # requests of mean length that the pool has room for
    num_requests: int  # of a run
    base_rate: float = FULL_RATE  # requests/s that `vllm_v0` completes when all come at once

    def point(self, policy: Policy, settings: str, rate: float, seed: int, scale: float = 1.0) -> Point:
        """A run. Whoever is told objectives is told them at this scale; a host tier is there for whoever needs
        one."""
        place = self.place
        chosen = joined([policy.engine, settled(settings, self.holds)])
        host = f"host_bytes={place.host_gb}GB" if needs_host(policy, settings) else ""
        o = objectives()
        told = f"layerkv_tpot_slo={o.tpot_s * scale:g},layerkv_ttft_slo={o.ttft_s * scale:g}" if policy.told else ""
        engine = joined([chosen, told, place.machine(), f"num_pages={self.num_pages}", host])
        return Point(place.model, engine, place.family.spec(self.num_requests, rate), seed)

    def full(self) -> Point:
        """The run that measures `base_rate`."""
        return self.point(POLICIES[V0], "", FULL_RATE, TUNED_ON)

    def at(self, **changes: int) -> Site:
        """The same under another host tier (`host_gb`)."""
        return dataclasses.replace(self, place=dataclasses.replace(self.place, **changes))


def needs_host(policy: Policy, settings: str) -> bool:
    """Whether there must be a host tier."""
    return policy.host or "preemption=swap" in settings


def look(place: Place, times: int = 1) -> Site | None:
    """What can be told of a place without a run; None: its devices do not hold the model, or the pool no request.

    Args:
      times: as many requests as usual.
    """
    pages, layers, page_size = _pool(place.model, place.machine())
    pages = int(pages * place.fraction) // max(layers, 1) * layers
    holds = int(pages * page_size / (layers * _mean_tokens(place.family))) if layers else 0
    if not holds:
        return None
    num = min(max(POOLFULS * holds, LEAST), MOST)
    return Site(place, pages, holds, cdiv(num, 16) * 16 * times)


@cache
def _mean_tokens(family: Family) -> float:
    """Prompt and output of a request, over 512 of them."""
    requests = workloads.build(f"{family.spec(512, 1.0)},seed={TUNED_ON}")
    return sum(r.prompt_len + r.output_len for r in requests) / len(requests)


@cache
def _pool(model: str, machine: str) -> tuple[int, int, int]:
    """(pages, layers, tokens in a page) of what vLLM's rule leaves for KV with its default limits; zeros: the model
    does not fit."""
    config = Point(model, joined([POLICIES[V0].engine, machine]), "burst:num=1,context=1,output=1").config
    try:
        engine = Engine.from_pretrained(model, config)
    except ConfigError as error:
        if "does not fit" not in str(error):
            raise
        return 0, 0, 0
    return engine.memory.num_pages, engine.model_config.num_layers, config.cache.page_size
