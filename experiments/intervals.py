"""What repeats or seeds say of a mean. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.tables import number

DRAWS = 10_000


class Estimate(NamedTuple):
    """A mean over seeds or repeats, and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Estimate:
        """Of one value per seed."""
        found = np.asarray(values, float)
        return cls(float(found.mean()), *interval(found))

    def over(self, known: float) -> Estimate:
        """As a ratio to a number without uncertainty, > 0."""
        return Estimate(self.mean / known, self.low / known, self.high / known)

    def words(self, unit: str = "") -> str:
        """The interval only where there is one."""
        spread = f" ({number(self.low)} to {number(self.high)})" if self.low < self.high else ""
        return f"{number(self.mean)}{unit}{spread}"


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of the mean of `values` [n]."""
    draws = np.random.default_rng(0).choice(values, (DRAWS, len(values)))
    low, high = np.percentile(draws.mean(1), (2.5, 97.5))
    return float(low), float(high)
