"""Capacities by simulated runs: searches (`bisection.py`) over curves of attainment, with no run made twice.

A curve is a policy with settings at a site, and the seeds it is run with; attainment at a rate is the mean over seeds.
Only the second half of a run's requests is judged: the first finds an empty machine, which for a while serves any rate.
A run says for every scale and set of objectives what share of requests kept to them, so searches that ask for different
objectives of one curve share its runs. Runs under a host tier that never wanted more room stand for those under any
tier that has as much (`HostTier.asked`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bisection import LOW, Bracket, Search, crossings, drive, rate_at, search
from experiments.capacity_places import TUNED_ON, Site, needs_host
from experiments.judged import judge
from experiments.objectives import Shares
from experiments.points import Point, run_points
from experiments.tuning import POLICIES

SLACK = 1e-9  # of attainment: a mean of shares
JUDGED_ON = (0, 1, 2)  # workload seeds; settings were chosen on another


@dataclass(frozen=True)
class Curve:
    """Attainment over the arrival rate."""

    site: Site
    policy: str
    settings: str  # over those of the policy
    seeds: tuple[int, ...] = JUDGED_ON
    told: float = 1.0  # scale of the objective that the policy is told; 1 if it is told none

    def points(self, index: int) -> list[Point]:
        """A run per seed at a grid index."""
        rate = rate_at(self.site.base_rate, index)
        return [self.site.point(POLICIES[self.policy], self.settings, rate, seed, self.told) for seed in self.seeds]

    @property
    def host_gb(self) -> int:
        """The host tier that it is run with; 0: none."""
        return self.site.place.host_gb if needs_host(POLICIES[self.policy], self.settings) else 0


@dataclass(frozen=True)
class Ask:
    """At how high a rate does a curve reach `level` of a set of objectives at a scale?"""

    curve: Curve
    objectives: str  # of `objectives.SETS`
    scale: float = 1.0
    level: float = 0.9

    @classmethod
    def of(cls, site: Site, policy: str, settings: str, objectives: str, scale=1.0, level=0.9, seeds=JUDGED_ON) -> Ask:
        """With a curve of its own; a policy that takes an objective is told it at this scale."""
        told = float(scale) if POLICIES[policy].told else 1.0
        return cls(Curve(site, policy, settings, tuple(seeds), told), objectives, scale, level)


@dataclass(frozen=True)
class Capacity:
    """What a search found."""

    rate: float  # requests/s, the highest that passes; 0: not even the lowest does
    index: int | None  # on the grid
    bounded: bool  # False: the highest rate of the grid passes too
    crossings: tuple[tuple[float, float], ...]  # pairs of rates tried: the lower one fails, the higher one passes
    tried: tuple[tuple[float, float], ...]  # (rate, attainment)


Record = dict[str, Any]  # of a curve at an index: `shares` by seed, the largest `asked`


class Bench:
    """Runs, and what is known from them."""

    def __init__(self, kept: Path, processes: int | None = None):
        self.kept, self.processes = kept, processes
        self.num_runs = 0  # that were needed: made now or kept from before
        self._known: dict[Curve, dict[int, dict[int, Record]]] = {}  # by curve, grid index and host tier

    def based(self, sites: Sequence[Site]) -> list[Site]:
        """Sites with their base rate, which does not depend on host tiers, to three digits."""
        found = self._run([site.full() for site in sites])
        return [
            dataclasses.replace(site, base_rate=float(f"{f['rate']:.3g}")) for site, f in zip(sites, found, strict=True)
        ]

    def capacities(
        self, asks: Iterable[Ask], start: dict[Ask, int] | None = None, below: int = -LOW
    ) -> dict[Ask, Capacity]:
        """A search for each, from grid index `start` (default: the base rate), all together; no further down than
        `below` steps."""
        first = {ask: (start or {}).get(ask, 0) for ask in asks}
        searches: dict[Ask, Search] = {ask: search(i, max(LOW, i - below)) for ask, i in first.items()}
        found = drive(searches, self._passes)
        return {ask: self._capacity(ask, bracket) for ask, bracket in found.items()}

    def _passes(self, wanted: Sequence[tuple[Ask, int]]) -> list[bool]:
        self._make({(ask.curve, index) for ask, index in wanted})
        return [self._attained(ask, index) >= ask.level - SLACK for ask, index in wanted]

    def _attained(self, ask: Ask, index: int) -> float:
        """Mean over seeds."""
        shares: list[Shares] = self._find(ask.curve, index)["shares"]  # type: ignore[index]
        return float(np.mean([of[f"{ask.scale:g}"][ask.objectives] for of in shares]))

    def _make(self, wanted: set[tuple[Curve, int]]) -> None:
        """Runs what is not known."""
        missing = sorted(((c, i) for c, i in wanted if self._find(c, i) is None), key=_order)
        points = [point for curve, index in missing for point in curve.points(index)]
        results = iter(self._run(points))
        for curve, index in missing:
            runs = [next(results) for _ in curve.seeds]
            record = {"shares": [run["shares"] for run in runs], "asked": max(run["asked"] for run in runs)}
            self._known.setdefault(_any_host(curve), {}).setdefault(index, {})[curve.host_gb] = record

    def _find(self, curve: Curve, index: int) -> Record | None:
        """What is known of a curve at an index, perhaps from a larger host tier that was not used further."""
        known, size = self._known.get(_any_host(curve), {}).get(index, {}), curve.host_gb
        if size in known:
            return known[size]
        return next((r for larger, r in known.items() if larger > size and r["asked"] <= size * 10**9), None)

    def _run(self, points: Sequence[Point]) -> list[dict[str, Any]]:
        self.num_runs += len(points)
        found = dict(run_points(points, self.processes, self.kept, judge))
        return [found[i] for i in range(len(points))]

    def _capacity(self, ask: Ask, bracket: Bracket) -> Capacity:
        base = ask.curve.site.base_rate
        tried = [i for i in sorted(self._known[_any_host(ask.curve)]) if self._find(ask.curve, i)]
        attained = {i: self._attained(ask, i) for i in tried}
        crossed = crossings({i: share >= ask.level - SLACK for i, share in attained.items()})
        return Capacity(
            0.0 if bracket.passes is None else rate_at(base, bracket.passes),
            bracket.passes,
            bracket.fails is not None,
            tuple((rate_at(base, a), rate_at(base, b)) for a, b in crossed),
            tuple((rate_at(base, i), round(share, 4)) for i, share in attained.items()),
        )


def tuning_ask(site: Site, policy: str, settings: str, objectives: str) -> Ask:
    """What settings are chosen by: capacity at scale 1 and the lowest level, on the seed that nobody is judged on."""
    return Ask.of(site, policy, settings, objectives, seeds=(TUNED_ON,))


def _any_host(curve: Curve) -> Curve:
    return dataclasses.replace(curve, site=curve.site.at(host_gb=0))


def _order(wanted: tuple[Curve, int]) -> tuple[str, int]:
    return str(wanted[0]), wanted[1]
