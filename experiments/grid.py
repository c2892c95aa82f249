"""A grid of simulated runs: every combination of the values of some parameters, as points. No JAX."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import ConfigError
from experiments import workloads
from experiments.common_flags import ENGINE_FLAGS, EXECUTOR, SEED
from experiments.points import Point

MODEL, OF_WORKLOAD = "model", "workload."
# A point always is on the virtual clock, and its seed is that of its workload, too.
SETTINGS = tuple(
    h.name for holders in ENGINE_FLAGS.values() for h in holders if h.name not in (EXECUTOR.name, SEED.name)
)


@dataclass(frozen=True)
class Axis:
    """A parameter and its values, as they are written.

    Raises:
      ConfigError: a parameter that there is not (lists those that there are), no value, or one given twice.
    """

    name: str
    values: tuple[str, ...]

    def __post_init__(self):
        option = self.name.removeprefix(OF_WORKLOAD) if self.name.startswith(OF_WORKLOAD) else None
        if self.name in (SEED.name, f"{OF_WORKLOAD}seed"):
            raise ConfigError(f"--param={self.words}: every point runs with each seed of --seeds already")
        if self.name not in (MODEL, *SETTINGS) and not option:
            known = f"{MODEL}, {OF_WORKLOAD}OPTION, {', '.join(sorted(SETTINGS))}"
            raise ConfigError(f"--param={self.words}: {self.name!r} is unknown; known: {known}")
        if not all(self.values):
            raise ConfigError(f"--param={self.words}: expected name=value,value,...")
        if len({*self.values}) < len(self.values):
            raise ConfigError(f"--param={self.words}: a value is given twice")

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Reads `name=value,value,...`."""
        name, _, values = text.partition("=")
        return cls(name, tuple(values.split(",")))

    @property
    def words(self) -> str:
        """As `parse` reads it."""
        return f"{self.name}={','.join(self.values)}"


@dataclass(frozen=True)
class Grid:
    """Settings, and the parameters that are laid over them.

    Raises:
      ConfigError: no parameter, or one twice.
    """

    axes: Sequence[Axis]
    model: str
    engine: str
    workload: str  # a spec without a seed
    slo: str

    def __post_init__(self):
        names = [axis.name for axis in self.axes]
        if not names:
            raise ConfigError("--param is missing: what is varied, as name=value,value,...")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"--param={twice[0]} is given twice: write its values into one")

    def points(self) -> dict[tuple[str, ...], Point]:
        """By the values, in the order of the parameters; the last one varies fastest.

        Raises:
          ConfigError: settings that no flag would take, or that contradict.
        """
        names = [axis.name for axis in self.axes]
        combinations = itertools.product(*(axis.values for axis in self.axes))
        return {values: self._point(dict(zip(names, values, strict=True))) for values in combinations}

    def _point(self, given: dict[str, str]) -> Point:
        model = given.pop(MODEL, self.model)
        options = {k.removeprefix(OF_WORKLOAD): v for k, v in given.items() if k.startswith(OF_WORKLOAD)}
        engine = [
            f"{name}={value}" for name, value in given.items() if name in SETTINGS
        ]  # of a name the last one counts
        workload = workloads.with_options(self.workload, options)
        return Point(model, ",".join(filter(None, [self.engine, *engine])), workload, slo=self.slo)
