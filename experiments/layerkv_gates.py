"""What issue 5 asks of LayerKV at the scale of its paper (must show 4), judged on summaries. No JAX here.

A *place* is one model at one context length and arrival rate, with a cell per policy. A place is *calm*, below the
knee, when its rate is at most 0.9 of what the baseline can complete. (The share of queueing in TTFT does not tell: with
prompts of seconds it is small under overload, too, and with the shortest ones half of TTFT is the wait for a step.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.gates import Gate
from experiments.seeded import Cell, mean, throughput_ratio, violations

BASELINE, LAYERKV, NO_RULE = "vllm_v0", "layerkv", "layerkv, no SLO rule"
PAPER_CONTEXT, PAPER_RATE = 2048, 1.0  # of the point that the issue gives bands for
PAPER_TTFT_S = 26.0  # its figure 1 there
CALM = 0.9  # times capacity
OVERLOAD = 1.5  # times capacity: as far as violations are judged


@dataclass(frozen=True)
class Place:
    """One model, context and arrival rate."""

    model: str
    context: int  # tokens of each prompt
    rate: float  # requests/s
    load: float  # rate over the baseline's capacity
    isolated_ms: float  # TTFT of a request that is alone
    feasible: bool  # whether that meets the objective
    cells: dict[str, Cell]  # by policy

    @property
    def calm(self) -> bool:
        """Below the knee."""
        return self.load < CALM + 1e-2  # rates are rounded

    @property
    def words(self) -> str:
        """Where it is."""
        return f"{self.model} at {self.context}, {self.rate:g}/s"


def gates(places: Sequence[Place], model: str) -> list[Gate]:
    """The gates of must show 4; `model`: the one that the paper's figure 1 is of."""
    return [
        *_paper_point(places, model),
        _below_the_knee(places),
        _throughput(places),
        _never_more_violations(places),
        _largest_gap(places),
        _the_rule_matters(places),
    ]


def _paper_point(places: Sequence[Place], model: str) -> list[Gate]:
    """At 2,048 tokens and 1 request/s."""
    where = (model, PAPER_CONTEXT, PAPER_RATE)
    here = [p for p in places if (p.model, p.context, p.rate) == where]
    bands = {BASELINE: (PAPER_TTFT_S / 2, PAPER_TTFT_S * 2), LAYERKV: (0.2, 0.8)}
    found = []
    for policy, (low, high) in bands.items():
        seconds = [mean(p.cells[policy], "mean_ttft_ms") / 1e3 for p in here[:1]]
        reached, passed = (f"{seconds[0]:.3g} s", low <= seconds[0] <= high) if seconds else ("no such point", None)
        name = f"TTFT of {policy} at {PAPER_CONTEXT} tokens, {PAPER_RATE:g}/s"
        found.append(Gate(name, f"{low:g} to {high:g} s", reached, passed))
    return found


def _below_the_knee(places: Sequence[Place]) -> Gate:
    ratios = [
        (mean(p.cells[LAYERKV], "mean_ttft_ms") / mean(p.cells[BASELINE], "mean_ttft_ms"), p) for p in places if p.calm
    ]
    name, limit = "TTFT below the knee", "<= 1.1x of the baseline's"
    if not ratios:
        return Gate(name, limit, "no place below the knee", None)
    (low, _), (high, worst) = min(ratios, key=_first), max(ratios, key=_first)
    reached = f"{low:.2f} to {high:.2f} at {len(ratios)} places, most at {worst.words}"
    return Gate(name, limit, reached, high <= 1.1)


def _throughput(places: Sequence[Place]) -> Gate:
    name, limit = "output tok/s", ">= 0.95 everywhere, >= 0.97 on the mean"
    ratios = [(throughput_ratio(p.cells[LAYERKV], p.cells[BASELINE]), p) for p in places]
    if not ratios:
        return Gate(name, limit, "no place", None)
    least, worst = min(ratios, key=_first)
    average = float(np.mean([ratio for ratio, _ in ratios]))
    reached = f"least {least:.3f} ({worst.words}), mean {average:.3f} of {len(ratios)}"
    return Gate(name, limit, reached, least >= 0.95 and average >= 0.97)


def _never_more_violations(places: Sequence[Place]) -> Gate:
    judged = [(violations(p.cells[LAYERKV]) - violations(p.cells[BASELINE]), p) for p in places if p.load <= OVERLOAD]
    name, limit = "SLO violations", f"never more than the baseline's up to {OVERLOAD:g}x capacity"
    if not judged:
        return Gate(name, limit, "no place", None)
    more = [difference for difference, _ in judged if difference > 1e-9]
    most, worst = max(judged, key=_first)
    reached = f"more at {len(more)} of {len(judged)} places"
    if more:
        reached += f", by {100 * most:.1f} points at {worst.words}"
    return Gate(name, limit, reached, not more)


def _largest_gap(places: Sequence[Place]) -> Gate:
    pairs = [(violations(p.cells[BASELINE]), violations(p.cells[LAYERKV]), p) for p in places if p.load <= OVERLOAD]
    name, limit = "largest gap of violations", ">= 15 points"
    if not pairs:
        return Gate(name, limit, "no place", None)
    theirs, ours, where = max(pairs, key=lambda pair: pair[0] - pair[1])
    relative = f", {1 - ours / theirs:.0%} fewer" if theirs else ""
    reached = f"{100 * (theirs - ours):.1f} points: {theirs:.1%} to {ours:.1%}{relative} ({where.words})"
    return Gate(name, limit, reached, theirs - ours >= 0.15)


def _the_rule_matters(places: Sequence[Place]) -> Gate:
    pairs = [(violations(p.cells[NO_RULE]) - violations(p.cells[BASELINE]), p) for p in places if NO_RULE in p.cells]
    name, limit = "without the SLO rule", "more violations than the baseline somewhere"
    if not pairs:
        return Gate(name, limit, "no place", None)
    most, where = max(pairs, key=_first)
    count = sum(difference > 1e-9 for difference, _ in pairs)
    reached = f"more at {count} of {len(pairs)} places"
    if count:
        reached += f", by {100 * most:.1f} points at {where.words}"
    return Gate(name, limit, reached, count > 0)


def _first(pair: tuple[float, Place]) -> float:
    return pair[0]
