"""What repeats or seeds say of a mean. NumPy only."""

from __future__ import annotations

import numpy as np

DRAWS = 10_000


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% bootstrap interval of the mean of `values` [n]."""
    draws = np.random.default_rng(0).choice(values, (DRAWS, len(values)))
    low, high = np.percentile(draws.mean(1), (2.5, 97.5))
    return float(low), float(high)
