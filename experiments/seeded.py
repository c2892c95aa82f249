"""Simulated runs over seeds, and what the seeds say of them: the part that programs with a sweep share."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from absl import flags

from experiments.intervals import Estimate
from experiments.points import Point, run_points
from experiments.tables import rounded

SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds of arrivals and lengths, the same for all policies.", lower_bound=1)
PROCESSES = flags.DEFINE_integer("processes", None, "Runs at once. Default: one per core.", lower_bound=1)
KEPT = flags.DEFINE_string("kept", "results/points", "Folder of finished runs: what is there is not run again.")

Key = TypeVar("Key", bound=Hashable)
Cell = dict[str, list[Any]]  # by name in the summary: a value per seed
VALUES = (
    "duration", "completed", "mean_ttft_ms", "p99_ttft_ms", "mean_queue_ms", "mean_tpot_ms", "p99_itl_ms",
    "max_max_gap_ms", "mean_ttst_ms", "mean_e2el_ms", "output_throughput", "request_throughput", "slo_attainment",
    "peak_host_bytes", "total_preemptions", "link_bytes_out", "link_bytes_in", "steps",
)  # fmt: skip
HEADER = (
    "TTFT ms", "P99", "lower by", "TPOT ms", "P99 ITL", "max gap", "2nd token", "E2E s", "tok/s ratio", "violations",
    "host GiB", "preempted",
)  # fmt: skip
# What is worse when it is larger, and what when it is smaller; `losses` compares them.
LARGER_IS_WORSE = {
    "mean_ttft_ms": "TTFT", "p99_ttft_ms": "P99 TTFT", "mean_tpot_ms": "TPOT", "p99_itl_ms": "P99 ITL",
    "max_max_gap_ms": "max gap", "mean_ttst_ms": "2nd token", "mean_e2el_ms": "E2E",
}  # fmt: skip
NOTICED = 0.02  # a difference of less is none


def over_seeds(point: Point, num_seeds: int | None = None) -> list[Point]:
    """A point with each seed; by default those of --seeds."""
    return [dataclasses.replace(point, seed=seed) for seed in range(num_seeds or SEEDS.value)]


def empty_cells(runs: Mapping[Key, Sequence[Point]]) -> dict[Key, Cell]:
    """With a place for every value of every point."""
    return {key: {name: [None] * len(points) for name in VALUES} for key, points in runs.items()}


def run_all(runs: Mapping[Key, Sequence[Point]]) -> dict[Key, Cell]:
    """The values of all points, by the key of their group and in the order within it.

    Raises:
      ConfigError: a point failed.
    """
    places = [(key, i) for key, points in runs.items() for i in range(len(points))]
    found = dict(run_points([runs[key][i] for key, i in places], PROCESSES.value, Path(KEPT.value)))
    cells = empty_cells(runs)
    for index, (key, i) in enumerate(places):
        for name in VALUES:
            cells[key][name][i] = found[index].get(name)  # attainment only with objectives
    return cells


def mean(cell: Cell, name: str) -> float:
    """Over seeds; values that do not exist, such as a second token of one, count as 0."""
    return float(np.mean([value or 0.0 for value in cell[name]]))


def violations(cell: Cell) -> float:
    """Share of all requests that missed an objective."""
    return 1.0 - mean(cell, "slo_attainment")


def over(cell: Cell, first: Cell, name: str) -> Estimate:
    """A value over that of another cell, seed by seed."""
    return Estimate.of(np.array(cell[name], float) / np.array(first[name], float))


def lower_by(cell: Cell, first: Cell) -> Estimate:
    """How many times lower than the first one's its mean TTFT is."""
    return over(first, cell, "mean_ttft_ms")


def throughput_ratio(cell: Cell, first: Cell) -> float:
    """Output tokens/s over those of the first one, paired: the mean over seeds."""
    return float(np.mean(np.array(cell["output_throughput"]) / np.array(first["output_throughput"])))


def losses(cell: Cell, first: Cell) -> list[str]:
    """By what a cell is noticeably worse than the first one."""
    worse = [name for value, name in LARGER_IS_WORSE.items() if mean(cell, value) > (1 + NOTICED) * mean(first, value)]
    worse += ["tok/s"] if throughput_ratio(cell, first) < 1 - NOTICED else []
    objectives = cell["slo_attainment"][0] is not None
    return worse + (["violations"] if objectives and violations(cell) > violations(first) + 1e-9 else [])


def figures(cell: Cell, first: Cell) -> list[Any]:
    """A row under HEADER; TTFT and tok/s are relative to the first cell's."""
    ratio, low, high = lower_by(cell, first)
    gain = f"{ratio:.2f}x ({low:.2f} to {high:.2f})" if low < high else f"{ratio:.2f}x"
    missed = f"{violations(cell):.1%}" if cell["slo_attainment"][0] is not None else None
    return [
        *(mean(cell, name) for name in ("mean_ttft_ms", "p99_ttft_ms")),
        gain,
        *(mean(cell, name) for name in ("mean_tpot_ms", "p99_itl_ms", "max_max_gap_ms", "mean_ttst_ms")),
        mean(cell, "mean_e2el_ms") / 1e3,
        f"{throughput_ratio(cell, first):.3f}",
        missed,
        mean(cell, "peak_host_bytes") / 2**30,
        mean(cell, "total_preemptions"),
    ]


def rounded_values(value: Any) -> Any:
    """The same with every float to 5 digits, to keep the file small."""
    if isinstance(value, dict):
        return {key: rounded_values(item) for key, item in value.items()}
    return [rounded_values(item) for item in value] if isinstance(value, list) else rounded(value)
