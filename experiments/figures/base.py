"""What a figure of a paper is here: the runs it needs, the table made of them, verdicts, and a picture. No JAX.

A figure is one small class. `reproduce` runs its points, hands back what they measured, and writes its files. A verdict
says what kind of evidence it is:

    arithmetic   follows from shapes and sizes; no time in it
    fitted       constants were fitted to the very points it is compared with
    predicted    simulated, with constants that were fitted elsewhere
    measured     on the real engine

Only the last two count as reproduction. A number with an uncertainty passes when its whole interval lies in the band.
"""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from experiments.gates import WORDS
from experiments.intervals import Estimate
from experiments.points import Point
from experiments.seeded import Cell
from experiments.tables import format_table, number, rounded

ARITHMETIC, FITTED, PREDICTED, MEASURED = KINDS = ("arithmetic", "fitted", "predicted", "measured")
REPRODUCTION = (PREDICTED, MEASURED)


@dataclass(frozen=True)
class Band:
    """Where a number has to lie, both ends included."""

    low: float = -np.inf
    high: float = np.inf

    def holds(self, found: Estimate | float) -> bool:
        """Whether a number, or the whole interval of one, lies in it."""
        if isinstance(found, Estimate):
            return self.low <= found.low and found.high <= self.high
        return self.low <= found <= self.high

    def words(self, unit: str = "") -> str:
        """For a verdict."""
        if np.isinf(self.high):
            return f">= {self.low:g}{unit}"
        return f"<= {self.high:g}{unit}" if np.isinf(self.low) else f"{self.low:g} to {self.high:g}{unit}"


@dataclass(frozen=True)
class Verdict:
    """A claim of the paper, or ours, and what became of it."""

    name: str
    kind: str
    limit: str
    reached: str
    passed: bool | None  # None: there was nothing to judge
    why: str = ""  # the best explanation found; printed when it is missed

    def __post_init__(self):
        assert self.kind in KINDS, f"verdict {self.name!r} has kind {self.kind!r}; known: {', '.join(KINDS)}"

    @property
    def counts(self) -> bool:
        """Whether it is a reproduction of anything."""
        return self.kind in REPRODUCTION

    @classmethod
    def within(
        cls, name: str, kind: str, band: Band, found: Estimate | float, unit: str = "", why: str = ""
    ) -> Verdict:
        """A number against a band."""
        reached = found.words(unit) if isinstance(found, Estimate) else f"{number(found)}{unit}"
        return cls(name, kind, band.words(unit), reached, band.holds(found), why)

    @classmethod
    def every(
        cls, name: str, kind: str, band: Band, found: Mapping[str, Estimate | float], unit: str = "", why: str = ""
    ) -> Verdict:
        """Several numbers, by where they are, against one band: says how many lie outside, and the ends."""
        if not found:
            return cls(name, kind, band.words(unit), "no point", None, why)
        means = {where: value.mean if isinstance(value, Estimate) else value for where, value in found.items()}
        outside = [where for where, value in found.items() if not band.holds(value)]
        low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
        reached = f"{number(means[low])} ({low}) to {number(means[high])}{unit} ({high})"
        if outside:
            reached += f"; outside at {', '.join(outside[:4])}{', ...' if len(outside) > 4 else ''}"
        return cls(name, kind, band.words(unit), reached, not outside, why)


@dataclass(frozen=True)
class Table:
    """What data.csv holds: the paper's numbers and ours, side by side."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def csv(self) -> str:
        """The same bytes for the same numbers."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows([["" if v is None else rounded(v) for v in row] for row in self.rows])
        return out.getvalue()

    def column(self, name: str, **where: Any) -> list[Any]:
        """One column of the rows whose other columns are as said."""
        index = {key: i for i, key in enumerate(self.header)}
        chosen = [row for row in self.rows if all(row[index[key]] == value for key, value in where.items())]
        return [row[index[name]] for row in chosen]


@dataclass(frozen=True)
class Result:
    """A figure's outcome."""

    table: Table
    verdicts: list[Verdict]
    notes: list[str] = field(default_factory=list)  # lines about what was assumed
    extra: Any = None  # what the picture needs beside the table


class Figure(ABC):
    """One figure or table of a paper. Subclasses set the class attributes and implement `evaluate` and `draw`."""

    title: ClassVar[str]
    source: ClassVar[str]  # paper, number
    about: ClassVar[str]  # what is run, in a sentence or two
    executors: ClassVar[tuple[str, ...]] = ("sim",)

    def points(self, executor: str) -> dict[Hashable, Point]:
        """The runs that it needs, by a key of its choice, without seeds: every seed gets the same arrivals and lengths
        under every policy. {}: it is a matter of arithmetic."""
        return {}

    @abstractmethod
    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """The table and the verdicts. `cells`: values per seed, by the keys of `points`."""

    @abstractmethod
    def draw(self, result: Result, stem: Path) -> None:
        """Draws `stem`.png and .pdf.

        Raises:
          ConfigError: matplotlib is not installed.
        """


def verdict_table(found: Sequence[Verdict]) -> str:
    """A line per verdict, and one for each that was missed."""
    rows = [[v.name, v.kind, v.limit, v.reached, WORDS[v.passed]] for v in found]
    missed = [f"missed: {v.name}: {v.why or 'no explanation was found'}" for v in found if v.passed is False]
    return "\n".join([format_table(["verdict", "kind", "band", "found", ""], rows), *missed])
