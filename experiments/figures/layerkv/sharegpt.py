"""What figures 8 and 9 share: requests with ShareGPT's lengths at rates around what the baseline can serve."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from experiments.figures.layerkv.curves import Place
from experiments.figures.layerkv.setting import LAYERKV, LLAMA2_7B, NO_RULE, VLLM
from experiments.paper_models import SATURATED
from experiments.points import Point
from experiments.seeded import Cell

NUM = 400
RATES = (1.5, 2.0, 2.25, 2.8, 3.1, 3.8)  # requests/s: 0.6 to 1.5 times what the baseline completes
CONTEXT = 5760  # holds the longest prompt with the longest output
ALONE = 0.001  # requests/s at which none meets another
# LayerKV with a rule that knows TPOT alone, as in the paper; with lengths foreseen by others.
VARIANTS = {"LayerKV, TPOT alone": "layerkv_weigh_ttft=false"}
VARIANTS |= {f"LayerKV, {name}": f"layerkv_lengths={name}" for name in ("oracle", "bucket", "mean")}
SHOWN = (VLLM, LAYERKV, NO_RULE)


def lengths(policy: str, rate: float, num: int = NUM) -> Point:
    """Under one of `POLICIES` or `VARIANTS`."""
    load = f"sharegpt-like:num={num},rate={rate:g}"
    if policy in VARIANTS:
        return LLAMA2_7B.point(LAYERKV, load, CONTEXT, VARIANTS[policy])
    return LLAMA2_7B.point(policy, load, CONTEXT)


def points(policies: Sequence[str], rates: Sequence[float] = RATES) -> dict[Hashable, Point]:
    """By (rate, policy), and what the baseline can serve."""
    runs: dict[Hashable, Point] = {"full": lengths(VLLM, SATURATED[1], SATURATED[0]), "alone": lengths(VLLM, ALONE)}
    return runs | {(rate, policy): lengths(policy, rate) for rate in rates for policy in policies}


def places(cells: Mapping[Hashable, Cell]) -> list[Place]:
    """One per rate, slowest first, with the policies that were run there."""
    rates: dict[Any, dict[str, Cell]] = {}
    for key, cell in cells.items():
        if isinstance(key, tuple):
            rates.setdefault(key[0], {})[key[1]] = cell
    full, alone = cells["full"], cells["alone"]
    return [Place(f"{rate:g}/s", (rate,), rate, rates[rate], full, alone) for rate in sorted(rates)]
