"""What the figures of LayerKV share: its models on L20s, its requests, and what every point says about itself."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from absl import logging

from engine import Engine
from experiments.intervals import Estimate
from experiments.paper_models import MACHINE, SATURATED, SLO
from experiments.points import Point
from experiments.seeded import Cell, mean

NUM, OUTPUT = 100, 450  # requests of a run; output tokens, fitted to figure 1 (400 to 512 are possible)
VLLM, LAYERKV, NO_RULE, PAGED_PARK = "vLLM", "LayerKV", "LayerKV, no SLO rule", "whole requests parked"
POLICIES = {
    VLLM: "policy=vllm_v0",
    LAYERKV: "policy=layerkv",
    NO_RULE: "policy=layerkv,layerkv_slo_rule=false",
    PAGED_PARK: "policy=paged_park",
}
# Okabe and Ito's palette, with markers that differ in print.
STYLES: dict[str, dict[str, Any]] = {
    VLLM: {"color": "#D55E00", "marker": "s"},
    PAGED_PARK: {"color": "#E69F00", "marker": "v"},
    NO_RULE: {"color": "#56B4E9", "marker": "^"},
    LAYERKV: {"color": "#0072B2", "marker": "o"},
}
PAPER: dict[str, Any] = {"color": "black", "marker": "x", "linestyle": "none", "label": "paper"}


@dataclass(frozen=True)
class Setup:
    """A model and the L20s that share it."""

    name: str
    model: str
    tensor: int

    def point(self, policy: str, workload: str, max_context: int, extra: str = "") -> Point:
        """A run of a workload (a spec without a seed) under one of `POLICIES`."""
        engine = f"{POLICIES[policy]},{MACHINE},tensor={self.tensor},max_context={max_context}"
        return Point(self.model, f"{engine},{extra}" if extra else engine, workload, slo=SLO)

    def fixed(
        self, policy: str, context: int, rate: float, num: int = NUM, output: int = OUTPUT, extra: str = ""
    ) -> Point:
        """Requests of one length, as in the paper."""
        load = f"synthetic:num={num},rate={rate:g},prompt=fixed:{context},output=fixed:{output}"
        return self.point(policy, load, context + output, extra)


LLAMA2_7B = Setup("Llama2-7B, 1 L20", "experiments.paper_models:LLAMA2_7B_32K", 1)
YI_34B = Setup("Yi-34B, 2 L20s", "yi-34b-200k", 2)
LLAMA3_70B = Setup("Llama3.1-70B, 4 L20s", "llama3.1-70b", 4)


def yardsticks(setup: Setup, context: int, output: int = OUTPUT) -> dict[Hashable, Point]:
    """Runs that say what a place can serve: the baseline with everything at once, and a request that is alone."""
    return {
        ("full", setup.name, context, output): setup.fixed(VLLM, context, SATURATED[1], SATURATED[0], output),
        ("alone", setup.name, context, output): setup.fixed(VLLM, context, 1.0, 1, output),
    }


# What every point says about itself, whatever the figure shows.
HYGIENE = ("requests", "duration s", "load", "state", "alone ms")


def load_of(full: Cell, rate: float) -> float:
    """A rate over what the baseline completes when all requests come at once."""
    return rate / mean(full, "request_throughput")


def remarks(cell: Cell, rate: float, full: Cell, alone: Cell) -> list[Any]:
    """A row's part under `HYGIENE`. `full`, `alone`: all requests at once under the baseline, and each by itself."""
    load = load_of(full, rate)
    state = "overloaded" if load >= 1 else "stable"
    return [int(mean(cell, "completed")), mean(cell, "duration"), load, state, mean(alone, "mean_ttft_ms")]


def hygiene(cells: Mapping[Hashable, Cell], setup: Setup, context: int, rate: float, cell: Cell, output: int = OUTPUT):
    """A row's part under `HYGIENE`, of requests of one length."""
    place = setup.name, context, output
    return remarks(cell, rate, cells["full", *place], cells["alone", *place])


def estimate(cell: Cell, name: str) -> Estimate:
    """A value over seeds; one that does not exist, such as a second token of one, counts as 0."""
    return Estimate.of([value or 0.0 for value in cell[name]])


def queue_share(cell: Cell) -> Estimate:
    """Of the mean TTFT, the part before the prefill."""
    return Estimate.of([q / t for q, t in zip(cell["mean_queue_ms"], cell["mean_ttft_ms"], strict=True)])


def kilo(tokens: int) -> str:
    """For an axis."""
    return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


def engine_of(point: Point) -> Engine:
    """The engine that a point runs on, made without its notes."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        return Engine.from_pretrained(point.model, point.config)
    finally:
        logging.set_verbosity(before)
