"""What prefills, decodes and copies take, learned from those that have been seen. No JAX here.

Nothing is predicted to take time before the first of its kind was seen: a policy that waits for what it believes too
slow would never see it, and never learn better.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from engine.scheduler.layerkv.linear_fit import LinearFit
from engine.scheduler.layerkv.window import Window
from engine.scheduler.plan import Plan

NUM_FEATURES = 5  # of a step: 1, prefill tokens, attended prefill pairs, decode rows, decode kv tokens
MAX_STEPS = 256  # of each kind that count
MAX_COPIES = 64


def features(plan: Plan) -> np.ndarray:
    """What the time of a plan's steps depends on: float64 [repeat, 5], see `NUM_FEATURES`.

    A prompt's `new` tokens behind `start` cached ones attend to new * start + new^2 / 2 pairs; a decode row reads the
    tokens in its cache and the one it writes, one more with each repeat.
    """
    rows = len(plan.decode_slots)
    found = np.zeros((plan.repeat, NUM_FEATURES))
    found[:, 0], found[:, 3] = 1, rows
    found[:, 4] = int(np.add.reduce(plan.decode_positions)) + rows * np.arange(1, plan.repeat + 1)
    for prefill in plan.prefills:
        found[0, 1] += len(prefill.tokens)
        found[0, 2] += _pairs(prefill.start, len(prefill.tokens))
    return found


def _pairs(start: int, new: int) -> float:
    return new * start + new * new / 2


class StepTimes:
    """Seconds of steps, fitted to the last 256 that prefilled and, apart from them, the last 256 that did not: long
    decodes do not push out the few prefills (ours). What it predicts follows from the samples alone; see `LinearFit`.
    """

    def __init__(self) -> None:
        self._prefills, self._decodes = LinearFit(NUM_FEATURES, MAX_STEPS), LinearFit(NUM_FEATURES, MAX_STEPS)

    def observe(self, features: np.ndarray, seconds: np.ndarray) -> None:
        """Takes in steps with these `features` [k, 5] that took `seconds` [k].

        Raises:
          ValueError: a step that took no time.
        """
        if not (shortest := np.minimum.reduce(seconds, initial=np.inf)) > 0:
            raise ValueError(f"a step must take more than 0 s, got {shortest} s")
        prefills = np.count_nonzero(features[:, 1])
        if prefills in (0, len(seconds)):  # nearly always
            (self._prefills if prefills else self._decodes).observe(features, seconds)
        else:
            mine = features[:, 1] > 0
            self._prefills.observe(features[mine], seconds[mine])
            self._decodes.observe(features[~mine], seconds[~mine])

    def prefill(self, tokens: int, start: int = 0) -> float:
        """Seconds of a step that prefills `tokens` tokens behind `start` cached ones; 0.0 before one was seen."""
        return self._prefills.predict(1, tokens, _pairs(start, tokens), 0, 0)

    def decode(self, rows: int, kv_tokens: int) -> float:
        """Seconds of a step that decodes `rows` sequences with `kv_tokens` tokens between them, those it writes
        included; 0.0 before one was seen."""
        return self._decodes.predict(1, 0, 0, rows, kv_tokens)


class LinkRate:
    """The rate of the link to the host in one direction, from the last 64 copies (ours).

    Small copies are mostly latency and slow ones have shared the link; so it is the upper quartile of the rates of
    copies at least as large as the median.
    """

    def __init__(self) -> None:
        self._copies = Window(MAX_COPIES, 2)
        self._rate, self._seen = 0.0, 0

    def observe(self, num_bytes: ArrayLike, seconds: ArrayLike) -> None:
        """Takes in copies, one or [k] of them.

        Raises:
          ValueError: a copy that took no time.
        """
        copies = np.array([num_bytes, seconds], np.float64).T.reshape(-1, 2)
        if not (copies[:, 1] > 0).all():
            raise ValueError(f"a copy must take more than 0 s, got {copies[:, 1].min()} s")
        self._copies.push(copies)

    @property
    def gbs(self) -> float | None:
        """1e9 bytes/s; None before a copy was seen."""
        return self._bytes_per_second() / 1e9 or None

    @property
    def seconds_per_byte(self) -> float:
        """0.0 before a copy was seen."""
        rate = self._bytes_per_second()
        return 1 / rate if rate else 0.0

    def _bytes_per_second(self) -> float:
        if self._seen != self._copies.count:
            self._seen, (sizes, seconds) = self._copies.count, self._copies.rows.T
            large = sizes >= np.sort(sizes)[(len(sizes) - 1) // 2]
            rates = np.sort(sizes[large] / seconds[large])
            self._rate = float(rates[int(0.75 * (len(rates) - 1))])
        return self._rate
