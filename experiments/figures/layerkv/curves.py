"""What figures 6 to 9 share: the same requests under every policy, ratios paired by seed, and lines over a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.figures.base import PREDICTED, Band, Verdict
from experiments.figures.layerkv.setting import HYGIENE, LAYERKV, VLLM, estimate, load_of, remarks
from experiments.intervals import Estimate
from experiments.seeded import Cell, mean, over

Values = Sequence[float] | np.ndarray
CALM = 0.9  # times capacity: below the knee
EQUAL = Band(0.9, 1.1)  # what "about 1" means
# "lower by": times lower than the baseline's; "fewer": the baseline's share of violations less the policy's.
HEADER = (
    "policy", "ttft ms", "p99 ttft ms", "lower by", "lower by low", "lower by high", "p99 lower by",
    "p99 lower by low", "p99 lower by high", "tpot ms", "tok/s", "tok/s ratio", "tok/s ratio low", "tok/s ratio high",
    "violations", "violations low", "violations high", "fewer", "fewer low", "fewer high", *HYGIENE,
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """The same requests under every policy."""

    where: str  # in a verdict
    at: tuple[Any, ...]  # the first values of its rows
    rate: float  # requests/s
    cells: Mapping[str, Cell]  # by policy, the baseline's among them
    full: Cell  # all at once under the baseline
    alone: Cell  # each request by itself

    @property
    def load(self) -> float:
        """Times the baseline's capacity."""
        return load_of(self.full, self.rate)

    def lower_by(self, name: str = "mean_ttft_ms", policy: str = LAYERKV) -> Estimate:
        """How many times lower than the baseline's a value is."""
        return over(self.cells[VLLM], self.cells[policy], name)

    def relative(self, name: str, policy: str = LAYERKV) -> Estimate:
        """A value over the baseline's."""
        return over(self.cells[policy], self.cells[VLLM], name)

    def fewer_violations(self, policy: str = LAYERKV) -> Estimate:
        """The baseline's share of requests that missed an objective, less a policy's."""
        met, first = (np.array(self.cells[p]["slo_attainment"], float) for p in (policy, VLLM))
        return Estimate.of(met - first)

    def rows(self) -> list[list[Any]]:
        """One per policy: `at`, then what `HEADER` names."""
        return [[*self.at, policy, *self._row(policy)] for policy in self.cells]

    def _row(self, policy: str) -> list[Any]:
        cell = self.cells[policy]
        ttft, p99 = self.lower_by("mean_ttft_ms", policy), self.lower_by("p99_ttft_ms", policy)
        speed, missed = self.relative("output_throughput", policy), violations(cell)
        fewer = self.fewer_violations(policy)
        return [
            *(mean(cell, name) for name in ("mean_ttft_ms", "p99_ttft_ms")),
            *(ttft.mean, ttft.low, ttft.high, p99.mean, p99.low, p99.high),
            *(mean(cell, name) for name in ("mean_tpot_ms", "output_throughput")),
            *(speed.mean, speed.low, speed.high, missed.mean, missed.low, missed.high),
            *(fewer.mean, fewer.low, fewer.high),
            *remarks(cell, self.rate, self.full, self.alone),
        ]


def violations(cell: Cell) -> Estimate:
    """Share of all requests that missed an objective."""
    return Estimate.of(1 - np.array(cell["slo_attainment"], float))


def equal_below_knee(places: Sequence[Place], name: str, what: str, why: str = "") -> Verdict:
    """Where memory is no bottleneck LayerKV must be what the baseline is."""
    found = {p.where: p.relative(name) for p in places if p.load <= CALM}
    return Verdict.every(f"{what} over vLLM's up to a load of {CALM:g}", PREDICTED, EQUAL, found, "x", why)


def throughput(places: Sequence[Place], least: float, why: str = "") -> Verdict:
    """LayerKV's tokens/s are not to fall."""
    found = {p.where: p.relative("output_throughput") for p in places}
    return Verdict.every("tok/s over vLLM's", PREDICTED, Band(least), found, "x", why)


def tpot_where_served(places: Sequence[Place], most_ms: float, why: str = "") -> Verdict:
    """LayerKV's TPOT where it serves at least half of the requests as it should."""
    served = [p for p in places if violations(p.cells[LAYERKV]).mean < 0.5]
    found = {p.where: estimate(p.cells[LAYERKV], "mean_tpot_ms") for p in served}
    return Verdict.every("TPOT where fewer than half violate", PREDICTED, Band(high=most_ms), found, " ms", why)


def more_than_vllm_somewhere(places: Sequence[Place], policy: str, why: str = "") -> Verdict:
    """The paper's ablation: without its rule LayerKV misses more objectives than the baseline."""
    found = {p.where: p.fewer_violations(policy) for p in places}
    more = sum(value.high < 0 for value in found.values())
    where = min(found, key=lambda place: found[place].mean)
    reached = f"more at {more} of {len(found)}; most {-found[where].mean:+.3g} ({where})"
    return Verdict("violations without the SLO rule, less vLLM's", PREDICTED, "> 0 somewhere", reached, more > 0, why)


def draw_line(
    axes: Any,
    x: Values,
    y: Values,
    states: Sequence[str] | np.ndarray,
    style: Mapping[str, Any],
    spread: tuple[Values, Values] | None = None,
    **more: Any,
) -> None:
    """A line whose overloaded points are hollow.

    Args:
      states: of each point, "stable" or "overloaded".
      style: color and marker.
      spread: the lower and the upper ends of intervals.
      more: of the line: its label, its linestyle.
    """
    color, marker = style["color"], {"marker": style["marker"], "markersize": 3.2, "markeredgewidth": 0.8}
    if spread:
        axes.vlines(x, *spread, color=color, linewidth=0.8)
    axes.plot(x, y, color=color, linewidth=1, **marker, **more)
    hollow = [i for i, state in enumerate(states) if state == "overloaded"]
    at = [x[i] for i in hollow], [y[i] for i in hollow]
    axes.plot(*at, color=color, linestyle="none", markerfacecolor="white", **marker)
