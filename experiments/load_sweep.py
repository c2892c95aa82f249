"""Policies over the offered load: what repeats say of each (load, policy), against the first policy, and what issue 5
asks of them (must show 2). No JAX here.

The load is the arrival rate over the capacity of the first policy. A load is *below the knee* when, under the first
policy, less than half of the mean TTFT is queueing: requests do not wait for memory yet (as in `layerkv_gates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.gates import Gate
from experiments.intervals import Estimate

Summary = dict[str, Any]
LOWER_TTFT, BELOW_KNEE, THROUGHPUT, HELD = 5.0, 1.1, 0.95, 0.95  # limits of the gates
OVERLOAD = 1.5  # times capacity: as far as the share of requests that meet an objective is judged
FIGURES = (
    "mean_ttft_ms", "p99_ttft_ms", "mean_queue_ms", "mean_tpot_ms", "slo_attainment", "mean_e2el_ms", "mean_ttst_ms",
    "mean_max_gap_ms", "max_max_gap_ms", "p99_itl_ms", "output_throughput", "peak_host_bytes", "link_bytes_out",
    "link_bytes_in", "total_preemptions", "completed", "duration", "others",
)  # fmt: skip
HEADER = (
    "TTFT ms", "over paged", "P99", "TPOT ms", "objective", "E2E s", "2nd token", "max gap", "P99 ITL", "tok/s ratio",
    "host MiB", "preempted", "out MiB", "in MiB",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One policy at one load."""

    load: float
    policy: str
    runs: Sequence[Summary]  # one per repeat; those of a repeat served the same arrivals

    def mean(self, figure: str) -> float:
        """Over repeats; a figure that a run does not have (a second token, of requests of one) counts as 0."""
        return float(np.mean([run[figure] or 0.0 for run in self.runs]))

    def spread(self, figure: str) -> Estimate:
        """`mean` with its interval."""
        return Estimate.of([run[figure] or 0.0 for run in self.runs])

    def ratio(self, figure: str, first: Cell) -> Estimate:
        """Over the first policy's at the same load, paired by repeat."""
        ratios = np.array([a[figure] / b[figure] for a, b in zip(self.runs, first.runs, strict=True)])
        return Estimate.of(ratios)


class Sweep:
    """Cells by load and policy; the first policy is the one that loads and ratios refer to."""

    def __init__(self, cells: Sequence[Cell]):
        self.loads = sorted({c.load for c in cells})
        self.policies = list(dict.fromkeys(c.policy for c in cells))
        self._cells = {(c.load, c.policy): c for c in cells}

    def at(self, load: float, policy: str) -> Cell:
        """The cell of a policy."""
        return self._cells[load, policy]

    def first(self, load: float) -> Cell:
        """The cell of the first policy."""
        return self._cells[load, self.policies[0]]

    def below_knee(self, load: float) -> bool:
        """Whether requests do not wait for memory yet."""
        cell = self.first(load)
        return cell.mean("mean_queue_ms") < 0.5 * cell.mean("mean_ttft_ms")

    def rows(self) -> list[list[Any]]:
        """A row per cell: load, policy, and what HEADER names."""
        return [[load, policy, *self._row(load, policy)] for load in self.loads for policy in self.policies]

    def _row(self, load: float, policy: str) -> list[Any]:
        cell, first = self.at(load, policy), self.first(load)
        mib = 2**20
        return [
            cell.mean("mean_ttft_ms"),
            _words(cell.ratio("mean_ttft_ms", first)),
            *(cell.mean(name) for name in ("p99_ttft_ms", "mean_tpot_ms")),
            f"{cell.mean('slo_attainment'):.1%}",
            cell.mean("mean_e2el_ms") / 1e3,
            *(cell.mean(name) for name in ("mean_ttst_ms", "max_max_gap_ms", "p99_itl_ms")),
            _words(cell.ratio("output_throughput", first)),
            cell.mean("peak_host_bytes") / mib,
            cell.mean("total_preemptions"),
            *(cell.mean(f"link_bytes_{way}") / mib for way in ("out", "in")),
        ]


def gates(sweep: Sweep, policy: str, tpot_slo_ms: float) -> list[Gate]:
    """What issue 5 (must show 2) asks of `policy`. `tpot_slo_ms`: the objective that `slo_attainment` counts."""
    cells = [(load, sweep.at(load, policy), sweep.first(load)) for load in sweep.loads]
    ttft = [(cell.ratio("mean_ttft_ms", first).mean, load) for load, cell, first in cells]
    speed = [(cell.ratio("output_throughput", first).mean, load) for load, cell, first in cells]
    tpot = [(cell.mean("mean_tpot_ms"), load) for load, cell, _ in cells]
    share = [(cell.mean("slo_attainment"), load) for load, cell, _ in cells if load <= OVERLOAD]
    (best, at), (slowest, slowest_at) = min(ttft), min(speed)
    return [
        Gate("mean TTFT", f">= {LOWER_TTFT:g}x lower somewhere", f"{1 / best:.1f}x at {at:g}", best <= 1 / LOWER_TTFT),
        _below_knee([(ratio, load) for ratio, load in ttft if sweep.below_knee(load)]),
        Gate("throughput", f">= {THROUGHPUT:g}x", f"least {slowest:.3f} at {slowest_at:g}", slowest >= THROUGHPUT),
        _mean_tpot(max(tpot), tpot_slo_ms),
        _objective_met(share),
    ]


def _below_knee(ratios: Sequence[tuple[float, float]]) -> Gate:
    name, limit = "mean TTFT below the knee", f"<= {BELOW_KNEE:g}x"
    if not ratios:
        return Gate(name, limit, "no load below the knee", None)
    most, where = max(ratios)
    return Gate(name, limit, f"{most:.2f} at {where:g}, of {len(ratios)} loads", most <= BELOW_KNEE)


def _mean_tpot(most: tuple[float, float], tpot_slo_ms: float) -> Gate:
    reached = f"at most {most[0]:.1f} ms, at {most[1]:g}"
    return Gate("mean TPOT", f"within the objective, {tpot_slo_ms:.1f} ms", reached, most[0] <= tpot_slo_ms)


def _objective_met(shares: Sequence[tuple[float, float]]) -> Gate:
    name, limit = "TPOT objective", f"met by {HELD:.0%} of requests up to {OVERLOAD:g}x capacity"
    if not shares:
        return Gate(name, limit, "no such load", None)
    least, where = min(shares)
    return Gate(name, limit, f"by {least:.1%} at {where:g}", least >= HELD)


def _words(found: Estimate) -> str:
    """To hundredths."""
    spread = f" ({found.low:.2f} to {found.high:.2f})" if found.low < found.high else ""
    return f"{found.mean:.2f}{spread}"
