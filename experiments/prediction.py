"""How well a simulation foresaw real runs: figures of pairs of runs, and the gates. No JAX here.

A *cell* is one workload under one policy: several real runs and one simulated one. Steps are compared by themselves,
whatever became of the schedule: each real step's work goes through the cost model. The noise beside it is what one real
run says of another: steps of two runs with the same buckets, each with the one that the model holds nearest to it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.costmodel.step_model import StepModel, StepWork
from engine.executor.packing import Packer
from experiments.gates import Gate

METRICS = {"output_throughput": "tok/s", "mean_ttft_ms": "TTFT", "mean_tpot_ms": "TPOT"}
IDLE = 1e-4  # seconds between steps from which on the device has waited for the host
OVERLOAD = 1.5  # times its capacity: from there on queueing, not chance, makes the TTFT


@dataclass(frozen=True)
class Step:
    """A real step."""

    work: StepWork
    start: float  # submitted, and the one before it ended
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True)
class Cell:
    """One workload under one policy."""

    workload: str
    policy: str
    real: list[dict[str, Any]]  # summaries
    steps: list[list[Step]]  # of each real run
    simulated: dict[str, Any]
    last_arrival: float  # seconds after the first

    @property
    def load(self) -> float | None:
        """Offered load over capacity: how much longer than the arrivals the median run took; None: all came at once."""
        return float(np.median([r["duration"] for r in self.real])) / self.last_arrival if self.last_arrival else None

    @property
    def overloaded(self) -> bool:
        """Whether more came than could be served."""
        return self.load is None or self.load >= OVERLOAD

    def measured(self, metric: str) -> float:
        """The median of the real runs."""
        return float(np.median([r[metric] for r in self.real]))

    def ratio(self, metric: str) -> float:
        """Predicted / measured."""
        return self.simulated[metric] / self.measured(metric)


def predicted_seconds(steps: Sequence[Step], cost: StepModel) -> np.ndarray:
    """What the model says of each real step, float64 [n]; after a gap it includes the host's part."""
    ends = [-np.inf, *(step.end for step in steps)]
    times = [cost.step(step.work) for step in steps]
    return np.array([
        time.total if step.start - end > IDLE else time.device
        for time, step, end in zip(times, steps, ends[:-1], strict=True)
    ])  # fmt: skip


def step_errors(steps: Sequence[Step], cost: StepModel) -> np.ndarray:
    """predicted / measured - 1 of each step, float64 [n]."""
    return predicted_seconds(steps, cost) / np.array([s.seconds for s in steps]) - 1


def repeat_errors(runs: Sequence[Sequence[Step]], cost: StepModel, packer: Packer) -> np.ndarray:
    """time in one run / time in another - 1, for every step of every ordered pair of runs, float64 [n]."""
    sorted_runs = [_by_buckets(steps, cost, packer) for steps in runs]
    errors = []
    for one, other in itertools.permutations(sorted_runs, 2):
        for buckets in one.keys() & other.keys():
            (x, seconds), (known, others) = one[buckets], other[buckets]
            right = np.searchsorted(known, x).clip(1, max(len(known) - 1, 1))
            left = right - 1
            right = right.clip(max=len(known) - 1)
            nearest = np.where(x - known[left] <= known[right] - x, left, right)
            errors.append(others[nearest] / seconds - 1)
    return np.concatenate(errors) if errors else np.empty(0)


def _by_buckets(steps: Sequence[Step], cost: StepModel, packer: Packer) -> dict[Any, tuple[np.ndarray, np.ndarray]]:
    """By the buckets of a step: predicted seconds in rising order, and what was measured."""
    groups: defaultdict[Any, list[tuple[float, float]]] = defaultdict(list)
    for step in steps:
        tiles = sum(len(packer.tile_ends(*prefill)) for prefill in step.work.prefills)
        buckets = tuple(bucket for bucket, _, _ in packer.cut(step.work.num_decode, tiles))
        groups[buckets].append((cost.step(step.work).device, step.seconds))
    return {buckets: tuple(np.array(sorted(pairs)).T) for buckets, pairs in groups.items()}


def policy_ratios(cells: Iterable[Cell]) -> list[tuple[str, str, str, float]]:
    """(workload, policy, metric, predicted / measured) of each figure relative to the workload's first policy's; of
    TTFTs only under overload."""
    rows = []
    for first, *others in _by_workload(cells).values():
        for cell, metric in itertools.product(others, METRICS):
            if metric != "mean_ttft_ms" or (cell.overloaded and first.overloaded):
                rows.append((cell.workload, cell.policy, metric, cell.ratio(metric) / first.ratio(metric)))
    return rows


def winners(cells: Iterable[Cell]) -> tuple[int, int]:
    """(agreeing, clear) pairs of policies on one workload by one metric: clear when the real runs' ranges are apart."""
    agreeing = clear = 0
    for group in _by_workload(cells).values():
        for (a, b), metric in itertools.product(itertools.combinations(group, 2), METRICS):
            ours, theirs = ([r[metric] for r in c.real] for c in (a, b))
            if min(ours) > max(theirs) or max(ours) < min(theirs):
                clear += 1
                agreeing += (a.simulated[metric] > b.simulated[metric]) == (min(ours) > max(theirs))
    return agreeing, clear


def _by_workload(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    groups: defaultdict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.workload].append(cell)
    return groups


def within(name: str, ratios: Sequence[float], limit: float) -> Gate:
    """Every ratio within `limit` of 1."""
    errors = np.abs(np.asarray(ratios, float) - 1)
    if not len(errors):
        return Gate(name, f"within {limit:.0%}", "no cell", None)
    met = int((errors <= limit).sum())
    reached = f"mean {errors.mean():.1%}, largest {errors.max():.1%}, met by {met} of {len(errors)}"
    return Gate(name, f"within {limit:.0%}", reached, bool(errors.max() <= limit))


def gates(cells: Sequence[Cell], errors: np.ndarray, repeats: np.ndarray) -> list[Gate]:
    """What issue 4 asks for. `errors`, `repeats`: of all steps of all cells."""
    mape = float(np.abs(errors).mean())
    noise = f"{np.abs(repeats).mean():.1%}" if len(repeats) else "unknown"
    agreeing, clear = winners(cells)
    return [
        Gate("step MAPE", "<= 15%", f"{mape:.1%} (repeat runs: {noise})", mape <= 0.15),
        within("throughput", [c.ratio("output_throughput") for c in cells], 0.10),
        within("TTFT at >= 1.5x capacity", [c.ratio("mean_ttft_ms") for c in cells if c.overloaded], 0.25),
        within("policy ratios", [ratio for *_, ratio in policy_ratios(cells)], 0.10),
        Gate(
            "same winner",
            ">= 95% of clear cases",
            f"{agreeing} of {clear}",
            agreeing >= 0.95 * clear if clear else None,
        ),
    ]
