"""How many tokens a decoding sequence will still produce: N_future of LayerKV's Eq 1.

LayerKV builds no predictor and points to proxy models that classify a prompt into buckets of output length (Qiu et al.,
arXiv 2404.08509). Too much promised is worse than too little: each token that never comes adds tpot_slo to what a
sequence seems able to wait. So all of them promise one token, the least there can be, when they know nothing.

`truth`, the tokens that are really left, is for `oracle` and for `bucket`, which stands for a trained model that errs
at a chosen rate; no other predictor looks at it. No JAX here.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from engine.errors import ConfigError
from engine.scheduler.layerkv.hashing import uniform
from engine.scheduler.layerkv.window import Window

CAPACITY = 512  # finished outputs that `quantile` keeps


class LengthPredictor(Protocol):
    """What the registered classes do."""

    def remaining(self, produced: np.ndarray, truth: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Tokens that sequences are expected to produce from now on: float64 [n] >= 1. int [n]: tokens `produced`
        so far, tokens really left (`truth`), and request numbers."""
        ...

    def learn(self, output_length: int) -> None:
        """A request has ended after so many tokens."""
        ...


class Quantile:
    """Survival: of the last finished outputs that were longer than what a sequence has produced, a quantile of what
    was left of them (ours)."""

    def __init__(self, q: float = 0.5, min_samples: int = 8):
        """`q` of what was left, rounded down to an output that was seen; nothing is promised before `min_samples`
        outputs have finished. Raises ConfigError when one is out of range."""
        if not (0 <= q <= 1 and min_samples >= 1):
            raise ConfigError(
                f"quantile needs 0 <= q <= 1 and min_samples >= 1, got q={q} and min_samples={min_samples}"
            )
        self.q, self.min_samples = q, min_samples
        self._lengths, self._sorted, self._learned = Window(CAPACITY, 1), np.empty(0), 0

    def remaining(self, produced: np.ndarray, truth: np.ndarray, number: np.ndarray) -> np.ndarray:
        """See `LengthPredictor`; 1 where no output was longer."""
        if self._learned != self._lengths.count:
            self._learned, self._sorted = self._lengths.count, np.sort(self._lengths.rows[:, 0])
        lengths, n = self._sorted, len(self._sorted)
        if n < self.min_samples:
            return np.ones(len(produced))
        first = lengths.searchsorted(produced, side="right")  # of those that were longer
        index = first + (self.q * (n - 1 - first)).astype(np.int64)
        return np.maximum(lengths[np.minimum(index, n - 1)] - produced, 1.0)

    def learn(self, output_length: int) -> None:
        """See `LengthPredictor`."""
        self._lengths.push(np.array([[output_length]]))


class Bucket:
    """A classifier of total length into buckets (2^(b-1), 2^b], right at a chosen rate: N_future is the upper bound of
    the bucket less what is produced (Qiu et al.; the noise is ours).

    When it errs it says a neighbouring bucket, the lower or the upper with equal chance; always the same for a request.
    """

    def __init__(self, accuracy: float = 1.0, seed: int = 0):
        """Raises ConfigError when `accuracy` is outside [0, 1] or `seed` is negative."""
        if not (0 <= accuracy <= 1 and seed >= 0):
            raise ConfigError(f"bucket needs 0 <= accuracy <= 1 and seed >= 0, got accuracy={accuracy} and seed={seed}")
        self.accuracy, self.seed = accuracy, seed

    def remaining(self, produced: np.ndarray, truth: np.ndarray, number: np.ndarray) -> np.ndarray:
        """See `LengthPredictor`; 1 for a sequence that has outgrown its bucket."""
        bucket = np.frexp(produced + truth - 1)[1]  # the smallest b with total <= 2^b
        if self.accuracy < 1:
            chance = uniform(self.seed, number)
            error = np.where((chance < (1 + self.accuracy) / 2) & (bucket > 0), -1, 1)
            bucket = bucket + np.where(chance < self.accuracy, 0, error)
        return np.maximum(np.ldexp(1.0, bucket) - produced, 1.0)

    def learn(self, output_length: int) -> None:
        """It has been trained."""


class Mean:
    """The mean length of all finished outputs, less what is produced."""

    def __init__(self) -> None:
        self._total = self._count = 0

    def remaining(self, produced: np.ndarray, truth: np.ndarray, number: np.ndarray) -> np.ndarray:
        """See `LengthPredictor`."""
        mean = self._total / self._count if self._count else 0.0
        return np.maximum(mean - produced, 1.0)

    def learn(self, output_length: int) -> None:
        """See `LengthPredictor`."""
        self._total += output_length
        self._count += 1


class Oracle:
    """The truth."""

    def remaining(self, produced: np.ndarray, truth: np.ndarray, number: np.ndarray) -> np.ndarray:
        """See `LengthPredictor`."""
        return np.maximum(truth, 1.0)

    def learn(self, output_length: int) -> None:
        """It knows."""


LENGTHS: dict[str, type[Quantile] | type[Bucket] | type[Mean] | type[Oracle]] = {
    "quantile": Quantile,  # the default
    "bucket": Bucket,
    "mean": Mean,
    "oracle": Oracle,
}
