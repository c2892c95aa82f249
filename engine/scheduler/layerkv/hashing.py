"""Numbers that look random and follow from a few integers, the same on every machine and NumPy version.

splitmix64 (Steele, Lea and Flood, OOPSLA 2014), whose state is each key in turn. No JAX here.
"""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each tuple of integer keys >= 0 (arrays that broadcast; at least one of them [n]):
    float64 [n]."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _mix((state ^ np.asarray(key).astype(np.uint64)) + GOLDEN)
    return (state >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64; wraps around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
