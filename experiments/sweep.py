"""A grid of simulated runs over anything that can be set: what each combination of values does to the metrics.

    python -m experiments.sweep --model=llama2-7b --engine=device=l20,host_bytes=256GiB \
        --workload=synthetic:num=100,prompt=fixed:2048,output=fixed:450 \
        --param=policy=vllm_v0,layerkv --param=workload.rate=0.5,1,1.5

A parameter is a flag of the engine (`--param=page_size=16,32`), an option of the workload (`workload.rate=1,2`), or
`model`. Every combination runs once per seed, on all cores; runs that have ended are kept (--kept) and never run again
by the same code, so that the same command goes on after an interruption, and a wider grid runs what is new.

Prints a table, and writes data.csv (a row per combination: its values; mean and 95% interval over seeds of every
--metric; the same bytes whenever the same code runs) and config.json under --out. Ends with one JSON line.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping

from absl import flags

from engine.errors import ConfigError
from engine.files import write_whole
from experiments import common_flags, environment, seeded
from experiments.figures.base import Table
from experiments.grid import Axis, Grid
from experiments.intervals import Estimate
from experiments.run_record import claim
from experiments.seeded import VALUES, Cell, over_seeds, run_all
from experiments.tables import format_table, rounded

flags.declare_key_flag("model")
flags.declare_key_flag("out")
flags.declare_key_flag("overwrite")
flags.adopt_module_key_flags(seeded)
PARAMS = flags.DEFINE_multi_string("param", [], "name=value,value,...: what is varied, and over what; repeatable.")
ENGINE = flags.DEFINE_string("engine", "policy=vllm_v0", "Settings under all of them, name=value,..., as flags are.")
WORKLOAD = flags.DEFINE_string("workload", None, "Workload spec without a seed, such as synthetic:num=100,rate=1.")
GOODPUT = flags.DEFINE_string("goodput", "ttft:3000,tpot:200", "Limits in ms that attainment counts; empty: none.")
METRICS = flags.DEFINE_multi_enum(
    "metric", ["mean_ttft_ms", "mean_tpot_ms", "output_throughput", "slo_attainment"], VALUES, "Columns; repeatable."
)
RESUME = flags.DEFINE_bool("resume", False, "Goes on in an --out that holds an earlier sweep.")
DATA, CONFIG = FILES = ("data.csv", "config.json")

Estimates = dict[tuple[str, ...], list[Estimate | None]]  # by the values of the parameters: of each metric


def grid_from_flags() -> Grid:
    """What the flags describe.

    Raises:
      ConfigError: as `Grid` and `Axis`, or no --model or --workload.
    """
    if not common_flags.MODEL.value or not WORKLOAD.value:
        raise ConfigError(f"--{'workload' if common_flags.MODEL.value else 'model'} is missing: under all points")
    axes = [Axis.parse(text) for text in PARAMS.value]
    return Grid(axes, common_flags.MODEL.value, ENGINE.value, WORKLOAD.value, GOODPUT.value)


def estimate(cell: Cell, metric: str) -> Estimate | None:
    """Over the seeds that have it; None: no seed has, such as attainment without objectives."""
    values = [value for value in cell[metric] if value is not None]
    return Estimate.of(values) if values else None


def data(names: list[str], metrics: list[str], found: Mapping[tuple[str, ...], list[Estimate | None]]) -> Table:
    """A row per point: mean, low and high of every metric."""
    header = [*names, *(f"{metric}{part}" for metric in metrics for part in ("", " low", " high"))]
    rows = [[*key, *(v for e in of for v in (e or [None] * 3))] for key, of in found.items()]
    return Table(header, rows)


def main() -> int:
    """The program."""
    grid, metrics, start = grid_from_flags(), list(dict.fromkeys(METRICS.value)), time.perf_counter()
    names, points = [axis.name for axis in grid.axes], grid.points()
    out = claim(common_flags.out_directory("sweep"), RESUME.value or common_flags.OVERWRITE.value, FILES)
    cells = run_all({key: over_seeds(point) for key, point in points.items()})
    found: Estimates = {key: [estimate(cell, metric) for metric in metrics] for key, cell in cells.items()}
    write_whole(out / DATA, data(names, metrics, found).csv())
    seconds = round(time.perf_counter() - start, 1)
    said = [point.said() for point in points.values()]
    about = {"grid": dataclasses.asdict(grid), "seeds": seeded.SEEDS.value, "metrics": metrics, "points": said}
    write_whole(out / CONFIG, json.dumps(about | {"seconds": seconds} | environment.describe(), indent=1) + "\n")
    print(format_table([*names, *metrics], [[*key, *(e and e.words() for e in of)] for key, of in found.items()]))
    line = {"bench": "sweep", "points": len(points), "runs": len(points) * seeded.SEEDS.value}
    print(json.dumps(line | {"seconds": rounded(seconds), "data": str(out / DATA)}))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)
