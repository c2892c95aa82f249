"""Points on the real engine: interleaved repeats in random order, as cells like those of `seeded.py`. No JAX at import.

A point's seed is a repeat: its arrivals and lengths are the same under every policy. Runs that other processes disturb
are made again while --patience lasts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from experiments import common_flags, quiet
from experiments.outcomes import measure
from experiments.points import Point
from experiments.quiet import Others
from experiments.replay import StopFlag
from experiments.seeded import VALUES, Cell, Key, empty_cells
from experiments.tables import ProgressLine

if TYPE_CHECKING:
    from engine import Engine

flags.adopt_module_key_flags(quiet)


def run_all(runs: Mapping[Key, Sequence[Point]], stop: StopFlag | None = None) -> dict[Key, Cell]:
    """The values of all points, by the key of their group and in the order within it. An engine serves all points with
    its model and settings.

    Raises:
      FolioError: a point that cannot be run.
      KeyboardInterrupt: `stop` is set; a run is not worth much without the others.
    """
    stop, others, line = stop or StopFlag(), Others.from_flags(), ProgressLine()
    cells = empty_cells(runs)
    repeats = max(map(len, runs.values()), default=0)
    engines: dict[Hashable, Engine] = {}
    done, total = 0, sum(map(len, runs.values()))
    for repeat in range(repeats):
        keys = [key for key, points in runs.items() if repeat < len(points)]
        for i in np.random.default_rng(repeat).permutation(len(keys)).tolist():
            point = runs[keys[i]][repeat]
            run = others.undisturbed(
                partial(measure, _engine(engines, point), point.requests(), stop, point.objectives)
            )
            if run is None:
                raise KeyboardInterrupt
            for name in VALUES:
                cells[keys[i]][name][repeat] = run.get(name)
            done += 1
            line.show(f"repeat {repeat + 1} of {repeats}: {done} of {total} runs")
    line.close()
    return cells


def _engine(engines: dict[Hashable, Engine], point: Point) -> Engine:
    """The warm engine of a point's model and settings."""
    key = point.model, point.engine
    if key not in engines:
        config = dataclasses.replace(point.config, executor="jax", seed=0)
        engines[key] = common_flags.load_engine(point.model, config)
        engines[key].warmup()
    return engines[key]
