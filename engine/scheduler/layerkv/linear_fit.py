"""A sum of non-negative costs fitted to the last samples, so fast that every plan can fit it anew. No JAX here."""

from __future__ import annotations

from functools import cache

import numpy as np

from engine.scheduler.layerkv.window import Window

RIDGE = 1e-6  # of a feature's own weight; decides where the samples do not, as when all of them have as many rows


class LinearFit:
    """seconds = features . costs, with the costs >= 0 for which the squared relative errors of the last `capacity`
    samples have the least sum. They follow from these samples and nothing else: however they came in, to the bit."""

    def __init__(self, num_features: int, capacity: int):
        self._samples = Window(capacity, num_features + 1)
        self._costs, self._version = [0.0] * num_features, 0

    def observe(self, features: np.ndarray, seconds: np.ndarray) -> None:
        """Takes in samples: features [k, F] >= 0 and seconds [k] > 0."""
        relative = np.empty((len(seconds), features.shape[1] + 1))
        np.divide(features, seconds[:, None], out=relative[:, :-1])
        relative[:, -1] = 1
        self._samples.push(relative)

    def predict(self, *features: float) -> float:
        """Seconds of a sample with these F features; 0.0 before any was seen."""
        if self._version != self._samples.version:
            self._version, rows = self._samples.version, self._samples.rows
            products = rows.T @ rows
            self._costs = nonnegative_least_squares(products[:-1, :-1], products[:-1, -1]).tolist()
        return sum(cost * feature for cost, feature in zip(self._costs, features, strict=True))


def nonnegative_least_squares(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x >= 0 that makes |A x - b| least, from gram = A'A [F, F] and target = A'b [F], with a ridge: float64 [F].

    The optimum is the unconstrained solution over the features that it uses; of all such solutions without a negative
    entry it is the one with the least error. For F <= 5 all 2^F subsets are solved at once (ours: where features go up
    and down together, as in decode steps, coordinate descent takes hundreds of rounds).
    """
    scale = np.sqrt(gram.diagonal())
    scale = np.where(scale > 0, scale, 1.0)  # a feature that no sample has: costs nothing
    gram, target = gram / np.multiply.outer(scale, scale), target / scale
    used = _subsets(len(target))  # [2^F, F]
    systems = np.where(used[:, :, None] & used[:, None, :], gram, 0.0)
    diagonal = systems.reshape(len(used), -1)[:, :: len(target) + 1]  # a view
    diagonal[...] = np.where(used & (diagonal > 0), 1 + RIDGE, 1.0)
    found = np.linalg.solve(systems, (used * target)[..., None])[..., 0]
    gain = np.where((found >= 0).all(1), found @ target, -1.0)  # how much less the error is than with x = 0, squared
    return found[gain.argmax()] / scale


@cache
def _subsets(n: int) -> np.ndarray:
    """All subsets of n features, bool [2^n, n]."""
    return (np.arange(2**n)[:, None] >> np.arange(n)) & 1 > 0
