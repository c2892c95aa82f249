"""Simulated runs as values, and many of them over all cores.

A `Point` says everything that a run on the virtual clock follows from, but the code. `run_points` runs any number of
them, one process per core, and with a folder keeps every one that has ended (`kept_points.py`), so that a sweep that
was interrupted goes on where it was. Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging

from engine import Engine
from engine.config import EngineConfig
from engine.errors import ConfigError, FolioError
from engine.summary import Slo
from experiments import workloads
from experiments.common_flags import laid_over
from experiments.kept_points import KeptPoints
from experiments.outcomes import measure
from experiments.replay import StopFlag
from experiments.tables import ProgressLine
from experiments.workloads import WorkloadRequest

BASE = EngineConfig(executor="sim")


@dataclass(frozen=True)
class Point:
    """One run on the virtual clock.

    Raises:
      ConfigError: settings that no flag would take or that contradict, or objectives that cannot be read.
    """

    model: str  # a preset, a directory, or where a ModelConfig is: package.module:Name, path/to/file.py:Name
    engine: str  # settings over `BASE`, name=value,... as `bench_policies --engine` takes them
    workload: str  # a spec, without a seed
    seed: int | None = 0  # of the workload and of the engine; None: the workload has its own (a frozen one)
    slo: str = ""  # objectives in milliseconds, ttft:3000,tpot:200; adds attainment to the summary

    def __post_init__(self):
        _ = self.config, self.objectives

    @property
    def config(self) -> EngineConfig:
        """The engine's settings."""
        return laid_over(dataclasses.replace(BASE, seed=self.seed or 0), self.engine, "point engine")

    @property
    def objectives(self) -> Slo | None:
        """The limits that `slo` writes down."""
        return Slo.parse(self.slo) if self.slo else None

    @property
    def spec(self) -> str:
        """The workload's spec with the seed in it."""
        if self.seed is None:
            return self.workload
        return f"{self.workload}{',' if ':' in self.workload else ':'}seed={self.seed}"

    def requests(self) -> list[WorkloadRequest]:
        """The workload.

        Raises:
          WorkloadError: a spec that cannot be built.
        """
        return workloads.build(self.spec)

    def said(self) -> dict[str, Any]:
        """What it is, without a seed; plain JSON types."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "seed"}

    def words(self) -> str:
        """The point in one line."""
        return " ".join(str(value) for value in dataclasses.astuple(self) if value not in (None, ""))


Run = Callable[[Point], dict[str, Any]]


def run_point(point: Point) -> dict[str, Any]:
    """The summary of one run: `engine.summary.summarise` over all of it, and the number of `steps`. It follows from the
    point alone: no wall time is in it.

    Raises:
      FolioError: a point that cannot be run, or a run in which no request completes.
    """
    engine = Engine.from_pretrained(point.model, point.config)
    summary = measure(engine, point.requests(), StopFlag(), point.objectives)
    assert summary is not None  # nobody sets the flag
    return summary


def run_points(
    points: Sequence[Point], processes: int | None = None, kept: Path | None = None, run: Run | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, summary) of each point, in the order in which they end.

    Args:
      processes: at once; None: one per core. 1 runs them in this process.
      kept: a folder of finished points: those that are in it are not run again, and new ones go into it.
      run: a function of a module that makes plain JSON types of a point, in place of `run_point`; it needs a folder of
        its own.

    Raises:
      ConfigError: some points failed; the others have been yielded (and kept), and a line said of each failure why. Or
        a worker was killed.
    """
    keep = KeptPoints(kept) if kept else None
    done = keep.load(points) if keep else {}
    yield from done.items()
    left = [i for i in range(len(points)) if i not in done]
    line, start, failures = ProgressLine(), time.perf_counter(), []
    for number, (i, result) in enumerate(_results(points, left, processes or os.cpu_count() or 1, run or run_point), 1):
        if isinstance(result, dict):
            if keep:
                keep.add(points[i], result)
            yield i, result
        else:
            failures.append(f"{points[i].words()}: {result}")
            logging.error("point %d failed: %s", i, failures[-1])
        seconds = time.perf_counter() - start
        rest = seconds / number * (len(left) - number)
        line.show(f"{len(done) + number} of {len(points)} points, {seconds:.0f} s, about {rest:.0f} s left")
    line.close()
    if failures:
        raise ConfigError(f"{len(failures)} of {len(points)} points failed; the first: {failures[0]}")


def _results(
    points: Sequence[Point], chosen: list[int], processes: int, run: Run
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(index, summary or why there is none) of the chosen points, as they end."""
    if processes == 1 or len(chosen) < 2:
        before = logging.get_verbosity()
        for i in chosen:
            logging.set_verbosity(logging.ERROR)  # an engine's notes would come once per point
            result = _attempt(run, points[i])
            logging.set_verbosity(before)
            yield i, result
        return
    context = multiprocessing.get_context("spawn")  # a fork would take over locks of threads that it does not have
    with ProcessPoolExecutor(min(processes, len(chosen)), context, initializer=_begin_process) as pool:
        futures: dict[Future, int] = {pool.submit(_attempt, run, points[i]): i for i in chosen}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise ConfigError("a worker was killed, perhaps for memory: points that had ended are kept") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _attempt(run: Run, point: Point) -> dict[str, Any] | str:
    """A summary, or in one line why there is none."""
    try:
        return run(point)
    except FolioError as error:
        return str(error)
    except Exception as error:  # a bug: it belongs to its point, and the others go on
        return " ".join(f"{type(error).__name__}: {error}".split())


def _begin_process() -> None:
    """Of a worker: it ends when the program is killed, and engines say nothing."""
    logging.set_verbosity(logging.ERROR)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
