"""A sum of non-negative costs fitted to the last samples, fast enough for every plan to ask. No JAX here."""

from __future__ import annotations

from functools import cache

import numpy as np

from engine.scheduler.layerkv.window import Window

RIDGE = 1e-6  # of a feature's own weight; decides where the samples do not, as when all of them have as many rows
FEW, GROUP = 64, 8  # from so many samples on, one more changes little: they count in groups


class LinearFit:
    """seconds = features . costs, with the costs >= 0 for which the squared relative errors of the last `capacity`
    samples have the least sum.

    It is fitted anew, when it is asked, after each of the first 64 samples and then after every 8th. So what it says
    follows from the samples and their order alone, to the bit: not from how many came at once, nor from when it was
    asked before.
    """

    def __init__(self, num_features: int, capacity: int):
        self.capacity = capacity
        self._samples = Window(capacity + GROUP - 1, num_features + 1)
        self._costs, self._fitted = [0.0] * num_features, 0  # to the first so many samples

    def observe(self, features: np.ndarray, seconds: np.ndarray) -> None:
        """Takes in samples: features [k, F] >= 0 and seconds [k] > 0."""
        relative = np.ones((len(seconds), features.shape[1] + 1))
        np.divide(features, seconds[:, None], out=relative[:, :-1])
        self._samples.push(relative)

    def predict(self, *features: float) -> float:
        """Seconds of a sample with these F features; 0.0 before any was seen."""
        count = self._samples.count
        waiting = count % GROUP if count > FEW else 0
        if count - waiting != self._fitted:
            self._fitted, rows = count - waiting, self._samples.rows
            rows = rows[: len(rows) - waiting][-self.capacity :]
            products = rows.T @ rows
            self._costs = nonnegative_least_squares(products[:-1, :-1], products[:-1, -1]).tolist()
        return sum(cost * feature for cost, feature in zip(self._costs, features, strict=True))


def nonnegative_least_squares(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x >= 0 that makes |A x - b| least, from gram = A'A [F, F] and target = A'b [F], with a ridge: float64 [F].

    The optimum is the unconstrained solution over the features that it uses; of all such solutions without a negative
    entry it is the one with the least error. So all 2^F subsets are solved, at once: exact, and for F <= 5 faster than
    to go round the features, which takes thousands of rounds where they rise and fall together, as in decode steps.
    """
    used, pairs, others = _subsets(len(target))
    unit = 1 / np.sqrt(np.maximum(gram.diagonal(), 1e-300))  # a feature that no sample has stays 0, and costs nothing
    gram, target = gram * unit * unit[:, None] + RIDGE * others[0], target * unit
    found = np.linalg.solve(gram * pairs + others, (used * target)[..., None])[..., 0]  # [2^F, F]
    gain = np.where(np.minimum.reduce(found, 1) >= 0, found @ target, -1.0)  # in squared error, over x = 0
    return found[gain.argmax()] * unit


@cache
def _subsets(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all subsets of n features, the empty one first: members float64 [2^n, n]; pairs of members [2^n, n, n]; and
    the others' part of the identity [2^n, n, n]."""
    used = ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(np.float64)
    return used, used[:, :, None] * used[:, None, :], np.eye(n) * (1 - used[:, None, :])
